"""The run directory: its layout, the record schema of metrics.jsonl, and safe ways to write and read both. No torch.

    runs/<name>/
      config.json       the resolved configuration
      tokenizer.json    what the text was tokenised with
      metrics.jsonl     one flat record a line, flushed per line; the truth of the run
      checkpoints/      step_000500/ ..., and `latest`
      code/             (cluster runs) snapshot of the sources

Every record has `kind`, `step` (optimizer steps completed), `time` (Unix seconds) and `restart` (0 for the first
process of a run, 1 after the first resume ...). Kinds: start, resume, train, eval, svd, svd_step, switch, alert,
sample, checkpoint, forgetting, trigger, alarm, end.

`svd`, every svd_interval steps: everything of every watched matrix under svd/<layer>/<metric> (`r`, `mode`, the
numbers of the decision, and with the tracked engine ranks, blocks of the update and the quality of the basis).
`svd_step`, every step (tracked engine): all matrices in a dozen numbers, measured at step svd_step/of_step, the step
before: svd_step/{update,gradient}_{lift_median,lift_max,z_max}, svd_step/{update,gradient}_worst (the name of the
matrix with the largest lift) and, only where there are any, svd_step/{update,gradient}_not_finite (how many).
A step that is repeated after a resume appears once per restart; readers keep the newest restart.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode_record(record: Record) -> str:
    """One line of strict JSON. Non-finite floats become the strings nan, inf and -inf, which JSON itself cannot say."""
    try:
        return json.dumps(record, allow_nan=False)  # nearly every record; a look at each value takes half as long again
    except ValueError:
        return json.dumps({key: _encode_value(value) for key, value in record.items()}, allow_nan=False)


def decode_record(line: str) -> Record | None:
    """Inverse of `encode_record`; None for a line that is torn or no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or "kind" not in record:
        return None
    if '"nan"' not in line and 'inf"' not in line:
        return record  # nearly every line; a look at each of two thousand values would cost as much as parsing them
    return {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def _encode_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: _encode_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode_value(inner) for inner in value]
    return value


def read_records(path: Path) -> Iterator[Record]:
    """Every whole record of a metrics file; a torn last line is its end, a torn inner line is passed over."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            record = decode_record(line) if line.endswith("\n") else None
            if record is not None:
                yield record


def surviving_records(path: Path) -> Iterator[Record]:
    """Records that count: of a step that was repeated after a resume only the newest, in the order of the file."""
    starts = [
        (int(r.get("restart", 0)), int(r.get("step", 0)))
        for r in read_records(path)
        if r["kind"] in ("start", "resume")
    ]
    last_step = {
        restart: min((step for later, step in starts if later > restart), default=math.inf) for restart, _ in starts
    }
    for record in read_records(path):
        if record.get("step", 0) <= last_step.get(record.get("restart", 0), math.inf):
            yield record


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def atomic_symlink(target: str, link: Path) -> None:
    """Point `link` at `target`, replacing an older link in one step."""
    temporary = link.with_name(f".{link.name}.tmp.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def fsync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunDirectory:
    """Paths of one run and the open metrics file. Only rank 0 writes (`writable`)."""

    def __init__(self, path: Path, *, writable: bool = True) -> None:
        self.path = path
        self.writable = writable
        self.restart = 0
        self._file: BinaryIO | None = None
        if writable:
            path.mkdir(parents=True, exist_ok=True)

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def write_config(self, config: dict[str, Any]) -> None:
        """Save the resolved configuration and let `runs/latest` (beside the run) point here."""
        if not self.writable:
            return
        atomic_write_text(self.config_path, json.dumps(config, indent=2) + "\n")
        atomic_symlink(self.path.name, self.path.parent / "latest")

    def read_config(self) -> dict[str, Any] | None:
        """The saved configuration, or None where there is none."""
        return json.loads(self.config_path.read_text()) if self.config_path.exists() else None

    def open_metrics(self) -> None:
        """Open metrics.jsonl for appending; a torn last line, left by a kill, is ended first; counts the restart."""
        if not self.writable:
            return
        if self.metrics_path.exists():
            starts = sum(record["kind"] in ("start", "resume") for record in read_records(self.metrics_path))
            self.restart = starts
        # Unbuffered: a record is with the system once it is written, and a full disk leaves nothing to write later.
        self._file = open(self.metrics_path, "ab", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
        if self._file.tell() > 0 and _last_byte(self.metrics_path) != b"\n":
            self._write(b"\n")

    def append(self, kind: str, step: int, fields: Record | None = None) -> None:
        """Write one record, so that a kill loses nothing and a monitor sees it at once.

        Raises OSError where it cannot be written (disk full); further records are then dropped.
        """
        if self._file is None:
            return
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), "restart": self.restart, **(fields or {})}
        self._write(encode_record(record).encode() + b"\n")

    def sync(self) -> None:
        """Make the records durable: those of the steps in a checkpoint must not be lost with the power."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.close()
            raise OSError(
                error.errno,
                f"cannot write {self.metrics_path} ({error.strerror}); free space and go on with --resume auto",
            ) from error

    def close(self) -> None:
        """Close the metrics file; further records are dropped."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def newest_run(runs: Path) -> Path | None:
    """The run that `runs/latest` points at, else the one written last; None if there is none."""
    latest = runs / "latest"
    if latest.exists():
        return latest.resolve()
    candidates = [p.parent for p in runs.glob("*/metrics.jsonl")] if runs.is_dir() else []
    return max(candidates, key=lambda p: (p / "metrics.jsonl").stat().st_mtime, default=None)
