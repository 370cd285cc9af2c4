"""A run on wandb as the source of records, for those who cannot reach the run directory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from svdtrain.monitor.reader import NoRun
from svdtrain.runlog import encode_record

POLL_S = 15.0  # their servers, their limits
KIND_BY_PREFIX = {"svd": "svd", "val": "eval"}
ENDS = {
    "finished": "finished",
    "crashed": "exception: crashed (wandb)",
    "failed": "exception: failed (wandb)",
    "killed": "stopped",
}


class WandbSource:
    """Rows of a wandb run as lines of a log. `path` is ENTITY/PROJECT/ID. Raises NoRun if it cannot be opened."""

    def __init__(self, path: str, api: Any = None) -> None:
        if path.count("/") != 2:
            raise NoRun(f"wandb:{path}: expected wandb:ENTITY/PROJECT/ID")
        self.generation = 0
        self.gone = False
        self._path = path
        self._api = api or _open_api()
        self._next_step = 0
        self._polled_at = float("-inf")
        self._heartbeat = 0.0
        self._ended = False

    def new_lines(self) -> Iterable[bytes]:
        """Records since the last call; asks at most every 15 s."""
        if time.monotonic() - self._polled_at < POLL_S or self._ended:
            return
        self._polled_at = time.monotonic()
        try:
            run = self._api.run(self._path)
            rows = list(run.scan_history(min_step=self._next_step))
        except Exception as error:  # wandb raises its own, requests' and urllib's, depending on where it fails
            raise NoRun(f"wandb:{self._path}: {type(error).__name__}: {error}".replace("\n", " ")) from error
        for row in rows:
            self._next_step = max(self._next_step, int(row.get("_step", 0)) + 1)
            self._heartbeat = max(self._heartbeat, float(row.get("_timestamp", 0.0)))
            yield from (encode_record(record).encode() for record in records_of(row))
        if run.state in ENDS:
            self._ended = True
            end = {"kind": "end", "step": max(0, self._next_step - 1), "time": self._heartbeat, "restart": 0}
            yield encode_record({**end, "reason": ENDS[run.state]}).encode()

    def age_s(self, now: float) -> float:
        """Seconds since the newest row."""
        return max(0.0, now - self._heartbeat) if self._heartbeat else float("inf")


def records_of(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One wandb row, which may hold metrics of several kinds, as records."""
    header = {
        "step": int(row.get("step") or row.get("_step", 0)),
        "time": float(row.get("_timestamp", 0.0)),
        "restart": 0,
    }
    fields: dict[str, dict[str, Any]] = {}
    for key, value in row.items():
        if "/" in key and isinstance(value, (int, float)):
            fields.setdefault(KIND_BY_PREFIX.get(key.split("/")[0], "train"), {})[key] = value
    for kind, numbers in fields.items():
        yield {"kind": kind, **header, **numbers}


def _open_api() -> Any:
    import wandb

    try:
        return wandb.Api()
    except Exception as error:  # no login, no network: its own classes again
        raise NoRun(f"wandb: {error}".replace("\n", " ")) from error
