"""Whether all ranks hold the same weights. nanochat gathers them itself after a step that each rank took in part."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """One int64 per tensor [n]: the sum of its values read as integers, the same in any order of summation."""
    sums = [t.detach().contiguous().view(_BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors.values()]
    return torch.stack(sums)


def differing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit for bit equal on all ranks. Every rank must call this; all get one answer.
    Empty without several ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return []
    low = checksums(tensors)
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return [name for name, same in zip(tensors, (low == high).tolist(), strict=True) if not same]
