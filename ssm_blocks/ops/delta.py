"""The delta rule in chunks: all chunks in one batched pass, only the state runs from chunk to chunk.

With log decays g and G_t = sum_{s <= t} g_s inside a chunk, the pseudo-values u_t of S_t = exp(g_t) S_{t-1} + k_t u_t^T
solve (I + tril(diag(beta) K K^T * exp(G_t - G_j), -1)) U = diag(beta) (V - exp(G) K S_0): the UT transform
(arXiv:2406.06484, with decays arXiv:2412.06464). Differences of G are masked before exp, where they would overflow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssm_blocks.ops.inverse import invert_unit_lower, solve_unit_lower


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    S: Tensor,
    chunk: int = 64,
    inverse: str = "solve",
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.delta_rule_reference`, shapes as there.

    inverse: how a chunk's triangular system is solved, see `inverse.invert_unit_lower`.
    """
    parts = chunk_delta_parts(q, k, v, beta, log_decay, S, chunk, inverse)
    return parts.o, parts.S


class DeltaParts(NamedTuple):
    """o [B, T, H, V], the last S, S at each chunk's start, pseudo-values [B, H, N, C, V], tokens per chunk."""

    o: Tensor
    S: Tensor
    starts: list[Tensor]
    news: Tensor
    chunk: int


def chunk_delta_parts(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, S: Tensor, chunk: int, inverse: str
) -> DeltaParts:
    """`chunk_delta_rule` with what it goes through on the way."""
    length = q.size(1)
    chunk = min(chunk, length)
    if log_decay is None:
        log_decay = torch.zeros_like(beta)
    q, k, v, beta, log_decay = (fold(x, chunk) for x in (q, k, v, beta, log_decay))
    total, decay = decay_matrix(log_decay)
    W, U = _pseudo_values(k, v, beta, total, decay, inverse)
    starts, news, S = _carry(k * (total[..., -1:] - total).exp().unsqueeze(-1), U, W, total[..., -1], S)
    scores = (q @ k.mT * decay) @ news
    o = unfold(total.exp().unsqueeze(-1) * (q @ torch.stack(starts, 2)) + scores, length)
    return DeltaParts(o, S, starts, news, chunk)


def chunk_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.linear_attention_reference`, shapes as there."""
    length = q.size(1)
    q, k, v, log_decay = (fold(x, min(chunk, length)) for x in (q, k, v, log_decay))
    total, decay = decay_matrix(log_decay)
    starts, _, S = _carry(k * (total[..., -1:] - total).exp().unsqueeze(-1), v, None, total[..., -1], S)
    o = total.exp().unsqueeze(-1) * (q @ torch.stack(starts, 2)) + (q @ k.mT * decay) @ v
    return unfold(o, length), S


def fold(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, T / chunk, chunk, ...], padded with zeros, which change no state."""
    missing = -x.size(1) % chunk
    if missing:
        x = torch.cat([x, x.new_zeros(x.size(0), missing, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, chunk)).movedim(3, 1)


def unfold(x: Tensor, length: int) -> Tensor:
    """The way back: [B, H, N, C, D] -> [B, length, H, D]."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


def decay_matrix(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums G [..., C] of log decays, and exp(G_t - G_j) for j <= t, zero above: [..., C, C]."""
    total = log_decay.cumsum(-1)
    difference = total.unsqueeze(-1) - total.unsqueeze(-2)
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=total.device).triu(1)
    return total, difference.masked_fill(later, float("-inf")).exp()


def _pseudo_values(
    k: Tensor, v: Tensor, beta: Tensor, total: Tensor, decay: Tensor, inverse: str
) -> tuple[Tensor, Tensor]:
    """W = T exp(G) K and U = T V with T the chunk's triangular inverse times diag(beta); the u_t are U - W S_0."""
    scaled = beta.unsqueeze(-1) * k
    L = (scaled @ k.mT * decay).tril(-1)
    right = torch.cat([total.exp().unsqueeze(-1) * scaled, beta.unsqueeze(-1) * v], -1)
    solved = solve_unit_lower(L, right) if inverse == "solve" else invert_unit_lower(L, inverse) @ right
    W, U = solved.split([k.size(-1), v.size(-1)], -1)
    return W, U


def _carry(
    k: Tensor, U: Tensor, W: Tensor | None, chunk_decay: Tensor, S: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The state at the start of every chunk [B, H, K, V], all pseudo-values [B, H, N, C, V], and the last state."""
    starts, news = [], []
    for n in range(k.size(2)):
        starts.append(S)
        new = U[:, :, n] if W is None else U[:, :, n] - W[:, :, n] @ S
        S = chunk_decay[:, :, n, None, None].exp() * S + k[:, :, n].mT @ new
        news.append(new)
    return starts, torch.stack(news, 2), S
