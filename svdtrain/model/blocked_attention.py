"""Sliding-window attention for CPUs: blocks of queries against just the keys they see, as plain matrix products.

torch's fused CPU kernel computes masked scores and throws them away; this one skips them. The probabilities are kept
for the backward pass, so memory grows with length x window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from svdtrain.model.attention_masks import remembered, window_mask

BLOCK = 128


@remembered
def _bias(rows: int, columns: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Additive mask [rows, columns] of a block of queries over the keys up to their own: 0 or -inf."""
    visible = window_mask(rows, columns, window, device)
    return torch.zeros(rows, columns, device=device, dtype=dtype).masked_fill_(~visible, float("-inf"))


class BlockedAttention(torch.autograd.Function):
    """q, k, v [N, T, D] -> softmax(scale q k^T, causal, window) v [N, T, D]; N counts batch x heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        y = torch.empty_like(q)
        probabilities = []
        for rows, columns in blocks(q.size(1), window):
            bias = _bias(rows.stop - rows.start, columns.stop - columns.start, window, q.device, q.dtype)
            scores = torch.baddbmm(bias, q[:, rows], k[:, columns].mT, alpha=scale)
            probabilities.append(torch.softmax(scores, dim=-1))
            torch.bmm(probabilities[-1], v[:, columns], out=y[:, rows])
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.window, ctx.scale = window, scale
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        (dy,) = grad_outputs
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for P, (rows, columns) in zip(probabilities, blocks(q.size(1), ctx.window), strict=True):
            dv[:, columns].baddbmm_(P.mT, dy[:, rows])
            dP = torch.bmm(dy[:, rows], v[:, columns].mT)
            dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
            torch.baddbmm(dq[:, rows], dS, k[:, columns], beta=0, alpha=ctx.scale, out=dq[:, rows])
            dk[:, columns].baddbmm_(dS.mT, q[:, rows], alpha=ctx.scale)
        return dq, dk, dv, None, None


def blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Rows of each block of queries and the columns of all keys they see."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        yield slice(start, stop), slice(max(0, start - window), stop)
