"""Where records go: metrics.jsonl."""

from __future__ import annotations

import dataclasses

from svdtrain.runlog import Record
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import Alert, ParamsChange, TrainState


class JsonlSink(Hook):
    """Writes every record of the run to metrics.jsonl, flushed per line. It is the truth; other sinks are mirrors."""

    name = "jsonl_sink"
    priority = Priority.SINK

    def __init__(self) -> None:
        self._state: TrainState | None = None

    def on_train_start(self, state: TrainState) -> None:
        self._state = state
        state.run.open_metrics()
        resumed = state.resumed_from is not None
        fields = {
            "num_iterations": state.num_iterations,
            "total_batch_size": state.config.train.total_batch_size,
            "world_size": state.world.size,
            "device": str(state.device),
        }
        state.run.append("resume" if resumed else "start", state.step, fields)

    def on_log(self, state: TrainState, kind: str, fields: Record) -> None:
        state.run.append(kind, state.step, fields)

    def on_params_changed(self, state: TrainState, change: ParamsChange) -> None:
        fields = dataclasses.asdict(change)
        fields["layer"], fields["change"] = fields.pop("name"), fields.pop("kind")  # `kind` is the record's own
        state.run.append("switch", state.step, fields)

    def on_alert(self, state: TrainState, alert: Alert) -> None:
        state.run.append("alert", state.step, dataclasses.asdict(alert))

    def on_checkpoint_saved(self, state: TrainState, path: str) -> None:
        state.run.append("checkpoint", state.step, {"path": path})

    def on_stop(self, state: TrainState) -> None:
        state.run.append("end", state.step, {"reason": state.stop_reason, "run_seconds": round(state.run_seconds, 3)})

    def on_exception(self, state: TrainState, error: BaseException) -> None:
        state.run.append("end", state.step, {"reason": f"exception: {type(error).__name__}: {error}"})

    def close(self) -> None:
        if self._state is not None:
            self._state.run.close()
