"""The `svd-launch` command: from a login node to a running job. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from svdtrain.config.flags import read_flags
from svdtrain.launch.job import TrainJob
from svdtrain.launch.snapshot import take_snapshot

MAX_TIMEOUTS = 10_000  # submitit counts time limits and gives up; our own guard looks at progress instead
DESCRIPTION = """Submit a training run. Everything behind `--` goes to svdtrain:

    svd-launch --gpus 8 --partition gpu --account mine --time 24:00:00 -- --preset d20"""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Where and how large."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local: processes on this machine; debug: in this terminal, one process."""
    nodes: int = 1
    """Number of nodes."""
    gpus: int = 0
    """GPUs per node, one process each; 0: one process on the CPU."""
    partition: str = ""
    """Slurm partition; empty: the cluster's default."""
    account: str = ""
    """Slurm account; empty: your default."""
    time: str = "24:00:00"
    """Time limit as D-HH:MM:SS, HH:MM:SS or minutes; the job is requeued there."""
    cpus: int = 8
    """CPU cores per process."""
    signal_s: int = 180
    """Seconds before the time limit at which the run saves and makes room."""
    run_dir: str = ""
    """Run directory, on a file system that all nodes share; default runs/launch-<date>-<time>."""
    requeue: Literal["preempted", "failed", "never"] = "preempted"
    """When to start again: after a time limit or preemption; also after a failure; never."""
    wait: bool = False
    """local: wait for the end instead of printing the job's number."""


def parse_time_minutes(text: str) -> float:
    """Slurm's forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS. Raises ValueError for others."""
    try:
        days, _, rest = text.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        if days:
            hours, minutes, seconds = [*parts, 0, 0][:3]
        else:
            hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        total = (int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60
    except (ValueError, KeyError):
        raise ValueError(f"--time {text!r}: write minutes, HH:MM:SS or D-HH:MM:SS") from None
    if total <= 0:
        raise ValueError(f"--time {text!r} must be longer than nothing")
    return total


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Ours, and what stands behind `--`."""
    given = list(argv)
    at = given.index("--") if "--" in given else len(given)
    return given[:at], given[at + 1 :]


def parse_options(argv: Sequence[str]) -> LaunchOptions:
    """Raises ValueError, in one line, for flags that cannot be read; SystemExit for --help."""
    known = ["--help", *(f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(LaunchOptions)), "--no-wait"]
    for flag in (token.split("=", 1)[0] for token in argv if token.startswith("--")):
        if flag.replace("_", "-") not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "svdtrain's own flags go behind --"
            raise ValueError(f"unknown flag {flag}; {hint}")
    return read_flags(LaunchOptions, argv, program="svd-launch", description=DESCRIPTION)


def resolve_config(flags: Sequence[str]) -> dict[str, Any]:
    """svdtrain's own reading of its flags, on this machine and before anything is queued. Raises ValueError."""
    command = [sys.executable, "-m", "svdtrain.cli", *flags, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("svdtrain: error: ") or "the flags behind -- cannot be read")
    return json.loads(done.stdout)


def launch(options: LaunchOptions, flags: Sequence[str]) -> int:
    """Submit; returns the exit code. Raises ValueError where the user has to change something."""
    if any(flag.split("=")[0] in ("--run-dir", "--resume") for flag in flags):
        raise ValueError("--run-dir belongs before the --, and --resume is svd-launch's own")
    minutes = parse_time_minutes(options.time)
    if options.cluster == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("sbatch is not here: run svd-launch on a login node, or use --cluster local")
    if options.cluster != "slurm" and options.nodes > 1:
        raise ValueError(f"--cluster {options.cluster} has one node; --nodes {options.nodes} needs --cluster slurm")
    config = resolve_config(flags)
    run = Path(options.run_dir or f"runs/launch-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    entry = take_snapshot(run, flags, config)
    settings = entry.with_name("config.json")
    if not settings.exists():
        settings.write_text(json.dumps(config, indent=2) + "\n")
    job = TrainJob(run=str(run), entry=str(entry), flags=("--config", str(settings)), requeue=options.requeue)
    submitted = _submit(options, minutes, job)
    print(f"job {submitted.job_id}, run directory {run}")
    print(f"output: {run / 'launch'}; live view: svd-monitor {run}")
    return _outcome(submitted) if options.wait or options.cluster == "debug" else 0


def _submit(options: LaunchOptions, minutes: float, job: TrainJob) -> Any:
    import submitit

    folder = Path(job.run) / "launch"
    if options.cluster == "local":  # AutoExecutor takes neither the delay of the signal nor a part of a minute for it
        executor: Any = submitit.LocalExecutor(folder, max_num_timeout=MAX_TIMEOUTS)
    else:
        executor = submitit.AutoExecutor(folder, cluster=options.cluster, slurm_max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(**_parameters(options, minutes))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what the error below says
            return executor.submit(job)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "sbatch: error" in line), lines[-1] if lines else repr(error))
        raise ValueError(f"{options.cluster} does not take the job: {said}; see --partition and --account") from error


def _parameters(options: LaunchOptions, minutes: float) -> dict[str, Any]:
    """submitit's names for them."""
    if options.cluster == "local":
        return {
            "tasks_per_node": max(1, options.gpus),
            "gpus_per_node": options.gpus,
            "timeout_min": minutes,
            "signal_delay_s": options.signal_s,
        }
    parameters: dict[str, Any] = {
        "name": "svdtrain",
        "nodes": options.nodes,
        "tasks_per_node": max(1, options.gpus),
        "gpus_per_node": options.gpus,
        "timeout_min": max(1, round(minutes)),
    }
    if options.cluster == "slurm":
        parameters |= {
            "cpus_per_task": options.cpus,
            "slurm_signal_delay_s": options.signal_s,
            "slurm_additional_parameters": {"requeue": True},
            "slurm_setup": ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"],
            "slurm_srun_args": ["--kill-on-bad-exit=1"],
        }
        parameters |= {f"slurm_{k}": v for k in ("partition", "account") if (v := getattr(options, k))}
        if not options.gpus:
            del parameters["gpus_per_node"]
    return parameters


def _outcome(submitted: Any) -> int:
    """Wait; 0 if every process finished, else 1 with the last line of what went wrong."""
    try:
        submitted.results()
    except Exception as error:
        print(f"svd-launch: the job failed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 submitted (or finished), 1 the job failed, 2 the user has to change something."""
    ours, flags = split_arguments(sys.argv[1:] if argv is None else argv)
    try:
        options = parse_options(ours)
        for field in ("nodes", "cpus", "signal_s"):
            if getattr(options, field) < 1:
                raise ValueError(f"--{field.replace('_', '-')} must be at least 1")
        return launch(options, flags)
    except (ValueError, OSError) as error:
        print(f"svd-launch: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
