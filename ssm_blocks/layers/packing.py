"""Several sequences in one row: unpacked into a padded batch, so that every mixer handles them alike."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16)  # of a sign: differences are taken


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where N sequences lie in a row of T tokens. index, mask [N, T_max], lengths [N]."""

    index: Tensor
    mask: Tensor
    lengths: Tensor

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, x: Tensor) -> Packing:
        """Boundaries [N + 1] of the sequences in x [1, T, D]. Raises ValueError where they do not fit."""
        _check(cu_seqlens, x)
        bounds = cu_seqlens.to(x.device, torch.long)
        lengths = bounds.diff()
        place = torch.arange(int(lengths.max()), device=x.device)
        mask = place < lengths.unsqueeze(1)
        return cls(index=torch.where(mask, bounds[:-1, None] + place, 0), mask=mask, lengths=lengths)

    def pad(self, x: Tensor) -> Tensor:
        """[1, T, D] -> [N, T_max, D], zeros behind the end of a sequence."""
        return x[0][self.index] * self.mask.unsqueeze(-1)

    def unpad(self, y: Tensor) -> Tensor:
        """[N, T_max, D] -> [1, T, D]."""
        return y[self.mask].unsqueeze(0)


def _check(cu_seqlens: Tensor, x: Tensor) -> None:
    if x.size(0) != 1:
        raise ValueError(f"with cu_seqlens the batch is one packed row [1, T, D], got {list(x.shape)}")
    integers = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in INTEGERS
    if not integers or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            "cu_seqlens is a 1-D tensor [N + 1] of int64, int32 or int16: the boundaries between N sequences"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != x.size(1):
        raise ValueError(f"cu_seqlens runs from 0 to the row's length {x.size(1)}, got {bounds[0]} to {bounds[-1]}")
    if any(later <= earlier for earlier, later in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise strictly (no empty sequences), got {bounds}")
