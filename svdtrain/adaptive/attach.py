"""One line in anybody's training loop: `svd = svdtrain.attach(model, optimizer)`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.adaptive.registration import Adapter, Reregister
from svdtrain.adaptive.shadow import Shadow
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
    ) -> None:
        """See `attach`."""
        super().__init__(model, optimizer, config, adapter=adapter, log=log)
        self._average_gradients = average_gradients
        self.step = 0
        self.changes: list[Change] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _default_adapter(self, optimizer: torch.optim.Optimizer, targets: Mapping[str, nn.Parameter]) -> Adapter:
        kind = Reregister if self.config.svd_adapter == "reregister" else Shadow
        return kind(optimizer, targets, self.config.svd_moments)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._factors() and not self._adapter.host_clears_gradients and _inside_grad_scaler():
            raise RuntimeError(
                "svd_adapter=reregister takes matrices out of the optimizer, where a GradScaler does not unscale "
                "their gradients; use svd_adapter=shadow (the default of attach)"
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._project(optimizer)
            return None
        # The closure runs the backward pass inside the step (Lightning does this): project after it.
        wrapped = self._projecting(optimizer, closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _projecting(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_then_project() -> Any:
            result = closure()
            self._project(optimizer)
            return result

        return closure_then_project

    def _project(self, optimizer: torch.optim.Optimizer) -> None:
        if self._average_gradients and dist.is_initialized():
            self._average()
        self.project_gradients()
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
        for target in self.targets.values():
            if target.W.grad is not None and (analysed or target.lowrank):
                dist.all_reduce(target.W.grad)
                target.W.grad.div_(dist.get_world_size())

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
        found_inf = getattr(optimizer, "found_inf", None)  # of a fused step, as above
        stepped = found_inf is None or not bool(found_inf)
        self.changes += self.after_step(self.step, stepped)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """As AdaptiveSVD's, with the step counter."""
        return {**super().state_dict(), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `AdaptiveSVD.load_state_dict`."""
        super().load_state_dict(state)
        self.step = state["step"]

    def detach(self) -> None:
        """Back to plain training; the hooks are gone."""
        super().detach()
        for handle in self._handles:
            handle.remove()


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: SVDConfig | None = None,
    *,
    log: Callable[[str], None] | None = None,
    average_gradients: bool = False,
) -> AttachedSVD:
    """Watch and adapt the matrices of `model` from now on; nothing else in the loop changes.

    Gradients are read when `optimizer.step()` is called, so accumulation, clipping, unscaling and averaging before it
    are seen. `config.svd_adapter` auto means shadow: the host's groups, state and checkpoints stay as they are. To
    resume, call `load_state_dict` on the result before training goes on. `average_gradients`: for data-parallel hosts
    whose optimizer averages gradients inside its own step, so that each rank holds its own before it. Raises what
    AdaptiveSVD raises.
    """
    return AttachedSVD(model, optimizer, config, log=log, average_gradients=average_gradients)


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
