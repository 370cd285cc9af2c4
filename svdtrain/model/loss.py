"""Soft-capped cross entropy: the whole logits at once, or in chunks that never exist together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOFT_CAP = 15.0
IGNORE_INDEX = -1


def soft_cap(logits: Tensor) -> Tensor:
    """15 tanh(logits / 15), in fp32 (fp64 stays): bounded scores (Gemma 2, arXiv:2408.00118)."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return SOFT_CAP * torch.tanh(logits / SOFT_CAP)


def soft_cap_cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of soft-capped logits [..., V] against targets [...]; targets of -1 do not count.

    reduction: mean, sum, or none (a flat vector, one entry per target, 0 where ignored).
    """
    flat = soft_cap(logits).reshape(-1, logits.size(-1))
    return F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORE_INDEX, reduction=reduction)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the loss over rows; gradients are computed chunk by chunk in the forward pass and scaled in the backward.

    Holds [chunk, V] instead of [N, V] at a time; same number of matrix products as the plain loss (Liger kernels,
    arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int) -> Tensor:
        cast = weight.to(x.dtype)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for rows in range(0, x.size(0), chunk):
            part = slice(rows, rows + chunk)
            loss, dlogits = _loss_and_gradient((x[part] @ cast.mT), targets[part], vocab_size)
            total += loss
            dx[part] = dlogits @ cast
            dweight += dlogits.mT @ x[part]
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        (grad,) = grad_outputs
        return dx * grad.to(dx.dtype), dweight * grad, None, None, None


def _loss_and_gradient(raw: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient by the raw, padded logits [N, V_padded], in their type."""
    kept = (targets != IGNORE_INDEX).unsqueeze(-1)
    safe = targets.clamp_min(0).unsqueeze(-1)
    capped = soft_cap(raw[:, :vocab_size])
    log_z = capped.logsumexp(-1, keepdim=True)
    loss = ((log_z - capped.gather(-1, safe)) * kept).sum()
    columns = torch.arange(vocab_size, device=raw.device)
    gradient = (capped - log_z).exp() - (columns == safe).to(capped.dtype)
    gradient = gradient * (1 - (capped / SOFT_CAP).square()) * kept  # d tanh
    return loss, F.pad(gradient.to(raw.dtype), (0, raw.size(1) - vocab_size))


def chunked_head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, reduction: str = "mean"
) -> Tensor:
    """`soft_cap_cross_entropy(x @ weight.T)` for x [N, D], weight [V_padded, D], targets [N], in chunks of rows.

    reduction: mean or sum. Raises ValueError for another one: a loss per token needs a gradient per token.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"the chunked loss knows the reductions mean and sum, not {reduction!r}")
    total = _ChunkedLoss.apply(x, weight, targets, vocab_size, chunk)
    assert isinstance(total, Tensor)
    return total if reduction == "sum" else total / (targets != IGNORE_INDEX).sum()
