"""The launcher on a fake of the touched surface: both forms, records, sidecars, refusals."""

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_nanochat import losses, undone, weights, write_checkout

from nanochat_patch.launch import prepare, run_script
from nanochat_patch.options import Launch, Options
from nanochat_patch.session import Session
from svdtrain.config import SVDConfig
from svdtrain.runlog import Record, read_records

WATCH = SVDConfig(svd_switching=False, svd_interval=2)
SWITCH = SVDConfig(svd_rule="original", svd_interval=2, svd_warmup=1, svd_min_rank=2)


@pytest.fixture(params=["2026", "2025"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkout(tmp_path / "nanochat", request.param)


def alone(checkout: Path, out: Path, **flags: object) -> None:
    """The fake script without us."""
    with undone():
        sys.path.insert(0, str(checkout))
        sys.argv = ["base_train.py", *arguments(out, flags)]
        runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)


def patched(checkout: Path, out: Path, svd: SVDConfig, run_dir: Path | None = None, **flags: object) -> Session:
    launch = Launch(nanochat=str(checkout), run_dir=str(run_dir or out / "run"))
    with undone():
        session = prepare(Options(launch=launch, svd=svd, base_train=tuple(arguments(out, flags))))
        run_script(session)
    return session


def arguments(out: Path, flags: dict[str, Any]) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    return [f"--out={out}", *(f"--{name}={value}" for name, value in flags.items())]


def records(path: Path, kind: str) -> list[Record]:
    return [record for record in read_records(path / "metrics.jsonl") if record["kind"] == kind]


def test_watching_changes_no_bit(checkout: Path, tmp_path: Path) -> None:
    alone(checkout, tmp_path / "alone")
    session = patched(checkout, tmp_path / "watched", WATCH)
    assert losses(tmp_path / "alone") == losses(tmp_path / "watched")
    a, b = weights(tmp_path / "alone", 6), weights(tmp_path / "watched", 6)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert session.svd is not None
    assert session.svd.step == 6


@pytest.mark.parametrize("engine", ["tracked", "exact"])
def test_analyses_see_the_gradient_and_not_what_the_host_makes_of_it(
    engine: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracked engine looks at every step, and decides from the look before the decision."""
    before: dict[str, torch.Tensor] = {}
    seen: list[int] = []

    class Watching(Session):
        def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
            super()._before_step(optimizer, args, kwargs)
            if self.svd is not None:  # the first hook of all: the gradients are as the backward pass left them
                before.update({name: t.W.grad.clone() for name, t in self.svd.targets.items()})

        def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
            assert self.svd is not None
            step = self.svd.step - 1
            if engine == "tracked" or step % WATCH.svd_interval == 0:
                assert all(torch.equal(before[name], t.W.grad) for name, t in self.svd.targets.items()), step
                seen.append(step)
            super()._after_step(optimizer, args, kwargs)

    monkeypatch.setattr("nanochat_patch.launch.Session", Watching)
    patched(checkout, tmp_path, dataclasses.replace(WATCH, svd_engine=engine))
    assert seen == ([0, 1, 2, 3, 4, 5] if engine == "tracked" else [0, 2, 4])


def test_paths_are_relative_to_where_it_is_started(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    patched(Path("nanochat"), tmp_path / "out", WATCH, Path("records"))
    assert len(records(tmp_path / "records", "train")) == 6


def test_records_of_a_run(checkout: Path, tmp_path: Path) -> None:
    patched(checkout, tmp_path, WATCH)
    run = tmp_path / "run"
    (start,) = records(run, "start")
    assert (start["num_iterations"], start["total_batch_size"]) == (6, 32)
    train = records(run, "train")
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert [record["train/loss"] for record in train] == losses(tmp_path)
    assert [(r["step"], r.get("val/bpb"), r.get("core_metric")) for r in records(run, "eval")] == [
        (0, 2.5, None), (6, 2.5, None), (6, None, 0.125),
    ]  # fmt: skip
    assert records(run, "eval")[-1]["core/said"] == 0.25
    assert [record["step"] for record in records(run, "svd")] == [1, 3, 5]
    assert "svd/h.1.attn.c_q/principal_alignment" in records(run, "svd")[-1]  # the first look has nothing to show yet
    assert records(run, "end") == [{**records(run, "end")[0], "step": 6, "reason": "finished"}]
    assert '"svd_interval": 2' in (run / "config.json").read_text()


def test_switching_and_resume_across_it(checkout: Path, tmp_path: Path) -> None:
    patched(checkout, tmp_path / "whole", SWITCH, num_iterations=10, save_every=5)
    switches = records(tmp_path / "whole" / "run", "switch")
    assert {s["step"] <= 5 for s in switches} == {True, False}
    state = torch.load(tmp_path / "whole" / "svd_000005.pt", weights_only=True)
    assert any(target["factors"] is not None for target in state["targets"].values())
    session = patched(checkout, tmp_path / "whole", SWITCH, num_iterations=10, resume_from_step=5)
    assert session.svd is not None
    assert session.svd.step == 10
    assert (
        losses(tmp_path / "whole")
        == [record["train/loss"] for record in records(tmp_path / "whole" / "run", "train")][5:10]
    )
    (resume,) = records(tmp_path / "whole" / "run", "resume")
    assert (resume["step"], resume["restart"]) == (5, 1)
    again = [(s["step"], s["layer"], s["r_new"]) for s in records(tmp_path / "whole" / "run", "switch") if s["restart"]]
    assert again == [(s["step"], s["layer"], s["r_new"]) for s in switches if s["step"] > 5]


def test_a_resume_without_sidecar_says_so(checkout: Path, tmp_path: Path) -> None:
    alone(checkout, tmp_path, num_iterations=4)
    session = patched(checkout, tmp_path, SWITCH, num_iterations=6, resume_from_step=4)
    (alert,) = records(tmp_path / "run", "alert")
    assert (alert["rule"], alert["step"], alert["level"]) == ("no_sidecar", 4, "WARNING")
    assert session.svd is not None
    assert session.svd.step == 6


def test_a_sidecar_of_other_weights_is_refused(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patched(checkout, tmp_path, SWITCH, num_iterations=5)
    data = weights(tmp_path, 5)
    torch.save({name: value + 0.1 for name, value in data.items()}, tmp_path / "model_000005.pt")
    with pytest.raises(SystemExit) as stop:
        patched(checkout, tmp_path, SWITCH, num_iterations=6, resume_from_step=5)
    assert stop.value.code == 2
    assert "belongs to other weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        patched(checkout, tmp_path, SVDConfig(svd_targets="c_q"), num_iterations=6, resume_from_step=5)
    assert "other svd_targets" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not all of it", b"no archive"])
def test_a_damaged_sidecar_is_refused_by_name(
    content: bytes, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patched(checkout, tmp_path, SWITCH, num_iterations=5)
    (tmp_path / "svd_000005.pt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        patched(checkout, tmp_path, SWITCH, num_iterations=6, resume_from_step=5)
    assert stop.value.code == 2
    assert "svd_000005.pt cannot be read, it is damaged; delete it" in capsys.readouterr().err


def test_fp8_is_watched_and_not_switched(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        patched(checkout, tmp_path, SWITCH, fp8=1)
    assert "--no-svd-switching" in capsys.readouterr().err
    patched(checkout, tmp_path, WATCH, fp8=1)
    assert len(records(tmp_path / "run", "svd")) == 3


def test_targets_outside_the_matrix_optimizer_are_refused(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        patched(checkout, tmp_path, SVDConfig(svd_targets="wte"))
    assert "does not own" in capsys.readouterr().err


def test_a_second_run_does_not_land_in_the_first(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patched(checkout, tmp_path, WATCH, num_iterations=1)
    with pytest.raises(SystemExit):
        patched(checkout, tmp_path, WATCH, num_iterations=1)
    assert "already holds a run" in capsys.readouterr().err
    assert len(records(tmp_path / "run", "train")) == 1


def test_it_says_what_it_watches_and_where_the_records_go(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = patched(checkout, tmp_path, WATCH, num_iterations=1)
    assert session.svd is not None
    lines = capsys.readouterr().out.splitlines()
    assert f"svd | watching {len(session.svd.targets)} matrices; run directory {tmp_path / 'run'}" in lines


def test_a_run_directory_that_cannot_be_made_is_refused_before_training(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        patched(checkout, tmp_path / "out", WATCH, tmp_path / "file" / "run")
    assert stop.value.code == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_real_wandb_run_is_mirrored(checkout: Path, tmp_path: Path) -> None:
    with undone():
        launch = Launch(nanochat=str(checkout), run_dir=str(tmp_path / "run"))
        session = prepare(Options(launch=launch, svd=WATCH, base_train=(f"--out={tmp_path}", "--run=mine")))
        run_script(session)
        import wandb

        assert wandb.last.logged[-1] == "finished"  # type: ignore[attr-defined]
        assert wandb.last.logged[0]["val/bpb"] == 2.5  # type: ignore[attr-defined]
    assert [record["step"] for record in records(tmp_path / "run", "eval")] == [0, 6, 6]
    assert records(tmp_path / "run", "end")[0]["reason"] == "finished"


def test_a_crash_is_recorded(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CRASH", "3")
    with pytest.raises(RuntimeError, match="fell off"):
        patched(checkout, tmp_path, WATCH)
    (end,) = records(tmp_path / "run", "end")
    assert (end["step"], end["reason"]) == (3, "exception: RuntimeError: the device fell off")


def test_without_policy_nothing_is_analysed(checkout: Path, tmp_path: Path) -> None:
    patched(checkout, tmp_path, SVDConfig(svd_preset="off"))
    assert not records(tmp_path / "run", "svd")
    assert len(records(tmp_path / "run", "train")) == 6
