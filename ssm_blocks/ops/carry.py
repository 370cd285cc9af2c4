"""From chunk to chunk: the states at all chunks' starts, when the chunks' own parts are known.

k [B, H, N, C, K] are keys as the chunk's end sees them, W, U the chunk's pseudo-values (u_t = U - W S at its start),
log_decay [B, H, N] the chunk's, None for none. Starts are [B, H, K, V] each, S the state before the first chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEGMENT = 32  # chunks that one product carries the decayed sums over
FEWEST_GROUPED = 16  # chunks; below, one after the other is as fast on a GPU too


def delta_carry(
    k: Tensor, U: Tensor, W: Tensor, log_decay: Tensor | None, S: Tensor, in_turn: bool
) -> tuple[list[Tensor], Tensor]:
    """(starts, last state) of the delta rule; in_turn: each start must be made of the one before.

    On a GPU many small products one after the other leave it idle, so groups of chunks go at once (`grouped`).
    """
    if in_turn or not k.is_cuda or k.size(2) < FEWEST_GROUPED:
        return one_by_one(k, U, W, log_decay, S)
    return grouped(k, U, W, log_decay, S)


def one_by_one(k: Tensor, U: Tensor, W: Tensor, log_decay: Tensor | None, S: Tensor) -> tuple[list[Tensor], Tensor]:
    """Least work: N steps of two products each."""
    starts = []
    for n in range(k.size(2)):
        starts.append(S)
        kept = S if log_decay is None else log_decay[:, :, n, None, None].exp() * S
        S = kept + k[:, :, n].mT @ (U[:, :, n] - W[:, :, n] @ S)
    return starts, S


def grouped(k: Tensor, U: Tensor, W: Tensor, log_decay: Tensor | None, S: Tensor) -> tuple[list[Tensor], Tensor]:
    """About 2 sqrt(N) steps: chunks as maps S -> A S + b, composed within all groups at once, then across groups.

    Twice the products of `one_by_one`, in far fewer calls.
    """
    num_chunks, keys = k.size(2), k.size(-1)
    identity = torch.eye(keys, dtype=k.dtype, device=k.device)
    kept = identity if log_decay is None else log_decay[..., None, None].exp() * identity
    maps = torch.cat([kept - k.mT @ W, k.mT @ U], -1)  # [B, H, N, K, K + V]: A and b
    size = math.ceil(math.sqrt(num_chunks))
    missing = -num_chunks % size
    if missing:
        nothing = torch.cat([identity, torch.zeros_like(S[0, 0])], -1).expand(*maps.shape[:2], missing, -1, -1)
        maps = torch.cat([maps, nothing], 2)
    maps = maps.unflatten(2, (-1, size))
    inside = _composed(maps)  # each entry [B, H, G, K, K + V]: everything of the group up to there
    first, ends = [], S
    for A, b in zip(inside[-1][..., :keys].unbind(2), inside[-1][..., keys:].unbind(2), strict=True):
        first.append(ends)
        ends = A @ ends + b
    at_group = torch.stack(first, 2)  # [B, H, G, K, V]
    later = [x[..., :keys] @ at_group + x[..., keys:] for x in inside[:-1]]
    starts = torch.stack([at_group, *later], 3).flatten(2, 3)
    return list(starts[:, :, :num_chunks].unbind(2)), ends


def _composed(maps: Tensor) -> list[Tensor]:
    """Running products of maps [B, H, G, M, K, K + V] over M: A_m ... A_1 and what has been added by then."""
    keys = maps.size(-2)
    found = [maps[:, :, :, 0]]
    for m in range(1, maps.size(3)):
        A, b = maps[:, :, :, m].split([keys, maps.size(-1) - keys], -1)
        moved = A @ found[-1]
        found.append(torch.cat([moved[..., :keys], moved[..., keys:] + b], -1))
    return found


def decayed_carry(k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """(starts [B, H, N, K, V], last state) of linear attention: decayed sums of k^T v, 32 chunks in one product."""
    written = k.mT @ v
    starts = []
    for first in range(0, written.size(2), SEGMENT):
        b, total = written[:, :, first : first + SEGMENT], log_decay[:, :, first : first + SEGMENT].cumsum(-1)
        difference = total.unsqueeze(-1) - total.unsqueeze(-2)
        later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=b.device).triu(1)
        ratios = difference.masked_fill(later, float("-inf")).exp()
        sums = (ratios @ b.flatten(-2)).view_as(b) + total[..., None, None].exp() * S.unsqueeze(2)
        starts += [S.unsqueeze(2), sums[:, :, :-1]]
        S = sums[:, :, -1]
    return torch.cat(starts, 2), S
