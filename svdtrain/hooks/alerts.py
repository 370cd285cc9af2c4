"""The monitor's alert rules inside training, and a way to be told: a command or a webhook of the user's own."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import shlex
import subprocess
import threading
import time
import urllib.request
import warnings
from typing import Any

from svdtrain.monitor.alerts import AlertBook, check
from svdtrain.monitor.findings import SEVERITY, Situation
from svdtrain.monitor.view import RunView
from svdtrain.runlog import Record
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import Alert, ParamsChange, TrainState

CHECK_EVERY_STEPS = 10
TIMEOUT_S = 10.0
TOLD_BY_OTHERS = {"non_finite", "checkpoint", "restarted"}  # the guard, the checkpoints and the console say these


class AlertRules(Hook):
    """Evaluates the rules of `svd-monitor` while training and raises their alerts: the log then holds their history.

    Only on rank 0, after every analysis and evaluation and every ten steps; a check takes about a millisecond.

    Args:
        notifier: told of every alert of the run, those of other hooks included.
    """

    name = "alert_rules"
    priority = Priority.OBSERVE

    def __init__(self, notifier: Notifier | None = None) -> None:
        self.notifier = notifier
        self.view = RunView()
        self.book = AlertBook()
        self._due = False
        self._telling = False

    def on_train_start(self, state: TrainState) -> None:
        self.view = RunView(state.config.to_dict())
        self._feed(state, "start", {"num_iterations": state.num_iterations})

    def on_log(self, state: TrainState, kind: str, fields: Record) -> None:
        if kind != "sample":
            self._feed(state, kind, fields)
            self._due |= kind in ("svd", "eval")

    def on_params_changed(self, state: TrainState, change: ParamsChange) -> None:
        fields = {"layer": change.name, "change": change.kind, "reason": change.reason}
        self._feed(state, "switch", {**fields, "r_old": change.r_old, "r_new": change.r_new})
        self._due = True

    def on_alert(self, state: TrainState, alert: Alert) -> None:
        if not self._telling:
            self._feed(state, "alert", dataclasses.asdict(alert))
        if self.notifier is not None and state.world.is_main:
            self.notifier.tell(alert, step=state.step, run=str(state.run.path))

    def on_checkpoint_saved(self, state: TrainState, path: str) -> None:
        self._feed(state, "checkpoint", {"path": path})

    def on_step_end(self, state: TrainState) -> None:
        if not state.world.is_main or not (self._due or state.step % CHECK_EVERY_STEPS == 0):
            return
        self._due = False
        self.book, events = check(self.book, Situation(view=self.view), time.monotonic())
        self._telling = True  # what these rules say is not news to them
        for event in events:
            if event.rule not in TOLD_BY_OTHERS:
                state.alert(event.level, event.rule, event.message)
        self._telling = False

    def close(self) -> None:
        if self.notifier is not None:
            self.notifier.close()

    def _feed(self, state: TrainState, kind: str, fields: Record) -> None:
        if state.world.is_main:
            self.view.feed({"kind": kind, "step": state.step, "time": time.time(), "restart": 0, **fields})


class Notifier:
    """Tells of alerts from `level` on, in the background: training never waits for it.

    Args:
        command: run for each alert, with the alert as JSON on its standard input and SVD_ALERT_LEVEL, SVD_ALERT_RULE,
            SVD_ALERT_MESSAGE in its environment. Not a shell line: `sh -c '...'` where you want one.
        webhook: URL that gets the JSON by POST; its `text` is what Slack, Mattermost and Discord bridges show.
        level: INFO, WARNING or CRITICAL.
    """

    def __init__(self, *, command: str = "", webhook: str = "", level: str = "CRITICAL") -> None:
        if level not in SEVERITY:
            raise ValueError(f"alert level must be one of {', '.join(SEVERITY)}, got {level!r}")
        if webhook and not webhook.startswith(("http://", "https://")):
            raise ValueError(f"the webhook must be an http or https address, got {webhook!r}")
        self.command = shlex.split(command)
        self.webhook = webhook
        self.level = level
        self.problems: list[str] = []
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=100)
        self._thread: threading.Thread | None = None

    def tell(self, alert: Alert, *, step: int, run: str) -> None:
        """Pass on an alert if its level is high enough; dropped if a hundred are waiting already."""
        if SEVERITY.get(alert.level, 0) < SEVERITY[self.level]:
            return
        text = f"{alert.level} {alert.rule} at step {step} of {run}: {alert.message}"
        try:
            self._waiting.put_nowait({**dataclasses.asdict(alert), "step": step, "run": run, "text": text})
        except queue.Full:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="alert-notifier", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait a moment for what is still to be told."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(timeout=TIMEOUT_S)
            self._thread = None
        for problem in dict.fromkeys(self.problems):
            warnings.warn(f"alerts could not be passed on: {problem}", stacklevel=2)
        self.problems.clear()

    def _work(self) -> None:
        while (message := self._waiting.get()) is not None:
            body = json.dumps(message)
            try:
                if self.command:
                    self._run_command(message, body)
                if self.webhook:
                    self._post(body)
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                self.problems.append(f"{type(error).__name__}: {error}")  # said at the end, from the main thread

    def _run_command(self, message: dict[str, Any], body: str) -> None:
        told = {f"SVD_ALERT_{key.upper()}": str(message[key]) for key in ("level", "rule", "message", "step", "run")}
        subprocess.run(
            self.command, input=body.encode(), env={**os.environ, **told}, timeout=TIMEOUT_S, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _post(self, body: str) -> None:
        request = urllib.request.Request(
            self.webhook, data=body.encode(), headers={"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            answer.read(1)
