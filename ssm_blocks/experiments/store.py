"""Rows of finished runs, one JSON object a line; appended to, never rewritten."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from ssm_blocks.experiments.experiment import Row

Key = tuple[str, int, str]  # arm, seed, hash of config and settings


class Store:
    """The rows of one experiment in `path`; a line that a crash has torn is skipped with a warning."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All rows that can be read; of several with the same key the last."""
        if not self.path.exists():
            return []
        found: dict[Key, Row] = {}
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                found[key_of(row)] = row
            except (json.JSONDecodeError, KeyError, TypeError):
                warnings.warn(f"{self.path.name}:{number} is no row of results (cut off?); skipped", stacklevel=2)
        return list(found.values())

    def append(self, row: Row) -> None:
        """Add a row and see that it is on the disk. A torn last line is closed first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                file.write(b"\n")
            file.write((json.dumps(row) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def key_of(row: Row) -> Key:
    """What makes a run the same run."""
    return row["arm"], row["seed"], row["settings_hash"]


def _ends_with_newline(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
