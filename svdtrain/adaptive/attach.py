"""One line in anybody's training loop: `svd = svdtrain.attach(model, optimizer)`."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from svdtrain.adaptive import products
from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.adaptive.interference import Interference, Reading, ReferenceLoss
from svdtrain.adaptive.registration import Adapter, Reregister
from svdtrain.adaptive.shadow import Shadow
from svdtrain.adaptive.sharded import ShardedWeights, is_sharded
from svdtrain.adaptive.target import Change
from svdtrain.config import SVDConfig

_FRAMES_TO_SCALER = 12


class AttachedSVD(AdaptiveSVD):
    """An AdaptiveSVD that runs from the optimizer's own step hooks and counts steps itself.

    `step` is the number of steps seen; `changes` lists every change so far. A step that a GradScaler leaves out calls
    no hook and counts for nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: SVDConfig | None = None,
        *,
        adapter: Adapter | None = None,
        log: Callable[[str], None] | None = None,
        average_gradients: bool = False,
        reference_loss: ReferenceLoss | None = None,
    ) -> None:
        """See `attach`."""
        self._shards: ShardedWeights | None = None
        self._average_gradients = average_gradients
        super().__init__(model, optimizer, config, adapter=adapter, log=log)
        if self._shards is not None and (average_gradients or reference_loss is not None):
            raise ValueError("average_gradients and reference_loss do not work with sharded (FSDP2) parameters")
        watched = {name: target.W for name, target in self.targets.items()}
        self.interference: Interference | None = None
        self.reading: Reading | None = None
        """The newest measurement."""
        if reference_loss is not None:
            self.interference = Interference(watched, reference_loss, average=_mean_over_ranks)
        self.step = 0
        self.changes: list[Change] = []
        self._step_frame: FrameType | None = None
        """Who called the first pre hook, until the first post hook: where a step calls its parent class's, both fire
        twice; and after a step that ended in an exception the frame is on nobody's stack."""
        self._zero_grad = optimizer.zero_grad
        if not self._adapter.host_clears_gradients:
            self._zero_grad = self._clearing(optimizer.zero_grad)
            optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        # An average of weights must see the merged W, and what one writes to W must come after the merge, where it is
        # seen: before the post hooks that are there already.
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            register_first_post_hook(optimizer, self._after_step),
        ]

    def _default_adapter(self, optimizer: torch.optim.Optimizer, targets: Mapping[str, nn.Parameter]) -> Adapter:
        if self._shards is not None:
            return Shadow(optimizer, targets, self.config.svd_moments, self._shards.sharded)
        if self.config.svd_adapter == "reregister":
            return Reregister(optimizer, targets, self.config.svd_moments)
        return Shadow(optimizer, targets, self.config.svd_moments, everywhere=self._everywhere)

    def _everywhere(self, holds: list[bool]) -> list[bool]:
        """Asks the other ranks where the host does the work between them; a host that has done it before the step has
        equal state everywhere."""
        if not self._average_gradients:
            return holds
        return (_mean_over_ranks(torch.tensor(holds, dtype=torch.float32, device="cpu")) == 1).tolist()

    def _take(self, found: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Whole copies stand for parameters that FSDP2 has sharded."""
        if not any(is_sharded(p) for p in found.values()):
            return found
        if self.config.svd_adapter == "reregister":
            raise ValueError("svd_adapter=reregister does not work with sharded (FSDP2) parameters; use shadow")
        self._shards = ShardedWeights(found)
        return self._shards.copies

    def set_mode(self, name: str, r: int | None) -> None:
        """See `AdaptiveSVD.set_mode`."""
        self._refuse_detached()
        if self._shards is not None:
            self._shards.read_weights()
        super().set_mode(name, r)
        products.note_checksums(self._factors())

    def _clearing(self, zero_grad: Callable[..., None]) -> Callable[..., None]:
        """`optimizer.zero_grad` that also reaches each W that is not in the optimizer: a loop that leaves a bad step
        out and clears would otherwise add that gradient to its next one."""

        @functools.wraps(zero_grad)
        def clear(set_to_none: bool = True) -> None:
            zero_grad(set_to_none)
            self.clear_gradients()

        return clear

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._factors() and not self._adapter.host_clears_gradients and _inside_grad_scaler():
            raise RuntimeError(
                "svd_adapter=reregister takes matrices out of the optimizer, where a GradScaler does not unscale "
                "their gradients; use svd_adapter=shadow (the default of attach)"
            )
        if not _is_running(self._step_frame):
            self._step_frame = sys._getframe(1)
            self._begin_step()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if not callable(closure):  # some optimizers take something else there
            self._project(optimizer)
            return None
        # The closure runs the backward pass inside the step (Lightning does this): project after it.
        wrapped = self._projecting(optimizer, closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _begin_step(self) -> None:
        """Once a step, before the host has moved anything."""
        if self._shards is not None and self._shards.stale:
            self._shards.read_weights()
        # A GPU is not waited for but where there is a decision, which looks at its numbers anyway.
        self.keep_foreign_writes(wait=self.step % self.config.svd_interval == 0)
        self._keep_weights()

    def _projecting(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_then_project() -> Any:
            result = closure()
            self._project(optimizer)
            return result

        return closure_then_project

    def _project(self, optimizer: torch.optim.Optimizer) -> None:
        for name, target in self.targets.items():
            if target.W.grad is not None and target.W.grad.is_sparse:
                raise ValueError(f"{name} has sparse gradients, which have no spectrum; leave it out of svd_targets")
        if self._average_gradients and dist.is_initialized():
            self._average()
        if self._shards is not None:
            self._shards.read_gradients()
        products.project_gradients(self._factors())
        self._adapter.before_step()
        # Set by a GradScaler for the length of a fused step, which divides by it inside its kernel.
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            for factors in self._factors():
                for p in (factors.B, factors.A):
                    if p.grad is not None:
                        p.grad.div_(scale.to(p.grad.device))

    def _average(self) -> None:
        """Average W.grad over the ranks, in place, where it is needed in this step: the host does it only later, and
        averaging what is already equal changes nothing."""
        analysed = self.gradients_agree(self.step)
        wanted = [target.W.grad for target in self.targets.values() if analysed or target.lowrank]
        gradients = [grad for grad in wanted if grad is not None]
        for exchange in [dist.all_reduce(grad, async_op=True) for grad in gradients]:
            assert exchange is not None
            exchange.wait()
        if gradients:
            torch._foreach_div_(gradients, dist.get_world_size())

    def gradients_agree(self, step: int) -> bool:
        """At every step; with `average_gradients` only at the steps from which something is decided: the step before a
        decision with the tracked engine, the step itself with the exact one."""
        if not (self._average_gradients and dist.is_initialized()):
            return True
        interval = self.config.svd_interval
        if self._monitor is None:
            return step % interval == 0
        return interval - step % interval <= self.config.svd_monitor_every  # steps until the next decision

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._step_frame is None:
            return
        self._step_frame = None
        found_inf = getattr(optimizer, "found_inf", None)  # of a fused step, as above
        stepped = found_inf is None or not bool(found_inf)
        if self._shards is not None:
            self._shards.read_weights()
        in_part = [target.name for target in self.targets.values() if target.lowrank]
        self.changes += self.after_step(self.step, stepped)
        products.note_checksums(self._factors())
        if self._shards is not None:
            self._shards.write(in_part)
            self._shards.drop_gradients()
        self.step += 1
        every = self.config.svd_interference_every
        if self.interference is not None and every and stepped and self.step % every == 0:
            self._measure_interference(self.interference)

    def _measure_interference(self, interference: Interference) -> None:
        """After `step` steps, so that the analysis of step number `step`, the next one, knows it."""
        self.reading = interference.measure()
        if not math.isnan(self.reading.total):
            self.note_interference(self.reading.nats)
        interference.advance()

    def metrics(self) -> dict[str, float]:
        """As AdaptiveSVD's, with the newest interference."""
        return {**super().metrics(), **(self.reading.metrics() if self.reading is not None else {})}

    def state_dict(self) -> dict[str, Any]:
        """As AdaptiveSVD's, with the step counter."""
        state = {**super().state_dict(), "step": self.step}
        return state if self.interference is None else {**state, "interference_window": self.interference.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `AdaptiveSVD.load_state_dict`."""
        self._refuse_detached()
        if "step" not in state:
            raise ValueError("this state was saved by a trainer and not by svdtrain.attach: it has no count of steps")
        super().load_state_dict(state)
        if self._shards is not None:
            self._shards.forget()
        self.step = state["step"]
        if self.interference is not None and "interference_window" in state:
            self.interference.load_state_dict(state["interference_window"])

    def detach(self) -> None:
        """Back to plain training; the hooks are gone."""
        if not self._handles:
            return
        super().detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if vars(self._optimizer).get("zero_grad") is self._zero_grad:
            del self._optimizer.zero_grad  # what the class has is there again

    def _refuse_detached(self) -> None:
        if not self._handles:
            raise ValueError("this AttachedSVD is detached and sees no step any more; attach a new one")


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: SVDConfig | None = None,
    *,
    log: Callable[[str], None] | None = None,
    average_gradients: bool = False,
    reference_loss: ReferenceLoss | None = None,
) -> AttachedSVD:
    """Watch and adapt the matrices of `model` from now on; nothing else in the loop changes.

    Gradients are read when `optimizer.step()` is called, so accumulation, clipping, unscaling and averaging before it
    are seen. Pre-step hooks of your own that change gradients belong before this call: hooks run in their order, and
    what comes later reaches W alone, not B and A. Post-step hooks, registered before or after, see the merged weights.
    `config.svd_adapter` auto means shadow: the host's groups, state and checkpoints stay as they are. With reregister,
    clipping must go over `model.parameters()`: those of the optimizer have no gradients yet. What others write to a
    low-rank matrix between two steps stays, with a warning; through `p.data` on a GPU only before the steps that
    decide, and in FSDP2's shards not at all. To resume, call `load_state_dict` on the result before training goes on.
    `average_gradients`: for data-parallel hosts whose optimizer averages gradients inside its own step, so that each
    rank holds its own before it. Parameters that FSDP2 has sharded (DTensor) work with the shadow adapter; each
    watched one is then also held whole on every rank.

    `reference_loss` runs a forward on a fixed batch of first-seen data and returns its mean loss: every
    `svd_interference_every` steps the interference of each matrix with it is measured (one backward pass, p.grad stays
    as it is), the policy is told, and `reading` and `metrics()` have it. Give it the plain module, not a
    DistributedDataParallel wrapper, which would wait for gradients that are never averaged. Raises what AdaptiveSVD
    raises.
    """
    return AttachedSVD(
        model,
        _innermost(optimizer),
        config,
        log=log,
        average_gradients=average_gradients,
        reference_loss=reference_loss,
    )


def register_first_post_hook(optimizer: torch.optim.Optimizer, hook: Callable[..., None]) -> RemovableHandle:
    """A step post hook that is called before those that are registered already."""
    handle = optimizer.register_step_post_hook(hook)
    hooks = handle.hooks_dict_ref()
    assert hooks is not None
    hooks.move_to_end(handle.id, last=False)
    return handle


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What accelerate and Lightning have wrapped: the wrapper has the same groups, but its step calls no hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _is_running(wanted: FrameType | None) -> bool:
    """Whether this frame is on the stack."""
    frame = sys._getframe(1) if wanted is not None else None
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def _mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a small CPU tensor over all ranks, where there are any; on the GPU for NCCL."""
    if not dist.is_initialized():
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = values.to(device)
    dist.all_reduce(total)
    return total.cpu() / dist.get_world_size()


def _inside_grad_scaler() -> bool:
    """Whether a GradScaler is calling `optimizer.step`; the optimizer itself is not told unless it is fused."""
    frame = sys._getframe(1)
    for _ in range(_FRAMES_TO_SCALER):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").endswith("amp.grad_scaler"):
            return True
        frame = frame.f_back
    return False
