"""The diagonal-plus-low-rank delta rule S_t = (diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t v_t^T in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssm_blocks.ops.delta import fold, unfold
from ssm_blocks.ops.inverse import solve_unit_lower


def chunk_dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    S: Tensor,
    chunk: int = 16,
    bounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.dplr_reference` without G, shapes as there.

    With G_t the running sum of g and w_t = S_{t-1}^T b_t: S_t = e^{G_t} S_0 + sum_{j<=t} e^{G_t - G_j} (a_j w_j^T +
    k_j v_j^T), and the w_t solve a unit lower triangular system (after RWKV-7, arXiv:2503.14456). The decay ratios are
    kept as differences per channel, [C, C, K] a chunk, so no decay is too strong; hence the small chunk. bounded: the
    caller promises that log decays sum to at least -80 over a chunk; then matrix products do (see `decayed_scores`).
    """
    parts = chunk_dplr_parts(q, k, v, a, b, log_decay, S, chunk, bounded)
    return parts.o, parts.S


class DPLRParts(NamedTuple):
    """o [B, T, H, V], the last S, S at each chunk's start, reads w [B, H, N, C, V], the part `right` of the right-hand
    sides of their systems that does not depend on S, tokens per chunk.
    """

    o: Tensor
    S: Tensor
    starts: list[Tensor]
    reads: Tensor
    right: Tensor
    chunk: int


def chunk_dplr_parts(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, S: Tensor, chunk: int, bounded: bool
) -> DPLRParts:
    """`chunk_dplr` with what it goes through on the way."""
    length = q.size(1)
    chunk = min(chunk, length)
    q, k, v, a, b, log_decay = (fold(x, chunk) for x in (q, k, v, a, b, log_decay))
    total = log_decay.cumsum(-2)
    before = total - log_decay
    AB, BK = (decayed_scores(b, before, x, total, strict=True, bounded=bounded) for x in (a, k))
    QA, QK = (decayed_scores(q, total, x, total, strict=False, bounded=bounded) for x in (a, k))
    right = BK @ v
    solved = solve_unit_lower(-AB, torch.cat([b * before.exp(), right], -1))
    W, U = solved.split([k.size(-1), v.size(-1)], -1)
    last = (total[..., -1:, :] - total).exp()
    starts, w, S = _carry(a * last, k * last, v, U, W, total[..., -1, :], S)
    o = unfold((q * total.exp()) @ torch.stack(starts, 2) + QA @ w + QK @ v, length)
    return DPLRParts(o, S, starts, w, right, chunk)


def decayed_scores(x: Tensor, later: Tensor, y: Tensor, earlier: Tensor, strict: bool, bounded: bool) -> Tensor:
    """x_t^T diag(exp(later_t - earlier_j)) y_j for j < t (strict) or j <= t, zero elsewhere: [..., C, C].

    Unless bounded, differences per channel are masked before exp: right for every decay, [..., C, C, K] in memory.
    Bounded, both factors are taken relative to the chunk's middle, where float32 holds exp(+-40), and multiplied.
    """
    size = x.size(-2)
    hidden = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(0 if strict else 1)
    if bounded:
        middle = earlier[..., size // 2, :].unsqueeze(-2).detach()  # cancels: no gradient
        scores = (x * (later - middle).exp()) @ (y * (middle - earlier).exp()).mT
        return scores.masked_fill(hidden, 0.0)
    difference = later.unsqueeze(-2) - earlier.unsqueeze(-3)
    ratios = difference.masked_fill(hidden.unsqueeze(-1), float("-inf")).exp()
    return torch.einsum("...tk,...tjk,...jk->...tj", x, ratios, y)


def _carry(
    a: Tensor, k: Tensor, v: Tensor, U: Tensor, W: Tensor, chunk_decay: Tensor, S: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """State at the start of every chunk, all w_t = S_{t-1}^T b_t, and the last state."""
    starts, ws = [], []
    for n in range(k.size(2)):
        starts.append(S)
        w = U[:, :, n] + W[:, :, n] @ S
        S = chunk_decay[:, :, n].exp().unsqueeze(-1) * S + a[:, :, n].mT @ w + k[:, :, n].mT @ v[:, :, n]
        ws.append(w)
    return starts, torch.stack(ws, 2), S
