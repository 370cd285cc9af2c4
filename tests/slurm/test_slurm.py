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
from tests.slurm.local_cluster import LocalCluster, running, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
SLOW_STEPS = """
import pathlib, time
from svdtrain.hooks.train_log import TrainLog
on_step_end, slow = TrainLog.on_step_end, pathlib.Path(__file__).with_name("slow")
TrainLog.on_step_end = lambda self, state: (time.sleep(slow.exists()), on_step_end(self, state))[1]
from svdtrain.cli import main
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with running(tmp_path_factory.mktemp("cluster") / "slurm", cpus=64, num_gpus=8) as cluster:
        yield cluster


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


def start_uninterrupted(directory: Path, settings: dict[str, Any]) -> tuple[Path, subprocess.Popen]:
    """The same run outside of Slurm, beside the other one."""
    run = directory / "straight"
    (directory / "straight.json").write_text(json.dumps(settings))
    flags = ["--preset", "d4", "--config", str(directory / "straight.json"), "--num-iterations", str(STEPS)]
    command = [sys.executable, "-m", "svdtrain.cli", *flags, "--device", "cpu", "--save-every", "50"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return run, subprocess.Popen([*command, "--run-dir", str(run)], env=env, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_preempted_at_the_time_limit_requeued_by_hand_and_finished(cluster: LocalCluster, tmp_path: Path) -> None:
    settings = tiny_settings(write_corpus(tmp_path / "text"), train={"eval_every": 30})
    run, output = tmp_path / "run", tmp_path / "output.txt"
    entry = take_snapshot(run, [])  # what is in the run directory is what runs: here with slow steps
    entry.write_text(entry.read_text().replace("from svdtrain.cli import main\n", SLOW_STEPS))
    slow = entry.with_name("slow")
    slow.touch()
    # Slurm looks every 30 s, and one look ahead: the signal comes 20 to 50 s after the start.
    job = submit(cluster, run, settings, "--time=1", "--signal=USR2@10")
    straight, process = start_uninterrupted(tmp_path, settings)

    def steps() -> int:
        return len(records(run, "train")) if (run / "metrics.jsonl").exists() else 0

    def starts() -> int:
        return len(records(run, "resume")) if steps() else 0

    try:
        cluster.wait(lambda: starts() == 1 or cluster.state(job) == "FAILED", 150, "not requeued at the time limit")
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=15")  # once is enough
        at_first_resume = steps()
        cluster.wait(lambda: steps() > at_first_resume, 30, "it does not go on")
        cluster.run("scontrol", "requeue", job)
        slow.unlink()
        cluster.wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), 150, "it does not finish")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{output.read_text() if output.exists() else ''}") from error
    finally:
        process.wait(120)
    assert cluster.state(job) == "COMPLETED", output.read_text()
    ends = [r["reason"] for r in records(run, "end")]
    assert ends == ["preempted by signal SIGUSR2", "preempted by signal SIGTERM", "finished"]
    assert [r["step"] for r in records(run, "train")] == list(range(1, STEPS + 1))  # no gap, no step twice
    assert [r["val/bpb"] for r in records(run, "eval")] == [r["val/bpb"] for r in records(straight, "eval")]
    final = [load_file(p / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors") for p in (run, straight)]
    for name, tensor in final[0].items():
        assert torch.equal(tensor, final[1][name]), name


@pytest.mark.slow
def test_two_tasks_under_srun_and_a_job_of_svd_launch(cluster: LocalCluster, tmp_path: Path) -> None:
    """Side by side: the batch script with two ranks, requeued by hand, and svd-launch, preempted by a signal."""
    settings = tiny_settings(write_corpus(tmp_path / "text"), train={"num_iterations": STEPS, "device_batch_size": 1})
    runs = {"sbatch": tmp_path / "run", "svd-launch": tmp_path / "launched"}
    jobs = {"sbatch": submit(cluster, runs["sbatch"], settings, "--ntasks=2", "--time=15")}
    options = ["--cpus", "1", "--time", "15", "--run-dir", str(runs["svd-launch"])]
    command = [sys.executable, "-m", "svdtrain.launch.cli", *options, "--", "--config", str(tmp_path / "settings.json")]
    environment = {"OMP_NUM_THREADS": "1", "SVDTRAIN_CACHE": os.environ["SVDTRAIN_CACHE"]}
    said = cluster.run(*command, cwd=ROOT, **environment)
    jobs["svd-launch"] = said.split()[1].rstrip(",")

    def steps(name: str) -> list[int]:
        path = runs[name] / "metrics.jsonl"
        return [r["step"] for r in records(runs[name], "train")] if path.exists() else []

    disturb = {"sbatch": ("scontrol", "requeue"), "svd-launch": ("scancel", "--signal=USR2")}
    for name, job in jobs.items():
        cluster.wait(lambda name=name: len(steps(name)) >= 3, 120, f"{name} does not start")
        cluster.run(*disturb[name], job)
    for name, job in jobs.items():
        cluster.wait(lambda job=job: cluster.state(job) in ("COMPLETED", "FAILED"), 180, f"{name} does not finish")
        ends = [r["reason"].split()[0] for r in records(runs[name], "end")]
        assert (cluster.state(job), ends) == ("COMPLETED", ["preempted", "finished"]), name
        assert steps(name) == list(range(1, STEPS + 1))
    refused = cluster.run(*command[:3], "--partition", "nowhere", *command[3:], cwd=ROOT, check=False, **environment)
    assert "svd-launch: error: slurm does not take the job" in refused
    assert "Invalid partition name specified" in refused
