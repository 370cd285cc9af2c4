"""What a person sees in the terminal: a progress line, a line per switch, alerts, and the table at the end."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from svdtrain.runlog import Record
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import Alert, ParamsChange, TrainState

ALERT_STYLES = {"CRITICAL": "bold red", "WARNING": "yellow", "INFO": "cyan"}
NUM_PLAIN_LINES = 40  # a whole run prints about this many progress lines where there is no terminal


class ConsoleSink(Hook):
    """Progress for people: a live line in a terminal, plain lines elsewhere. Only on rank 0."""

    name = "console_sink"
    priority = Priority.SINK

    def __init__(self, console: Console) -> None:
        self.console = console
        self.first_bpb: float | None = None
        self.last_bpb: float | None = None
        self.num_switches = 0
        self.sample: tuple[str, str] | None = None
        self._progress: Progress | None = None
        self._started_at = 0.0
        self._first_step = 0

    def on_train_start(self, state: TrainState) -> None:
        self._started_at, self._first_step = time.monotonic(), state.step
        if state.resumed_from is not None:
            self.console.print(f"resumed at step {state.step} from {state.run.checkpoints_path}", highlight=False)
        if self.console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.add_task("starting", total=state.num_iterations, completed=state.step)
            self._progress.start()

    def on_step_end(self, state: TrainState) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=state.step, description=self._line(state))
        elif state.step % max(1, state.num_iterations // NUM_PLAIN_LINES) == 0 or state.step == state.num_iterations:
            self._print(self._line(state))

    def on_evaluate_end(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.last_bpb = metrics["val/bpb"]
        if self.first_bpb is None:
            self.first_bpb = self.last_bpb
        self._print(f"step {state.step:>5}: val bpb {metrics['val/bpb']:.4f}")

    def on_params_changed(self, state: TrainState, change: ParamsChange) -> None:
        self.num_switches += change.kind != "rank"
        target = {"to_lowrank": f"low-rank r={change.r_new}", "to_full": "full"}.get(
            change.kind, f"r={change.r_old} -> r={change.r_new}"
        )
        self._print(f"step {state.step:>5}: {change.name} -> {target}: {change.reason}", style="magenta")

    def on_alert(self, state: TrainState, alert: Alert) -> None:
        self._print(f"{alert.level} {alert.rule}: {alert.message}", style=ALERT_STYLES.get(alert.level))

    def on_log(self, state: TrainState, kind: str, fields: Record) -> None:
        if kind == "sample":
            self.sample = (fields["prompt"], fields["text"])
            self._print(f"step {state.step:>5}: sample: {fields['prompt']!r} ... {fields['text']!r}")

    def on_checkpoint_saved(self, state: TrainState, path: str) -> None:
        self._print(f"step {state.step:>5}: checkpoint {path}")

    def on_stop(self, state: TrainState) -> None:
        self.close()
        self.console.print(self._summary(state))

    def state_dict(self) -> dict[str, Any]:
        return {"first_bpb": self.first_bpb, "last_bpb": self.last_bpb, "num_switches": self.num_switches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_bpb, self.last_bpb, self.num_switches = state["first_bpb"], state["last_bpb"], state["num_switches"]

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str, style: str | None = None) -> None:
        console = self._progress.console if self._progress is not None else self.console
        console.print(escape(text), style=style, highlight=False, soft_wrap=True)

    def _line(self, state: TrainState) -> str:
        metrics = state.metrics
        done = state.step - self._first_step
        seconds_left = (time.monotonic() - self._started_at) / max(1, done) * (state.num_iterations - state.step)
        parts = [
            f"step {state.step:>5}/{state.num_iterations}",
            f"loss {metrics.get('train/loss_ema', float('nan')):.3f}",
            f"bpb {self.last_bpb:.3f}" if self.last_bpb is not None else "bpb -",
            f"{metrics.get('train/tok_per_sec', 0):,.0f} tok/s",
            f"low-rank {state.num_lowrank}",
            f"ETA {format_seconds(seconds_left)}",
        ]
        return " | ".join(parts)

    def _summary(self, state: TrainState) -> Table:
        tokens = (state.step - self._first_step) * state.config.train.total_batch_size
        seconds = max(time.monotonic() - self._started_at, 1e-9)
        table = Table(title=f"{state.stop_reason} at step {state.step}", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row("steps", f"{state.step} of {state.num_iterations}")
        table.add_row("time", f"{format_seconds(seconds)} ({tokens / seconds:,.0f} tokens/s, evaluation included)")
        table.add_row("val bpb", _bpb_row(self.first_bpb, self.last_bpb))
        table.add_row("switches", f"{self.num_switches}; {state.num_lowrank} matrices low-rank now")
        if self.sample is not None:
            table.add_row("sample", escape(self.sample[0] + self.sample[1]))
        table.add_row("run directory", escape(str(state.run.path)))
        table.add_row("next", _next_steps(state))
        return table


def format_seconds(seconds: float) -> str:
    """Whole seconds as 1h 02m 03s, 2m 03s or 3s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m {rest:02d}s"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def _bpb_row(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return "not evaluated"
    return f"{first:.4f} -> {last:.4f} ({(last / first - 1) * 100:+.1f} %)"


def _next_steps(state: TrainState) -> str:
    run = escape(str(state.run.path))
    if state.step < state.num_iterations:
        settings = f"--config {run}/config.json " if state.run.config_path.exists() else ""
        return f"svdtrain {settings}--run-dir {run} --resume auto"
    return f"svd-monitor {run}    svd-report {run}"
