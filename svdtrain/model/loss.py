"""Soft-capped cross entropy: the whole logits at once, or in chunks that never exist together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOFT_CAP = 15.0
IGNORE_INDEX = -1
CACHED_ROWS = 128  # rows of logits that a CPU core's cache holds between the elementwise passes


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


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the loss over rows; gradients are computed chunk by chunk in the forward pass and scaled in the backward.

    Holds [chunk, V] instead of [N, V] at a time, with as many matrix products as the plain loss (Liger kernels,
    arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int) -> Tensor:
        cast = weight.to(x.dtype)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for first in range(0, x.size(0), chunk):
            rows = slice(first, first + chunk)
            loss, dlogits = _loss_and_gradient(x[rows] @ cast.mT, targets[rows], vocab_size)
            total += loss
            dx[rows] = dlogits @ cast
            _accumulate(dweight, dlogits, x[rows])
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        (grad,) = grad_outputs
        return dx * grad.to(dx.dtype), dweight * grad.to(dweight.dtype), None, None, None


def _accumulate(dweight: Tensor, dlogits: Tensor, x: Tensor) -> None:
    if dlogits.dtype == dweight.dtype:
        dweight.addmm_(dlogits.mT, x)
    else:  # a product in bf16, summed over the chunks in fp32
        dweight += dlogits.mT @ x


def _loss_and_gradient(raw: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed loss of raw, padded logits [N, V_padded] and its gradient by them, in their type; may overwrite raw."""
    if raw.device.type == "cpu" and raw.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        losses = [
            _in_place(raw[first : first + CACHED_ROWS], targets[first : first + CACHED_ROWS], vocab_size)
            for first in range(0, raw.size(0), CACHED_ROWS)
        ]
        return torch.stack(losses).sum(), raw
    kept = (targets != IGNORE_INDEX).unsqueeze(-1)
    safe = targets.clamp_min(0).unsqueeze(-1)
    capped = soft_cap(raw[:, :vocab_size])
    log_z = capped.logsumexp(-1, keepdim=True)
    loss = ((log_z - capped.gather(-1, safe)) * kept).sum()
    columns = torch.arange(vocab_size, device=raw.device)
    gradient = (capped - log_z).exp() - (columns == safe).to(capped.dtype)
    gradient = gradient * (1 - (capped / SOFT_CAP).square()) * kept  # d tanh
    return loss, F.pad(gradient.to(raw.dtype), (0, raw.size(1) - vocab_size))


def _in_place(raw: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The same for rows that stay in the cache, in place: raw [rows, V_padded] becomes the gradient; returns the loss.

    The cap bounds every score by 15, so the exponentials need no shift by the maximum.
    """
    kept = (targets != IGNORE_INDEX).to(raw.dtype).unsqueeze(-1)
    safe = targets.clamp_min(0).unsqueeze(-1)
    raw[:, vocab_size:] = 0
    t = raw[:, :vocab_size].mul_(1 / SOFT_CAP).tanh_()
    at_target = t.gather(-1, safe)
    p = (t * SOFT_CAP).exp_()
    z = p.sum(-1, keepdim=True)
    p.mul_(kept / z).scatter_add_(-1, safe, -kept)
    torch.addcmul(p, p, t.square_(), value=-1, out=t)  # times the derivative of the cap, 1 - t^2
    return ((z.log() - SOFT_CAP * at_target) * kept).sum()
