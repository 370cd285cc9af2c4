"""On the real nanochat: watching changes no bit, switching works, a killed run goes on as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from real_nanochat import DEPTH, SWITCHED_STEPS, SWITCHING, TAG, Nanochat

from svdtrain.runlog import Record, read_records

pytestmark = pytest.mark.slow


def meta(nanochat: Nanochat, tag: str, step: int) -> dict:
    """What nanochat saved of its loop, without times and names."""
    values = json.loads((nanochat.checkpoint(tag) / f"meta_{step:06d}.json").read_text())
    values.get("loop_state", {}).pop("total_training_time", None)
    for name in ("model_tag", "save_every", "resume_from_step"):
        values["user_config"].pop(name, None)
    return values


def records(run_dir: Path, kind: str) -> list[Record]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == kind]


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=0, rtol=0, msg=name)


def test_watching_changes_no_bit(nanochat: Nanochat, tmp_path: Path) -> None:
    settings = {"num_iterations": 60, "eval_every": 30}
    alone = nanochat.train(**settings, model_tag="alone")
    svd = ["--no-svd-switching", "--svd-interval", "1"]
    printed = nanochat.train_patched(tmp_path / "run", svd, **settings, model_tag="watched")
    losses = re.findall(r"loss: [\d.]+", printed)
    assert len(losses) == 60
    assert losses == re.findall(r"loss: [\d.]+", alone)
    assert_same_weights(nanochat.weights("alone", 60), nanochat.weights("watched", 60))
    assert meta(nanochat, "alone", 60) == meta(nanochat, "watched", 60)
    assert len(records(tmp_path / "run", "svd")) == 60
    train = records(tmp_path / "run", "train")
    assert [record["step"] for record in train] == [*range(1, 61)]
    for record in train:
        assert f"loss: {record['train/loss']:.6f}" in printed
    assert [record["step"] for record in records(tmp_path / "run", "eval")] == [0, 30, 60]
    assert records(tmp_path / "run", "end")[0]["reason"] == "finished"


def test_every_attention_matrix_switches_and_training_goes_on(switched: tuple[Nanochat, Path]) -> None:
    nanochat, run_dir = switched
    changed = {record["layer"] for record in records(run_dir, "switch") if record["change"] == "to_lowrank"}
    assert changed == {f"h.{layer}.attn.{part}" for layer in range(DEPTH) for part in ("c_q", "c_k", "c_v", "c_proj")}
    losses = [record["train/loss"] for record in records(run_dir, "train")]
    assert len(losses) == SWITCHED_STEPS
    assert losses[-1] < losses[0] - 0.1
    sidecar = torch.load(nanochat.checkpoint(TAG) / f"svd_{SWITCHED_STEPS:06d}.pt", weights_only=True)
    weights = nanochat.weights(TAG, SWITCHED_STEPS)
    for name, target in sidecar["targets"].items():
        if target["factors"] is not None:
            W = torch.addmm(*(target["factors"][part] for part in ("W_p", "B", "A")))
            torch.testing.assert_close(W, weights[f"transformer.{name}.weight"])


def test_killed_and_resumed_across_a_switch(same_batches: Nanochat, tmp_path: Path) -> None:
    nanochat, run_dir = same_batches, tmp_path / "run"
    settings = {"num_iterations": 16, "eval_every": 16, "save_every": 8}
    nanochat.train_patched(tmp_path / "whole", SWITCHING, **settings, model_tag="whole")
    whole = records(tmp_path / "whole", "switch")
    assert any(record["step"] <= 8 for record in whole)
    assert any(record["step"] > 8 for record in whole)
    kill_after_step(nanochat, run_dir, 9, **settings, model_tag="killed")
    assert not (nanochat.checkpoint("killed") / "model_000016.pt").exists()
    printed = nanochat.train_patched(run_dir, SWITCHING, **settings, model_tag="killed", resume_from_step=8)
    assert "svd | resumed at step 8 with" in printed
    assert_same_weights(nanochat.weights("whole", 16), nanochat.weights("killed", 16))
    assert meta(nanochat, "whole", 16)["loop_state"] == meta(nanochat, "killed", 16)["loop_state"]
    after = [(r["step"], r["layer"], r["r_new"]) for r in records(run_dir, "switch") if r["restart"] == 1]
    assert after == [(r["step"], r["layer"], r["r_new"]) for r in whole if r["step"] > 8]
    assert [record["step"] for record in records(run_dir, "resume")] == [8]


def kill_after_step(nanochat: Nanochat, run_dir: Path, step: int, **extra: object) -> None:
    """Start a run and kill it, without warning, once it has finished this step."""
    launch = ["-m", "nanochat_patch", "--nanochat", str(nanochat.path), "--run-dir", str(run_dir), *SWITCHING, "--"]
    command = [sys.executable, *launch, *nanochat.flags(**extra)]
    with subprocess.Popen(
        command, cwd=nanochat.path, env=nanochat.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while not any(r["step"] >= step for r in safe_records(run_dir)):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)


def safe_records(run_dir: Path) -> list[Record]:
    return records(run_dir, "train") if (run_dir / "metrics.jsonl").exists() else []


def test_without_a_sidecar_it_resumes_in_full_mode_and_says_so(same_batches: Nanochat, tmp_path: Path) -> None:
    nanochat = same_batches
    settings = {"num_iterations": 6, "eval_every": 6, "save_every": 4, "model_tag": "bare"}
    nanochat.train(**settings)
    nanochat.train_patched(tmp_path / "run", SWITCHING, **settings, resume_from_step=4)
    (alert,) = records(tmp_path / "run", "alert")
    assert (alert["rule"], alert["step"]) == ("no_sidecar", 4)
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [5, 6]


def test_layers_of_8_bits_are_watched_and_not_switched(nanochat: Nanochat, tmp_path: Path) -> None:
    """Its own conversion; such layers multiply on GPUs only, so that nothing is trained here."""
    if nanochat.year == "2025":
        pytest.skip("this nanochat has no fp8")
    printed = nanochat.run(Path(__file__).parent / "fp8_inside.py", tmp_path)
    assert "refused: fp8 layers quantise" in printed
    assert "--no-svd-switching" in printed
    assert "watched: 8" in printed
