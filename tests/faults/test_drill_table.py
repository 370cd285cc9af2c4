"""The table of fault drills in docs/CLUSTER.md is the one that was measured, and everything in it was survived."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_the_measured_one() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "drill.json").read_text())["rows"]
    document = (ROOT / "docs" / "CLUSTER.md").read_text()
    assert len(rows) == 7
    for row in rows:
        assert f"| {' | '.join(row['cells'])} |" in document
        assert row["survived"]
        assert not any(row["verdict"].values())
        assert not row["undetected"]


@pytest.mark.slow
def test_the_drills_run() -> None:
    command = [sys.executable, "scripts/drill.py", "--kills", "2", "--flips", "1", "--only", "kills", "damage", "ranks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": survived") == 3
