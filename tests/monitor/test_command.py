"""The command itself: exit codes, one-line errors, JSON, pipes, and how little it imports."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_logs import LAYERS, analysis, healthy_run, record, train, write_run

from svdtrain.monitor.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_exit_codes(tmp_path, capsys) -> None:
    assert main([str(healthy_run(tmp_path / "ok")), "--once"]) == 0
    near = analysis(20, {LAYERS[0]: {"principal_alignment": 0.27, "mode": 0.0}})
    over = analysis(20, {LAYERS[0]: {"principal_alignment": 0.37, "mode": 0.0}})
    warning = str(write_run(tmp_path / "warning", [near, train(21)]))
    critical = str(write_run(tmp_path / "critical", [over, train(21)]))
    assert main([warning]) == 1
    assert main([critical]) == 2
    assert main([warning, "--fail-on", "critical"]) == 0
    assert main([critical, "--fail-on", "critical"]) == 2
    assert main([critical, "--fail-on", "never"]) == 0
    assert "CRITICAL over_limit" in capsys.readouterr().out


def test_a_stale_run_is_unknown_whatever_fail_on_says(tmp_path) -> None:
    run = write_run(tmp_path / "run", [record("start", 0), train(1), train(2)])
    os.utime(run / "metrics.jsonl", (1, 1))
    assert main([str(run), "--once"]) == 3
    assert main([str(run), "--once", "--fail-on", "never"]) == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["{tmp}/nothing"], ["{tmp}"], ["{tmp}/empty"], ["{tmp}/text"], ["{tmp}", "--list"], ["--explain", "nonsense"],
        ["{tmp}/ok", "--since", "soon"], ["{tmp}/ok", "--interval", "0"], ["{tmp}/ok", "--no-such-flag"],
    ],
)  # fmt: skip
def test_nothing_to_say_is_one_line_and_code_3(tmp_path, capsys, argv: list[str]) -> None:
    deep = tmp_path / "here"
    healthy_run(deep / "sub" / "ok")
    write_run(deep / "sub" / "empty", [])
    (write_run(deep / "sub" / "text", []) / "metrics.jsonl").write_text("this is\nno log\n")
    argv = [part.replace("{tmp}/", f"{deep}/sub/").replace("{tmp}", str(tmp_path)) for part in argv]
    try:
        code = main([*argv, "--once"])
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    assert code == 3
    assert told.err.count("\n") == 1
    assert "Traceback" not in told.err


def test_json_is_strict_and_complete(tmp_path, capsys) -> None:
    assert main([str(healthy_run(tmp_path / "run")), "--json"]) == 0
    status = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert status["state"] == "finished"
    assert (status["step"], status["num_iterations"], status["lowrank"], status["switches"]) == (200, 1000, 2, 2)
    assert status["val/bpb"] == 1.8
    assert status["alerts"] == []


def test_follow_ends_with_the_run_and_at_an_alert(tmp_path, capsys) -> None:
    run = str(healthy_run(tmp_path / "run"))
    assert main([run, "--follow", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    over = analysis(20, {LAYERS[0]: {"principal_alignment": 0.37, "mode": 0.0}})
    critical = str(write_run(tmp_path / "critical", [over, train(21)]))
    assert main([critical, "--follow", "--fail-on", "critical"]) == 2
    assert "CRITICAL over_limit" in capsys.readouterr().out


def test_follow_sees_what_is_appended(tmp_path) -> None:
    run = healthy_run(tmp_path / "run", end="")
    command = [sys.executable, "-m", "svdtrain.monitor.cli", str(run), "--follow", "--interval", "0.1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "step 200" in process.stdout.readline()
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(train(201, when=time.time())) + "\n")
            file.write(json.dumps(record("end", 201, reason="finished", when=time.time())) + "\n")
        rest, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert "finished" in rest
    assert process.returncode == 0


def test_explain_and_list(tmp_path, capsys) -> None:
    assert main(["--explain", "switch_now"]) == 0
    assert "to do" in capsys.readouterr().out
    assert main(["--explain", "all"]) == 0
    assert capsys.readouterr().out.count("  fires ") > 15
    healthy_run(tmp_path / "one")
    healthy_run(tmp_path / "two", end="")
    assert main([str(tmp_path), "--list"]) == 0
    told = capsys.readouterr().out
    assert "one" in told
    assert "running" in told


def test_it_imports_nothing_heavy(tmp_path) -> None:
    """Starts in under 0.3 s because of this; scripts/bench_monitor.py measures the time itself."""
    run = healthy_run(tmp_path / "run", 20)
    code = (
        "import sys; from svdtrain.monitor import live, wandb_source; from svdtrain.monitor.cli import main; "
        f"main([{str(run)!r}, '--once']); "
        "heavy = {'torch', 'numpy', 'wandb', 'matplotlib', 'pandas', 'tyro', 'safetensors'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_error(tmp_path) -> None:
    run = healthy_run(tmp_path / "run")
    command = f"{sys.executable} -m svdtrain.monitor.cli {run} --once | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
