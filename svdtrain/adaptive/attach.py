"""One line in anybody's training loop: `svd = svdtrain.attach(model, optimizer)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from svdtrain.adaptive.controller import AdaptiveSVD, Change
from svdtrain.adaptive.registration import Adapter
from svdtrain.config import SVDConfig


class AttachedSVD(AdaptiveSVD):
    """An AdaptiveSVD that runs from the optimizer's own step hooks and counts steps itself."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: SVDConfig | None = None,
        *,
        adapter: Adapter | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """See `attach`."""
        super().__init__(model, optimizer, config, adapter=adapter, log=log)
        self.step = 0
        self.changes: list[Change] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.project_gradients()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.changes += self.after_step(self.step)
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
) -> AttachedSVD:
    """Watch and adapt the matrices of `model` from now on; nothing else in the loop changes.

    Gradients are read when `optimizer.step()` is called, so accumulation and clipping before it are seen. Raises what
    AdaptiveSVD raises.
    """
    return AttachedSVD(model, optimizer, config, log=log)
