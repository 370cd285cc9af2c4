"""A mirror of the log on Weights & Biases (or trackio). metrics.jsonl stays the truth; nothing here can stop a run."""

from __future__ import annotations

import importlib
import os
import secrets
import warnings
from pathlib import Path
from typing import Any, Literal

from svdtrain.runlog import Record, atomic_write_text
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import Alert, ParamsChange, TrainState

Mode = Literal["disabled", "offline", "online"]
INIT_TIMEOUT_S = 60
ID_FILE = "wandb_id.txt"


class WandbSink(Hook):
    """Sends every record under nanochat's metric names, against `step`. Only on rank 0.

    The run id lies in the run directory, so that requeued jobs go on with the same wandb run. WANDB_MODE=offline or
    =disabled in the environment is stronger than `mode`. Without a login, or where wandb fails later, one line says so
    and training goes on with the local log; `scripts/replay_wandb.py` uploads it afterwards.

    Args:
        backend: wandb, or trackio, whose interface is the same as far as it is used here.
    """

    name = "wandb_sink"
    priority = Priority.SINK

    def __init__(
        self, mode: Mode = "online", *, project: str = "svdtrain", entity: str = "", backend: str = "wandb"
    ) -> None:
        self.mode: Mode = mode
        self.project = project
        self.entity = entity
        self.backend = backend
        self._run: Any = None
        self._row: Record = {}
        """Of the newest step, not sent yet."""

    def on_train_start(self, state: TrainState) -> None:
        mode = effective_mode(self.mode)
        if mode == "disabled" or not state.world.is_main:
            return
        try:
            module = importlib.import_module(self.backend)
            if mode == "online" and self.backend == "wandb" and not has_login(module):
                self._give_up("no login here (wandb login, or WANDB_API_KEY)")
                return
            self._run = self._open(module, state, mode)
        except Exception as error:  # wandb raises its own, requests' and the operating system's errors
            self._give_up(f"{type(error).__name__}: {error}")

    def on_log(self, state: TrainState, kind: str, fields: Record) -> None:
        if kind == "sample":
            self._add(state.step, {"sample": f"{fields['prompt']}{fields['text']}"})
        else:
            self._add(state.step, numbers_of(fields))

    def on_params_changed(self, state: TrainState, change: ParamsChange) -> None:
        mode = {"to_lowrank": 1, "to_full": 0}.get(change.kind)
        fields = {f"switch/{change.name}/r": change.r_new}
        self._add(state.step, fields | ({} if mode is None else {f"switch/{change.name}/mode": mode}))

    def on_alert(self, state: TrainState, alert: Alert) -> None:
        if alert.level != "INFO" and hasattr(self._run, "alert"):
            level = {"CRITICAL": "ERROR", "WARNING": "WARN"}.get(alert.level, "INFO")
            self._call("alert", title=alert.rule, text=f"step {state.step}: {alert.message}", level=level)

    def close(self) -> None:
        self._send()
        self._call("finish")
        self._run = None

    def _add(self, step: int, fields: Record) -> None:
        """Rows are sent whole, one a step: a call costs wandb a millisecond, whatever it holds."""
        if self._run is None:
            return
        if self._row.get("step") != step or not self._row.keys().isdisjoint(fields):
            self._send()
            self._row = {"step": step}
        self._row |= fields

    def _send(self) -> None:
        if self._row:
            self._call("log", self._row)
            self._row = {}

    def _open(self, module: Any, state: TrainState, mode: Mode) -> Any:
        options: dict[str, Any] = {
            "project": self.project,
            "name": state.run.path.name,
            "config": state.config.to_dict(),
        }
        if self.backend == "wandb":
            run_id = kept_run_id(state.run.path)
            settings = module.Settings(init_timeout=INIT_TIMEOUT_S, silent=True, console="off")
            options |= {"mode": mode, "dir": str(state.run.path), "id": run_id, "settings": settings}
            # Resuming offline loses what came before (wandb#5865); the segments are joined by replay_wandb.py.
            options |= {"resume": "allow" if mode == "online" else None, "entity": self.entity or None}
        run = module.init(**options)
        if hasattr(run, "define_metric"):
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        return run

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments, **options)
        except Exception as error:
            self._run = None
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        told = " ".join(f"{self.backend} is off for this run: {why}".split())
        warnings.warn(f"{told}; training goes on, the log is in metrics.jsonl", stacklevel=2)


def effective_mode(mode: Mode) -> Mode:
    """The more cautious of the setting and WANDB_MODE."""
    wanted = os.environ.get("WANDB_MODE", "")
    if "disabled" in (mode, wanted):
        return "disabled"
    return "offline" if "offline" in (mode, wanted) else "online"


def has_login(module: Any) -> bool:
    """Whether an API key is known, without asking anybody."""
    return bool(os.environ.get("WANDB_API_KEY") or module.api.api_key)


def kept_run_id(run: Path) -> str:
    """The wandb id of a run directory: made at the first start, the same after every requeue."""
    path = run / ID_FILE
    if not path.exists():
        atomic_write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def numbers_of(fields: Record) -> dict[str, float]:
    """What wandb can draw."""
    return {key: value for key, value in fields.items() if isinstance(value, (int, float)) and "/" in key}
