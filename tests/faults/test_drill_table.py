"""The table of fault drills in docs/CLUSTER.md is the one that was measured, and everything in it was survived."""

import json
from pathlib import Path

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
