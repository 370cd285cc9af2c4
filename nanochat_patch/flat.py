"""Many small parameters as one vector, for a host whose AdamW is particular about shapes.

AdamW works element by element, so it does the same to a vector as to its pieces. nanochat compiles its AdamW for each
shape and gives up at the ninth, which four more shapes of a mixer reach; and on several GPUs it deals out the first
dimension, which the number of ranks must divide. A vector is one more shape, and its length is made to fit.
"""

# pyright: reportPrivateImportUsage=false
# (the torch._foreach functions are private by name only: torch's own optimizers are built on them)
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FlatParameters:
    """`vector` stands for the parameters in the host's optimizer; hooks copy to it before each step and back after.

    Parameters keep their own storage, so whatever loads or saves the model sees nothing of this.
    Raises ValueError for parameters that are not real numbers of one type, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], num_ranks: int = 1) -> None:
        _check_types(parameters)
        self._parameters: list[Tensor] = list(parameters.values())
        first = self._parameters[0]
        sizes = [p.numel() for p in self._parameters]
        padding = math.ceil(sum(sizes) / num_ranks) * num_ranks - sum(sizes)
        self._sizes = [*sizes, padding]
        self.vector = nn.Parameter(torch.zeros(sum(self._sizes), dtype=first.dtype, device=first.device))

    def add_to(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
        """A group of the optimizer with these settings holds the vector from now on."""
        optimizer.add_param_group({**group, "params": [self.vector]})
        optimizer.register_step_pre_hook(self._gather)
        optimizer.register_step_post_hook(self._scatter)

    @torch.no_grad()
    def _gather(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        torch._foreach_copy_(self._pieces(self.vector.data), self._parameters)
        gradient = torch.zeros_like(self.vector)
        with_gradient = [
            (piece, p.grad)
            for piece, p in zip(self._pieces(gradient), self._parameters, strict=True)
            if p.grad is not None
        ]
        if with_gradient:
            pieces, gradients = zip(*with_gradient, strict=True)
            torch._foreach_copy_(list(pieces), list(gradients))
        self.vector.grad = gradient

    @torch.no_grad()
    def _scatter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        torch._foreach_copy_(self._parameters, self._pieces(self.vector.data))
        self.vector.grad = None  # the host clears the gradients of the model's parameters only

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        """Views of the vector in the parameters' shapes."""
        pieces = vector.split(self._sizes)[:-1]
        return [piece.view(p.shape) for piece, p in zip(pieces, self._parameters, strict=True)]


def _check_types(parameters: Mapping[str, nn.Parameter]) -> None:
    first_name, first = next(iter(parameters.items()))
    for name, p in parameters.items():
        if not p.is_floating_point() or p.dtype != first.dtype:
            raise ValueError(
                f"{name} is {p.dtype} and {first_name} {first.dtype}: the parameters of a mixer that are no matrices "
                "must be real numbers of one type here"
            )
