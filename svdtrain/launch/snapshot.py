"""A copy of the code in the run directory: whatever happens to the checkout, a requeue runs what was started.

RUN/code/train.py        entry point: `python RUN/code/train.py --run-dir RUN --resume auto ...`
RUN/code/svdtrain/ ...   the packages beside it
RUN/code/launch.json     flags, resolved configuration, commit, time
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdtrain.runlog import atomic_write_text, fsync_directory

SOURCE = Path(__file__).resolve().parents[2]
PACKAGES = ("svdtrain", "ssm_blocks", "nanochat_patch")
ENTRY = '''"""Runs the copy of svdtrain beside this file, not the installed one."""

import sys

from svdtrain.cli import main

sys.exit(main())
'''


def take_snapshot(run: Path, flags: Sequence[str], config: dict[str, Any] | None = None) -> Path:
    """Copy the running code into `run`/code once; a second call leaves the first copy alone. Returns the entry point.

    Raises OSError where the directory cannot be written.
    """
    code = run / "code"
    if not code.exists():
        temporary = run / f".code.tmp.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for package in PACKAGES:
            if (SOURCE / package).is_dir():
                shutil.copytree(SOURCE / package, temporary / package, ignore=shutil.ignore_patterns("__pycache__"))
        (temporary / "train.py").write_text(ENTRY)
        launch = {"flags": list(flags), "config": config, "commit": _commit(), "time": round(time.time(), 3)}
        atomic_write_text(temporary / "launch.json", json.dumps(launch, indent=2) + "\n")
        os.replace(temporary, code)
        fsync_directory(run)
    return code / "train.py"


def _commit() -> str:
    """Commit of the checkout, with "+" behind it where files differ; empty without git."""
    try:
        options = {"cwd": SOURCE, "capture_output": True, "text": True, "timeout": 20}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain"], **options).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return commit + ("+" if changed else "")


if __name__ == "__main__":  # slurm/_env.sh: RUN FLAGS...
    print(take_snapshot(Path(sys.argv[1]), sys.argv[2:]))
