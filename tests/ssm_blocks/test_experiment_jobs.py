"""Experiments as jobs: by submitit in a process of this machine, and by both roads on a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssm_blocks.experiments import submit
from ssm_blocks.experiments.__main__ import main
from ssm_blocks.experiments.store import Store
from tests.slurm.local_cluster import LocalCluster, running, why_not

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ("d4", "--quick", "--device", "cpu", "--arms", "deltanet")


def arms(out: Path) -> list[tuple[str, int]]:
    return [(row["arm"], row["seed"]) for row in Store(out / "d4.jsonl").rows()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--resources", "minutes"), "NAME=VALUE"),
        (("--resources", "minuets=3"), "local does not take the job"),
    ],
)
def test_wrong_resources_are_one_line(words: tuple[str, ...], message: str, tmp_path: Path, capsys) -> None:
    assert main([*COMMAND, "--out", str(tmp_path), "--submit", "local", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_resources_are_submitits_names() -> None:
    assert submit.parse_resources("timeout_min=5,slurm_partition=gpu") == {"timeout_min": 5, "slurm_partition": "gpu"}
    assert submit.parse_resources("") == {}


def test_after_a_time_limit_the_same_is_run_again() -> None:
    job = submit.ExperimentJob(arguments=COMMAND)
    again = job.checkpoint()
    assert again.function == job


@pytest.mark.dist
def test_submitit_runs_a_command(tmp_path: Path, capsys) -> None:
    assert main([*COMMAND, "--out", str(tmp_path), "--submit", "local"]) == 0
    assert capsys.readouterr().out.startswith("job ")
    assert arms(tmp_path) == [("deltanet", 0)]


def test_a_failing_command_is_a_failed_job(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 2"):
        submit.ExperimentJob(arguments=(*COMMAND, "--out", str(tmp_path), "--seeds", "0"))()


# on Slurm -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with running(tmp_path_factory.mktemp("cluster") / "slurm", cpus=64, num_gpus=1) as cluster:
        yield cluster


@pytest.mark.slurm
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_the_batch_script_and_submitit_run_experiments(cluster: LocalCluster, tmp_path: Path) -> None:
    """The second goes on where the first has ended: one seed more."""
    cluster.environment |= {"SVDTRAIN_PYTHON": sys.executable, "SVDTRAIN_RUN_DIR": str(tmp_path)}
    said = cluster.run("sbatch", f"--output={tmp_path}/output.txt", "slurm/ssm.sh", *COMMAND, cwd=ROOT)
    job = said.split()[-1]
    cluster.wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), 120, "the job does not end")
    assert cluster.state(job) == "COMPLETED", (tmp_path / "output.txt").read_text()
    assert arms(tmp_path) == [("deltanet", 0)]

    command = [sys.executable, "-m", "ssm_blocks.experiments", *COMMAND, "--seeds", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--submit", "slurm"],
        cwd=ROOT,
        env={**cluster.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(",")
    cluster.wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), 120, "submitit's job does not end")
    assert cluster.state(job) == "COMPLETED"
    assert arms(tmp_path) == [("deltanet", 0), ("deltanet", 1)]
