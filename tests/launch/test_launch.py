"""svd-launch: flags, snapshot, guard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import submitit

from svdtrain.interrupts import PREEMPTED as TRAINER_PREEMPTED
from svdtrain.launch import cli
from svdtrain.launch.environment import offline_unless_set, rank_environment
from svdtrain.launch.job import PREEMPTED
from svdtrain.launch.progress import may_start
from svdtrain.launch.snapshot import take_snapshot
from svdtrain.runlog import read_records
from svdtrain.trainer.distributed import announce_slurm_step, first_host


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("30:00", 30), ("24:00:00", 1440), ("1-12", 2160), ("1-00:30", 1470), ("00:00:30", 0.5)],
)
def test_slurms_forms_of_time(text: str, minutes: float) -> None:
    assert cli.parse_time_minutes(text) == minutes


@pytest.mark.parametrize("text", ["soon", "1:2:3:4", "", "0"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--time"):
        cli.parse_time_minutes(text)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--time", "soon", "--cluster", "local"], "--time"),
        (["--cluster", "local", "--nodes", "2"], "--cluster slurm"),
        (["--cluster", "local", "--", "--run-dir", "x"], "before the --"),
        (["--cluster", "local", "--", "--dept", "4"], "did you mean --depth"),
        (["--cluster", "local", "--nodes", "0"], "--nodes"),
        (["--gpu", "8"], "did you mean --gpus"),
        (["--depth", "4"], "svdtrain's own flags go behind --"),
        (["--gpus", "many"], "--gpus"),
        (["--cluster", "cloud"], "--cluster"),
        (["8"], "8"),
    ],
)
def test_what_the_user_must_change_is_one_line(argv: list[str], words: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_sbatch_it_says_where_to_go(capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli.shutil, "which", lambda name: None)
    assert cli.main(["--", "--depth", "4"]) == 2
    assert "login node" in capsys.readouterr().err


@pytest.mark.parametrize(
    "said",
    [
        "Batch job submission failed: Invalid account or account/partition combination specified",
        "Batch job submission failed: No partition specified or system default partition",
    ],
)
def test_what_slurm_refuses_is_one_line(said: str, tmp_path, monkeypatch, capsys) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "sbatch: error: {said}" >&2\nexit 1\n')
    sbatch.chmod(0o755)
    (sbatch.parent / "srun").symlink_to(sbatch)  # submitit looks for it
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    assert cli.main(["--gpus", "8", "--run-dir", str(tmp_path / "run"), "--", "--depth", "4"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "--partition and --account" in error
    assert error.count("\n") == 1


def test_a_run_directory_that_cannot_be_written_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["--cluster", "local", "--run-dir", str(tmp_path / "file" / "run"), "--", "--depth", "4"]) == 2
    error = capsys.readouterr().err
    assert "Not a directory" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit_takes_what_is_asked_of_it(tmp_path, monkeypatch, cluster: str) -> None:
    executors = []
    monkeypatch.setattr(submitit.LocalExecutor, "submit", lambda executor, job: executors.append(executor))
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda executor, job: executors.append(executor))
    options = cli.LaunchOptions(cluster=cluster, gpus=2, signal_s=7)  # type: ignore[arg-type]
    cli._submit(options, 0.5, cli.TrainJob(run=str(tmp_path), entry="train.py", flags=(), requeue="never"))
    if cluster == "local":
        asked = {"tasks_per_node": 2, "gpus_per_node": 2, "timeout_min": 0.5, "signal_delay_s": 7}
        assert executors[0].parameters.items() >= asked.items()
    else:
        assert len(executors) == 1


def test_a_login_node_needs_no_torch() -> None:
    code = "import sys, svdtrain.launch.cli, svdtrain.launch.job\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_sides_mean_the_same_exit_code() -> None:
    assert PREEMPTED == TRAINER_PREEMPTED == 85


def test_the_snapshot_is_taken_once_and_runs_itself(tmp_path) -> None:
    entry = take_snapshot(tmp_path, ["--depth", "2"])
    config = tmp_path / "code" / "svdtrain" / "config" / "run.py"
    config.write_text(config.read_text().replace('"d4": defaults', '"only-in-the-copy": defaults'))
    assert take_snapshot(tmp_path, ["--depth", "9"]) == entry
    assert json.loads((tmp_path / "code" / "launch.json").read_text())["flags"] == ["--depth", "2"]
    command = [sys.executable, str(entry), "--preset", "only-in-the-copy", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout)["model"]["depth"] == 4, done.stderr


def set_latest(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step_{step:06d}\n")


def test_three_restarts_without_a_newer_checkpoint_are_the_last(tmp_path, capsys) -> None:
    answers = [may_start(tmp_path, restart) for restart in range(5)]
    assert answers == [True, True, True, True, False]
    alert = list(read_records(tmp_path / "metrics.jsonl"))[-1]
    assert (alert["level"], alert["rule"]) == ("CRITICAL", "no_progress")
    assert "3 restarts" in capsys.readouterr().err
    assert may_start(tmp_path, 0)  # by hand: the count begins anew


def test_progress_begins_the_count_anew(tmp_path) -> None:
    for restart in range(12):
        if restart % 3 == 0:
            set_latest(tmp_path, 10 * restart)
        assert may_start(tmp_path, restart), restart
    assert [may_start(tmp_path, restart) for restart in (12, 13, 14)] == [True, False, False]


def test_a_damaged_history_does_not_stop_a_run(tmp_path) -> None:
    (tmp_path / "restarts.json").write_text('{"torn')
    assert may_start(tmp_path, 7)


def test_offline_is_the_default_and_can_be_changed() -> None:
    assert offline_unless_set({})["HF_HUB_OFFLINE"] == "1"
    assert "WANDB_MODE" not in offline_unless_set({"WANDB_MODE": "online"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-05,9],b1", "gpu03"), ("a1,a2", "a1"), ("n[1,5]", "n1"), ("x[01-02]-ib", "x01-ib"), ("", "")],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_srun_is_understood_and_the_batch_script_is_one_process(monkeypatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    announce_slurm_step()
    assert "WORLD_SIZE" not in os.environ
    for name, value in {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    announce_slurm_step()
    ours = {name: os.environ.pop(name) for name in rank_environment(0, 2, 0, "", 0)}
    assert ours == {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "20007"}
