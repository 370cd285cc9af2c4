"""What every hook sees: one typed state, and the requests a hook may make of the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svdtrain.config import RunConfig
from svdtrain.runlog import RunDirectory
from svdtrain.trainer.distributed import World
from svdtrain.trainer.errors import Preempted


class Tokenizer(Protocol):
    """What the trainer and its hooks need of a tokenizer."""

    bos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_bytes(self) -> Tensor: ...


class Stream(Protocol):
    """Training data: a pure function of the step, so that a resume needs no reader state."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]: ...


class ReplayableStream(Stream, Protocol):
    """Training data that can give its first rows again. What is replayed when is in `schedule`; its user saves it."""

    schedule: list[tuple[int, float, int, int]]

    @property
    def batch_size(self) -> int: ...
    @property
    def rows_per_epoch(self) -> int: ...
    def first_rows(self, num_rows: int) -> tuple[Tensor, Tensor]: ...
    def replay(self, from_step: int, share: float, *, keep_out: int = 0) -> None: ...


@dataclass(slots=True)
class Control:
    """Requests of hooks to the loop. The engine agrees them across ranks, then the loop honours them."""

    skip_step: str = ""
    stop: str = ""
    save: str = ""
    evaluate: str = ""
    saving: str = ""
    """Whether a rank is still writing the last checkpoint."""
    abort: str = ""
    """Why the state of this run cannot be trusted any more: it stops without a save."""
    signal: int = 0
    """Number of the signal that reached this process; a handler sets it at any moment, so nothing decides by it."""
    ending: int = 0
    """Number of the signal that ends the run, agreed over ranks; 0 as long as there is none."""

    def request_skip_step(self, reason: str) -> None:
        """Veto the coming optimizer step (only meaningful up to on_before_optimizer_step)."""
        self.skip_step = self.skip_step or reason

    def request_stop(self, reason: str) -> None:
        """End training after this step."""
        self.stop = self.stop or reason

    def request_abort(self, reason: str) -> None:
        """End training after this step and do not save: the weights are broken."""
        self.abort = self.abort or reason
        self.request_stop(reason)

    def request_save(self, reason: str) -> None:
        """Save a checkpoint at the end of this step."""
        self.save = self.save or reason

    def request_evaluate(self, reason: str) -> None:
        """Evaluate at the end of this step."""
        self.evaluate = self.evaluate or reason


@dataclass(frozen=True, kw_only=True)
class ParamsChange:
    """A matrix changed its training mode or its rank; model and optimizer agree again when hooks hear of it."""

    name: str
    """Parameter name without the trailing `.weight`, for example h.0.attn.c_q."""
    kind: str
    """to_lowrank, to_full or rank."""
    r_old: int | None
    r_new: int | None
    reason: str
    diagnostics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something a person should know."""

    level: str
    """CRITICAL, WARNING or INFO."""
    rule: str
    """Short name of the rule that fired."""
    message: str
    """One line."""


@dataclass(slots=True)
class TrainState:
    """The state of a run, shared by the loop and its hooks."""

    config: RunConfig
    model: nn.Module
    """The uncompiled module: weights, samples, probes."""
    run: RunDirectory
    world: World
    device: torch.device
    stream: Stream
    tokenizer: Tokenizer
    num_iterations: int
    control: Control = field(default_factory=Control)
    forward: Any = None
    """The module that the loop calls, compiled where asked for; same weights as `model`."""
    optimizer: Any = None
    """torch.optim.Optimizer; None until it was built."""
    step: int = 0
    """Optimizer steps completed (vetoed ones included)."""
    loss: Tensor | None = None
    """Mean loss of the last step's tokens on this rank, on the device, in nats."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Newest value of every logged metric."""
    substitutes: dict[str, tuple[nn.Parameter, ...]] = field(default_factory=dict)
    """Model parameter name -> parameters that the optimizer trains in its place."""
    num_lowrank: int = 0
    """Matrices that are trained in part only, in whatever way."""
    resumed_from: int | None = None
    """Step of the checkpoint this process started from."""
    run_seconds: float = 0.0
    """Time spent in training steps, all restarts together."""
    stop_reason: str = ""
    engine: Any = None
    """The HookEngine; hooks publish through `log`, `alert` and `params_changed` below."""

    def log(self, kind: str, fields: dict[str, Any]) -> None:
        """Publish a record to every hook; sinks write it."""
        self.engine.log(self, kind, fields)

    def alert(self, level: str, rule: str, message: str) -> None:
        """Publish an alert: level CRITICAL, WARNING or INFO."""
        self.engine.emit("on_alert", self, Alert(level=level, rule=rule, message=message))

    def heed_signals(self) -> None:
        """Between the batches of an evaluation: raise Preempted on every rank once a signal reached one of them."""
        self.engine.agree(self)
        if self.control.ending:
            raise Preempted

    def params_changed(self, change: ParamsChange) -> None:
        """Announce a change of mode or rank, after checking that the optimizer owns exactly what is trained."""
        self.check_optimizer_owns_trainables()
        self.engine.emit("on_params_changed", self, change)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that must be the optimizer's, by name, substitutes in place of what they stand for."""
        trainable: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            stand_ins = self.substitutes.get(name)
            if stand_ins is not None:
                trainable.update({f"{name}.{i}": p for i, p in enumerate(stand_ins)})
            elif parameter.requires_grad:
                trainable[name] = parameter
        return trainable

    def check_optimizer_owns_trainables(self) -> None:
        """Raise RuntimeError unless the optimizer's parameters are exactly the trainable ones.

        A parameter replaced behind the optimizer's back otherwise trains a dead tensor in silence (pytorch#14467).
        """
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        wanted = {id(p): name for name, p in self.trainable_parameters().items()}
        missing = [name for key, name in wanted.items() if key not in owned]
        if missing or len(owned) != len(wanted):
            raise RuntimeError(
                f"optimizer and model disagree: {len(wanted)} trainable parameters, {len(owned)} in the optimizer, "
                f"missing {missing[:3]}"
            )
