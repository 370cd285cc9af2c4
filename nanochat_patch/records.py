"""A svdtrain run directory filled from nanochat's loop, so that svd-monitor and svd-report work on it.

nanochat's script runs as `__main__`, so its loop's variables are globals there. What it computes for its own progress
line is read one step later, when it is long on the CPU: a record costs no synchronisation with the device.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_patch.options import MixerConfig
from svdtrain.adaptive import Change
from svdtrain.config import SVDConfig
from svdtrain.runlog import Record, RunDirectory

TRAIN_FIELDS = {
    "debiased_smooth_loss": "train/loss",
    "train_loss_item": "train/loss",  # where fine-tuning keeps no smoothed one
    "lrm": "train/lrm",
    "dt": "train/dt",
    "tok_per_sec": "train/tok_per_sec",
    "mfu": "train/mfu",
    "grad_norm": "train/grad_norm",
}
"""A global of nanochat's script that holds a number: its own name of the metric."""
EVAL_FIELDS = {name: name for name in ("val/bpb", "core_metric", "chatcore_metric")} | {"val_loss": "val/loss"}


class RunRecords:
    """Writes config.json and metrics.jsonl. Does nothing on ranks other than 0 (`writable`)."""

    def __init__(self, path: Path, svd: SVDConfig, mixer: MixerConfig, *, writable: bool = True) -> None:
        self._run = RunDirectory(path, writable=False)  # no directory before there is something to write
        self._writable = writable
        self._svd, self._mixer = svd, mixer
        self._started = self._ended = False
        self._open_step: int | None = None
        self._names: Mapping[str, Any] = {}
        self.resumed_from: int | None = None
        """Step that this process resumed from."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._run.path

    @property
    def holds_a_run(self) -> bool:
        """Whether an earlier process wrote records here."""
        return self._run.metrics_path.exists()

    def check_writable(self) -> None:
        """Raises ValueError before any training where the run directory cannot be made."""
        if not self._writable:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--run-dir {self.path} cannot be written: {error.strerror}") from error
        if not os.access(self.path, os.W_OK):
            raise ValueError(f"--run-dir {self.path} cannot be written: no permission")

    def step_begins(self) -> None:
        """nanochat is about to step its optimizer: what it knows of the step before is complete."""
        self._flush_train()
        self._look_around()
        self._open_step = self._step

    def log(self, data: Mapping[str, Any]) -> None:
        """A dictionary that nanochat logs. Evaluations become records; its rare training lines are written anyway."""
        self._flush_train()
        fields: Record = {field: data[name] for name, field in EVAL_FIELDS.items() if name in data}
        fields |= {f"core/{name}": value for name, value in dict(data.get("centered_results") or {}).items()}
        if fields:
            self._append("eval", int(data.get("step", 0)), fields)

    def analysed(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of an analysis."""
        self._append("svd", step, dict(metrics))

    def changed(self, step: int, change: Change) -> None:
        """A matrix changed its mode or rank. `step` is the number of steps completed, as in every record."""
        fields = dataclasses.asdict(change)
        fields["layer"], fields["change"] = fields.pop("name"), fields.pop("kind")  # `kind` is the record's own
        self._append("switch", step, {**fields, "step": step})

    def alert(self, step: int, level: str, rule: str, message: str) -> None:
        """Something that a person should see."""
        self._append("alert", step, {"level": level, "rule": rule, "message": message})

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint with its sidecar is on disk."""
        self._flush_train()
        self._append("checkpoint", step, {"path": str(path)})

    def end(self, reason: str) -> None:
        """The script is through; further records are dropped."""
        if not self._started or self._ended:
            return
        self._flush_train()
        self._append("end", self._step, {"reason": reason})
        self._ended = True
        self._run.close()

    @property
    def _step(self) -> int:
        """Steps completed, as the script counts."""
        return int(self._names.get("step", 0))

    def _look_around(self) -> None:
        """Keep hold of the script's variables; they outlive the script, whatever ends it."""
        self._names = vars(sys.modules["__main__"])

    def _append(self, kind: str, step: int, fields: Record) -> None:
        if not self._started:
            self._start()
        self._run.append(kind, step, fields)

    def _start(self) -> None:
        """Later than the first line of the script: what it derives is known only after its set-up."""
        self._started = True
        self._run = RunDirectory(self.path, writable=self._writable)
        self._look_around()
        names = self._names
        known = {key: names[key] for key in ("num_iterations", "total_batch_size") if isinstance(names.get(key), int)}
        self._run.write_config(
            {
                "train": known,
                "model": {**(names.get("model_config_kwargs") or {}), **dataclasses.asdict(self._mixer)},
                "svd": dataclasses.asdict(self._svd),
                "nanochat": dict(names.get("user_config") or {}),
            }
        )
        self._run.open_metrics()
        kind, step = ("start", 0) if self.resumed_from is None else ("resume", self.resumed_from)
        world = {"world_size": int(names.get("ddp_world_size", 1)), "device": str(names.get("device", ""))}
        self._run.append(kind, step, {**known, **world})

    def _flush_train(self) -> None:
        if self._open_step is None:
            return
        names, step = self._names, self._open_step
        self._open_step = None
        fields = {field: float(names[name]) for name, field in TRAIN_FIELDS.items() if name in names}
        self._append("train", step + 1, fields)
