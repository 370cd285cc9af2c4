"""The two-terminal scripts."""

import subprocess
from pathlib import Path

import pytest
from run_logs import healthy_run

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def bash(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *arguments], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("script", ["svd_monitor.sh", "svd_adaptive_local_cpu_train.sh"])
def test_help(script: str) -> None:
    done = bash(str(SCRIPTS / script), "--help")
    assert done.returncode == 0
    assert "usage: bash scripts/" in done.stdout


def test_monitor_script_shows_a_run_and_does_not_wait_for_ever(tmp_path) -> None:
    run = healthy_run(tmp_path / "runs" / "one")
    for given in (run, run.parent):
        done = bash(str(SCRIPTS / "svd_monitor.sh"), "--wait", "1", str(given), "--once")
        assert done.returncode == 0, done.stderr
        assert "finished" in done.stdout
    done = bash(str(SCRIPTS / "svd_monitor.sh"), "--wait", "1", str(tmp_path / "nothing"))
    assert done.returncode == 3
    assert "no run" in done.stderr


def test_training_script_says_what_is_wrong() -> None:
    done = bash(str(SCRIPTS / "svd_adaptive_local_cpu_train.sh"), "--dry-run", "--num-iterations", "many")
    assert done.returncode == 2
    assert "--num-iterations takes a whole number" in done.stderr
