"""The ranks of a run: who we are, averaged gradients, agreement on decisions. All no-ops for one process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

COLLECTIVE_TIMEOUT_S = 600


@dataclass(frozen=True)
class World:
    """This process among the others. `control_group` is a CPU (gloo) group for bookkeeping."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control_group: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_world(device_type: str) -> World:
    """Join the process group that torchrun or srun announced in the environment; a world of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    backend = "nccl" if device_type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
    control_group = dist.new_group(backend="gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), control_group)


def close_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient by its mean over ranks, in one flat message per dtype. Gradients must be dense."""
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for same in by_dtype.values():
        flat = torch.cat([g.reshape(-1) for g in same])
        dist.all_reduce(flat)
        flat /= world.size
        pieces = flat.split([g.numel() for g in same])
        for gradient, piece in zip(same, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def agree_any(flags: Sequence[bool], world: World) -> list[bool]:
    """For each flag, whether any rank raised it: one small all-reduce on the CPU."""
    if world.size == 1:
        return list(flags)
    votes = torch.tensor([float(flag) for flag in flags])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=world.control_group)
    return [bool(vote) for vote in votes]


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Sum of a small float64 CPU tensor over ranks; the input itself for one process."""
    if world.size > 1:
        dist.all_reduce(values, group=world.control_group)
    return values


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier(group=world.control_group)
