"""Finding runs and following a metrics file that somebody else is writing, possibly on another machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
HEAD_BYTES = 128
MAX_LINE_BYTES = 64 << 20  # a longer line is damage, not a record; without a limit it would grow in memory for ever


class NoRun(Exception):
    """Nothing can be said: no such run, or nothing in it. The message is one line for the user."""


class LogFollower:
    """Hands out the whole lines that were appended since the last call.

    A torn last line waits for its end. A file that shrank or was replaced (another run in the same place, a restored
    backup) is read again from the start; `generation` then counts up and what was learned from it must be forgotten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        self.gone = False
        self._offset = 0
        self._identity: tuple[int, int] | None = None
        self._head = b""
        self._rest = b""
        self._overlong = False

    def new_lines(self) -> Iterator[bytes]:
        """Complete new lines, without their line ends. Yields nothing while the file is missing (`gone`)."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - closed below; opening it is what can fail
        except OSError:
            self.gone = True
            return
        self.gone = False
        with file:
            self._check_identity(os.fstat(file.fileno()), file.read(HEAD_BYTES))
            file.seek(self._offset)
            while chunk := file.read(CHUNK_BYTES):
                self._offset += len(chunk)
                yield from self._split(chunk)

    def age_s(self, now: float) -> float:
        """Seconds since the file was last written, by the clock of its file system; inf if it is gone."""
        try:
            return max(0.0, now - self.path.stat().st_mtime)
        except OSError:
            return float("inf")

    def _check_identity(self, status: os.stat_result, head: bytes) -> None:
        """Inode numbers are reused, also at once, so the first bytes (with the time of the start) are compared too."""
        identity = (status.st_dev, status.st_ino)
        replaced = self._identity is not None and identity != self._identity
        if replaced or status.st_size < self._offset or not head.startswith(self._head):
            self.generation += 1
            self._offset, self._rest, self._overlong = 0, b"", False
        self._identity, self._head = identity, head

    def _split(self, chunk: bytes) -> Iterator[bytes]:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        if self._overlong and lines:
            del lines[0]
            self._overlong = False
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest, self._overlong = b"", True
        yield from (line for line in lines if line)


def find_run(given: str | None) -> Path:
    """The run directory that is meant: itself, the newest one inside it, or the newest of `runs/`.

    Raises NoRun with a line that says what to do.
    """
    path = Path(given) if given else Path("runs")
    if not path.exists():
        hint = "start one with svdtrain, or name its directory" if not given else "no such directory"
        raise NoRun(f"{path}: {hint}")
    if path.is_file():
        path = path.parent
    if (path / "metrics.jsonl").exists():
        return path
    runs = list_runs(path)
    if not runs:
        what = "the run has not written a record yet" if (path / "config.json").exists() else "no run in it"
        raise NoRun(f"{path}: {what} (no metrics.jsonl here or one level below)")
    return runs[0]


def list_runs(directory: Path) -> list[Path]:
    """Runs directly inside a directory, the one written last first."""
    found: list[tuple[float, Path]] = []
    for metrics in directory.glob("*/metrics.jsonl"):
        if metrics.parent.is_symlink():
            continue  # `latest`, which is also there under its own name
        try:
            found.append((metrics.stat().st_mtime, metrics.parent))
        except OSError:
            continue  # deleted between the two calls
    return [path for _, path in sorted(found, key=lambda pair: -pair[0])]


def read_config(run: Path) -> dict[str, Any]:
    """The saved configuration; empty where it is missing or damaged (the log alone is enough to show something)."""
    try:
        config = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
