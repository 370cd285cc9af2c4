"""The hook API: `Hook` with its events, and the engine that calls every hook in the same order on every rank.

A training step, with its events:

    on_step_start                       the schedule is applied
      forward, backward                 once per micro-batch, each followed by on_micro_batch_end
    on_backward_end                     gradients averaged over ranks, unclipped
      clip
    on_before_optimizer_step            last chance to veto (control.request_skip_step) or to edit gradients
      optimizer.step()                  unless vetoed
      state.step += 1                   the step counts, taken or vetoed
    on_optimizer_step_end(stepped)      new weights and gradients are both there
      zero_grad
    on_step_end                         then save / evaluate / stop requests are honoured

Around it: on_setup, on_restore, on_train_start, then on_evaluate_end, on_log, on_alert, on_params_changed,
on_checkpoint_saved, and at the end on_stop, on_exception, close (in reverse order).
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from svdtrain.runlog import Record
from svdtrain.trainer.distributed import agree_max
from svdtrain.trainer.state import Alert, ParamsChange, TrainState


class Priority(IntEnum):
    """Order of hooks within one event; ties go by registration."""

    CONTROL = 0
    OBSERVE = 50
    SINK = 100


class Hook:
    """Base class; override the events you need. `name` is unique in a run, `state_dict` loadable with weights_only."""

    name: str = ""
    priority: Priority = Priority.OBSERVE

    def on_setup(self, state: TrainState) -> None:
        """Model on its device; no optimizer, compilation or checkpoint yet. Parameters may be replaced freely."""

    def on_restore(self, state: TrainState) -> None:
        """Optimizer built, own `load_state_dict` called if the run resumes; weights and moments are not loaded yet."""

    def on_train_start(self, state: TrainState) -> None:
        """Everything is loaded. Read only."""

    def on_step_start(self, state: TrainState) -> None:
        """Before the first micro-batch; the schedule is applied."""

    def on_micro_batch_end(self, state: TrainState) -> None:
        """After each backward; gradients are local. Called only where overridden."""

    def on_backward_end(self, state: TrainState) -> None:
        """Once a step; gradients are averaged over ranks and unclipped."""

    def on_before_optimizer_step(self, state: TrainState) -> None:
        """After clipping. May veto the step and may edit gradients."""

    def on_optimizer_step_end(self, state: TrainState, stepped: bool) -> None:
        """After the step (or its veto) and before zero_grad: new weights and gradients are both present."""

    def on_params_changed(self, state: TrainState, change: ParamsChange) -> None:
        """A matrix changed its mode or rank; optimizer and model agree again."""

    def on_step_end(self, state: TrainState) -> None:
        """The step is over. Stop, save and evaluate requests made here are honoured at once."""

    def on_evaluate_end(self, state: TrainState, metrics: dict[str, float]) -> None:
        """After an evaluation; the same values on all ranks."""

    def on_log(self, state: TrainState, kind: str, fields: Record) -> None:
        """A record for the log; sinks write it."""

    def on_alert(self, state: TrainState, alert: Alert) -> None:
        """Something a person should know."""

    def on_checkpoint_saved(self, state: TrainState, path: str) -> None:
        """Only once the checkpoint is durable."""

    def on_stop(self, state: TrainState) -> None:
        """Training ended in order; `state.stop_reason` says why."""

    def on_exception(self, state: TrainState, error: BaseException) -> None:
        """Training ends by an exception, which is raised again afterwards."""

    def close(self) -> None:
        """Release files and processes. Always called, in reverse order."""

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint: tensors and primitives only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""


class HookEngine:
    """Calls hooks in order of priority, then registration: the same order on every rank."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        names = [hook.name for hook in hooks]
        duplicates = sorted({n for n in names if names.count(n) > 1})
        if "" in names or duplicates:
            raise ValueError(f"every hook needs a name of its own; missing or duplicate: {duplicates or ['(empty)']}")
        self.hooks = sorted(hooks, key=lambda hook: hook.priority)
        overriding = [h for h in self.hooks if type(h).on_micro_batch_end is not Hook.on_micro_batch_end]
        self._micro_batch_hooks = overriding

    def emit(self, event: str, state: TrainState, *extra: Any) -> None:
        """Call one event on every hook."""
        for hook in self.hooks:
            getattr(hook, event)(state, *extra)

    def emit_micro_batch_end(self, state: TrainState) -> None:
        """Only on hooks that override it, so that the inner loop stays free."""
        for hook in self._micro_batch_hooks:
            hook.on_micro_batch_end(state)

    def log(self, state: TrainState, kind: str, fields: Record) -> None:
        """Publish a record; its numbers become the newest metrics."""
        state.metrics.update({k: v for k, v in fields.items() if isinstance(v, (int, float)) and "/" in k})
        self.emit("on_log", state, kind, fields)

    def agree(self, state: TrainState, *requests: str) -> None:
        """A request made on one rank is made on all; so is a signal that reached one of them."""
        control = state.control
        votes = [float(bool(getattr(control, request))) for request in requests]
        *raised, signal = agree_max([*votes, float(control.signal)], state.world)
        control.ending = max(control.ending, int(signal))
        for request, anywhere in zip(requests, raised, strict=True):
            if anywhere and not getattr(control, request):
                setattr(control, request, "requested by another rank")

    def emit_isolated(self, event: str, state: TrainState, *extra: Any) -> None:
        """Call a last event on every hook even if one of them fails; a failure is printed, not raised."""
        for hook in self.hooks:
            try:
                getattr(hook, event)(state, *extra)
            except Exception:
                traceback.print_exc()

    def close(self) -> None:
        """Close in reverse order; one failing hook does not keep the others open."""
        for hook in reversed(self.hooks):
            try:
                hook.close()
            except Exception:
                traceback.print_exc()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """State of every hook that has any, by name."""
        states = {hook.name: hook.state_dict() for hook in self.hooks}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: dict[str, dict[str, Any]]) -> None:
        """Give every hook its state back. State of a hook that is not there any more is an error the user must see."""
        by_name = {hook.name: hook for hook in self.hooks}
        unknown = sorted(set(states) - set(by_name))
        if unknown:
            raise ValueError(
                f"the checkpoint holds state of hooks that this run does not have: {unknown}; resume with the hooks "
                "that it was saved with, and the settings that bring them (such as svd_preset, svd_interference_every)"
            )
        for name, state in states.items():
            by_name[name].load_state_dict(state)
