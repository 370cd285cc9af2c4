"""Parameters that FSDP2 has sharded (DTensor), seen as whole matrices.

Everything here needs W and its gradient whole. So each watched matrix has a whole copy on every rank, a plain parameter
that the controller takes for W: gradient and weight are gathered once a step, and what the controller writes goes back
into the shards without a message. The price is the memory of the watched matrices and two gathers of them a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(p: Tensor) -> bool:
    """Whether this is a DTensor (asked without importing it, which takes a while)."""
    return hasattr(p, "full_tensor")


def whole(value: Any) -> Any:
    """A DTensor gathered (every rank calls this), everything else as it is."""
    return value.full_tensor() if isinstance(value, Tensor) and is_sharded(value) else value  # type: ignore[attr-defined]


def refuse_sharded(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters themselves. Raises ValueError if one of them is sharded."""
    name = next((name for name, p in parameters.items() if is_sharded(p)), None)
    if name is not None:
        raise ValueError(f"{name} is sharded (DTensor): use svdtrain.attach, which gathers what it needs")
    return parameters


class ShardedWeights:
    """Whole copies of sharded parameters; `copies` by name. Every rank makes the same calls."""

    def __init__(self, sharded: Mapping[str, nn.Parameter]) -> None:
        self.sharded = dict(sharded)
        self.copies = {name: nn.Parameter(whole(p.detach()).clone()) for name, p in sharded.items()}
        self._versions: dict[str, int] = {}

    @property
    def stale(self) -> bool:
        """Whether the weights may have been written (a checkpoint loaded) since they were read. Counted are writes to
        the DTensor, which every rank makes, and not those to the shard alone or through `.data`."""
        return self._versions != self._counts()

    def _counts(self) -> dict[str, int]:
        return {name: p._version for name, p in self.sharded.items()}

    def forget(self) -> None:
        """The copies have become those of another run."""
        self._versions = {}

    @torch.no_grad()
    def read_weights(self) -> None:
        """The copies become the weights of now."""
        for name, p in self.sharded.items():
            self.copies[name].copy_(whole(p.detach()))
        self._versions = self._counts()

    @torch.no_grad()
    def read_gradients(self) -> None:
        """Before a step: the averaged gradients, whole."""
        for name, p in self.sharded.items():
            self.copies[name].grad = None if p.grad is None else whole(p.grad)

    def drop_gradients(self) -> None:
        for copy in self.copies.values():
            copy.grad = None

    @torch.no_grad()
    def write(self, names: Iterable[str]) -> None:
        """The weights of these become what the copies hold."""
        from torch.distributed.tensor import DTensor, Replicate

        for name in names:
            p: Any = self.sharded[name]
            mesh = p.device_mesh
            copy = DTensor.from_local(self.copies[name].detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
            p.to_local().copy_(copy.redistribute(placements=p.placements).to_local())
        self._versions = self._counts()
