"""A real Slurm: submitted, preempted at the time limit, requeued by hand, finished, and nothing shows of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from svdtrain.launch.snapshot import take_snapshot
from tests.main_job import records, tiny_settings, write_corpus
from tests.slurm.local_cluster import LocalCluster, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 80
SLOW_STEPS = """
import time
from svdtrain.hooks.train_log import TrainLog
on_step_end = TrainLog.on_step_end
TrainLog.on_step_end = lambda self, state: (time.sleep(0.4), on_step_end(self, state))[1]
from svdtrain.cli import main
"""


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    cluster = LocalCluster(tmp_path / "slurm", **getattr(request, "param", {}))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.parametrize("cluster", [{"cpus": 64, "num_gpus": 8}], indirect=True)
@pytest.mark.parametrize("script", ["d20", "d12", "d4_cpu"])
def test_a_cluster_with_eight_gpus_takes_the_scripts(cluster: LocalCluster, script: str) -> None:
    said = cluster.run("sbatch", "--test-only", f"slurm/{script}.sh", cwd=ROOT)
    assert "to start at" in said


def test_a_wrong_partition_and_a_run_outside_slurm_are_one_line(cluster: LocalCluster) -> None:
    said = cluster.run("sbatch", "-p", "nowhere", "slurm/d4_cpu.sh", check=False, cwd=ROOT)
    assert "invalid partition specified: nowhere" in said
    alone = subprocess.run(
        ["bash", "slurm/d4_cpu.sh"], env=cluster.environment, cwd=ROOT, text=True, capture_output=True
    )
    assert alone.returncode == 2
    assert alone.stderr.count("\n") == 1
    assert "sbatch slurm/d4_cpu.sh" in alone.stderr


def submit(cluster: LocalCluster, run: Path, settings: dict[str, Any], *options: str) -> str:
    (run.parent / "settings.json").write_text(json.dumps(settings))
    environment = {"SVDTRAIN_PYTHON": sys.executable, "SVDTRAIN_RUN_DIR": str(run), "OMP_NUM_THREADS": "1"}
    environment["SVDTRAIN_CACHE"] = os.environ["SVDTRAIN_CACHE"]
    said = cluster.run(
        "sbatch", *options, f"--output={run.parent}/output.txt", "--cpus-per-task=1", "slurm/d4_cpu.sh",
        "--config", str(run.parent / "settings.json"), "--num-iterations", str(STEPS), cwd=ROOT, **environment,
    )  # fmt: skip
    return said.split()[-1]


def uninterrupted(directory: Path, settings: dict[str, Any]) -> Path:
    run = directory / "straight"
    (directory / "straight.json").write_text(json.dumps(settings))
    flags = ["--preset", "d4", "--config", str(directory / "straight.json"), "--num-iterations", str(STEPS)]
    command = [sys.executable, "-m", "svdtrain.cli", *flags, "--device", "cpu", "--save-every", "50"]
    subprocess.run([*command, "--run-dir", str(run)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
    return run


def test_preempted_at_the_time_limit_requeued_by_hand_and_finished(cluster: LocalCluster, tmp_path: Path) -> None:
    settings = tiny_settings(write_corpus(tmp_path / "text"), train={"eval_every": 30})
    run = tmp_path / "run"
    entry = take_snapshot(run, [])  # what is in the run directory is what runs: here with slow steps
    entry.write_text(entry.read_text().replace("from svdtrain.cli import main\n", SLOW_STEPS))
    job = submit(cluster, run, settings, "--time=2", "--signal=USR2@45")
    output = tmp_path / "output.txt"

    def steps() -> int:
        return len(records(run, "train")) if (run / "metrics.jsonl").exists() else 0

    def starts() -> int:
        return len(records(run, "resume"))

    try:
        cluster.wait(lambda: steps() > 0 or cluster.state(job) == "FAILED", 90, "the job does not start")
        cluster.wait(lambda: starts() == 1, 180, "it is not requeued at the time limit")
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=15")  # once is enough
        at_first_resume = steps()
        cluster.wait(lambda: steps() > at_first_resume, 30, "it does not go on")
        cluster.run("scontrol", "requeue", job)
        cluster.wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), 300, "it does not finish")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{output.read_text() if output.exists() else ''}") from error
    assert cluster.state(job) == "COMPLETED", output.read_text()
    ends = [r["reason"] for r in records(run, "end")]
    assert "preempted by signal SIGUSR2" in ends
    assert "preempted by signal SIGTERM" in ends
    assert ends[-1] == "finished"
    assert [r["step"] for r in records(run, "train")] == list(range(1, STEPS + 1))  # no gap, no step twice
    straight = uninterrupted(tmp_path, settings)
    assert [r["val/bpb"] for r in records(run, "eval")] == [r["val/bpb"] for r in records(straight, "eval")]
    final = [load_file(p / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors") for p in (run, straight)]
    for name, tensor in final[0].items():
        assert torch.equal(tensor, final[1][name]), name
