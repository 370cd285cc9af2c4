"""Saving while training goes on: copy to the host, write in a background thread, report at a step boundary."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from svdtrain.trainer.checkpoint import Checkpoint, CheckpointStore, rng_state
from svdtrain.trainer.distributed import World, agree_any
from svdtrain.trainer.state import TrainState


def host_copy(value: Any) -> Any:
    """The same nested value with every tensor copied to the CPU: later steps cannot change it."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(host_copy(inner) for inner in value)
    return value


def snapshot(state: TrainState, *, evaluated: bool) -> Checkpoint:
    """A copy of everything on the host. Model and optimizer are the same on all ranks, so they are rank 0's to save."""
    is_main = state.world.is_main
    own = {
        "hooks": state.engine.state_dict(),
        "rng": rng_state(state.device),
        "run_seconds": state.run_seconds,
        "metrics": dict(state.metrics),
        "evaluated": evaluated,
    }
    return Checkpoint(
        step=state.step,
        model=host_copy(state.model.state_dict()) if is_main else {},
        optimizer=host_copy(state.optimizer.state_dict()) if is_main else {},
        state=host_copy(own),
        world_size=state.world.size,
    )


def hook_states(checkpoint: Checkpoint, state: TrainState) -> dict[str, Any]:
    """The hooks' state for this rank. With another number of ranks than before it is rank 0's, whose sinks the other
    ranks do not have."""
    states = checkpoint.state["hooks"]
    if checkpoint.world_size == state.world.size or state.world.is_main:
        return states
    mine = {hook.name for hook in state.engine.hooks}
    return {name: saved for name, saved in states.items() if name in mine}


class BackgroundSaver:
    """Writes one checkpoint at a time in a thread of its own; `collect` tells how it went.

    The ranks keep in step through `world.save_group`, which no other thread uses.
    """

    def __init__(self, store: CheckpointStore, world: World) -> None:
        self.store = store
        self._world = world
        self._thread: threading.Thread | None = None
        self._step = -1
        self._path: Path | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def uncollected(self) -> bool:
        """Whether a save was started whose outcome nobody has asked for yet."""
        return self._thread is not None

    def start(self, checkpoint: Checkpoint) -> None:
        """Begin to write; `checkpoint` must share no memory with what trains."""
        assert self._thread is None, "collect the save before"
        self._step, self._path, self._error = checkpoint.step, None, None
        # A daemon, because a process whose peers are dead must be able to end; `collect` and `close` wait for it.
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="save", daemon=True)
        self._thread.start()

    def collect(self) -> tuple[int, Path]:
        """Wait for the save that was started; its step and directory. Raises what went wrong in it."""
        assert self._thread is not None, "nothing was started"
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._step, self._path

    def close(self, timeout_s: float = 60.0) -> None:
        """On the way out after an error: let a save that is under way become durable if it can."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self._path = self.store.save(checkpoint, any_rank=self._any_rank)
        except BaseException as error:  # handed to the main thread by `collect`
            self._error = error

    def _any_rank(self, failed: bool) -> bool:
        return agree_any([failed], self._world, group=self._world.save_group)[0]
