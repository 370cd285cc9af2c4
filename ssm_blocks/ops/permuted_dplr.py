"""S_t = G_t (diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t v_t^T with signed permutations G_t, in the permuted frame.

With Pi_t = G_t ... G_1 and S~_t = Pi_t^T S_t this is the DPLR delta rule on Pi_t^T (q_t, k_t) and Pi_{t-1}^T (a_t, b_t,
g_t); the signs cancel in g.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssm_blocks.ops.dplr import chunk_dplr, decayed_scores
from ssm_blocks.ops.inverse import solve_unit_lower
from ssm_blocks.ops.permutation import into_frame, nudges, one_earlier, out_of_frame, prefix_products, running_sum

Core = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, a, b, log_decay


def into_frames(core: Core, index: Tensor, sign: Tensor) -> Core:
    """(q, k, v, a, b, log_decay) in the frame of the running products (index, sign) [B, T, H, K]."""
    q, k, v, a, b, log_decay = core
    before, sign_before = one_earlier(index, sign, 1)
    a, b = into_frame(before, sign_before, a), into_frame(before, sign_before, b)
    log_decay = into_frame(before, torch.ones_like(sign_before), log_decay)
    return into_frame(index, sign, q), into_frame(index, sign, k), v, a, b, log_decay


def permuted_dplr(
    core: Core, index: Tensor, sign: Tensor, S: Tensor, chunk: int = 16, bounded: bool = False
) -> tuple[Tensor, Tensor]:
    """`reference.dplr_reference` with G_t given as index, sign [B, T, H, K]; they get no gradient.

    bounded: see `dplr.chunk_dplr`.
    """
    index, sign = prefix_products(index, sign)
    o, S = chunk_dplr(*into_frames(core, index, sign), S, chunk, bounded)
    return o, out_of_frame(index[:, -1], sign[:, -1], S)


def routed_dplr(
    core: Core, weights: Tensor, dictionary: Tensor, index: Tensor, sign: Tensor, S: Tensor, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """The same with the exact straight-through gradient to G_t; see `permutation.routed_delta_rule`.

    Log decays must be bounded: their sums over a chunk at least -80.
    """
    outputs = []
    for start in range(0, core[0].size(1), chunk):
        part = [x[:, start : start + chunk] for x in (weights, index, sign, *core)]
        o, S = checkpoint(_routed_chunk, dictionary, S, *part, use_reentrant=False)  # type: ignore[misc]
        outputs.append(o)
    return torch.cat(outputs, 1), S


def _routed_chunk(
    dictionary: Tensor, S: Tensor, weights: Tensor, index: Tensor, sign: Tensor, *core: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk, in the frame of its first state."""
    index, sign = prefix_products(index, sign)
    core = into_frames(core, index, sign)  # type: ignore[arg-type]
    q, k, v, a, b, log_decay, index, sign, weights = (x.transpose(1, 2) for x in (*core, index, sign, weights))
    total = log_decay.cumsum(-2)
    AB, BK = (decayed_scores(b, total - log_decay, x, total, strict=True, bounded=True) for x in (a, k))
    QA, QK = (decayed_scores(q, total, x, total, strict=False, bounded=True) for x in (a, k))
    first = S.unsqueeze(2)
    decayed = total.exp().unsqueeze(-1) * first

    def read(start: Tensor) -> Tensor:
        """w_t = S_{t-1}^T b_t when what is not written inside the chunk contributes `start` [.., C, K, V] to S_t."""
        earlier = torch.cat([first, start[:, :, :-1]], 2)
        return solve_unit_lower(-AB, torch.einsum("...tk,...tkv->...tv", b, earlier) + BK @ v)

    with torch.no_grad():
        written = a.unsqueeze(-1) * read(decayed).unsqueeze(-2) + k.unsqueeze(-1) * v.unsqueeze(-2)
        # X_t S_{t-1}, which G_t acts on, seen from the frame before G_t
        permuted = decayed + _decayed_sums(written, total) - k.unsqueeze(-1) * v.unsqueeze(-2)
    start = decayed + _decayed_sums(nudges(weights, dictionary, index, sign, permuted), total)
    w = read(start)
    o = torch.einsum("...tk,...tkv->...tv", q, start) + QA @ w + QK @ v
    last = (total[..., -1:, :] - total).exp()
    S = start[:, :, -1] + (a * last).mT @ w + (k * last).mT @ v
    return o.transpose(1, 2), out_of_frame(index[:, :, -1], sign[:, :, -1], S)


def _decayed_sums(x: Tensor, total: Tensor) -> Tensor:
    """sum_{j <= t} exp(total_t - total_j) x_j for x [B, H, C, K, V], relative to the chunk's middle."""
    relative = (total - total[..., total.size(-2) // 2, :].unsqueeze(-2).detach()).unsqueeze(-1)
    return relative.exp() * running_sum((-relative).exp() * x)
