"""Signed permutations as (index, sign), (G h)_i = sign_i h[index_i], and the delta rule seen from their frame.

S_t = (I - beta k k^T) G_t S_{t-1} + beta k v^T is the plain delta rule on Pi_t^T k_t and Pi_t^T q_t with
Pi_t = G_t ... G_1, whose state is Pi_t^T S_t. Training is an integer scan, a gather, and any chunked delta kernel.
Likewise S_t = G_t (diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t v_t^T is the DPLR delta rule on Pi_t^T (q_t, k_t) and
Pi_{t-1}^T (a_t, b_t, g_t); the signs cancel in g. Where G_t is learned, see `routed`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssm_blocks.ops.delta import chunk_delta_rule
from ssm_blocks.ops.dplr import chunk_dplr

Core = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, a, b, log_decay


def prefix_products(index: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Pi_t = G_t ... G_1 for all t (dim 1), by doubling: integer gathers only."""
    shift = 1
    while shift < index.size(1):
        later, earlier = index[:, shift:], index[:, :-shift]
        new_sign = sign[:, shift:] * sign[:, :-shift].gather(-1, later)
        index = torch.cat([index[:, :shift], earlier.gather(-1, later)], 1)
        sign = torch.cat([sign[:, :shift], new_sign], 1)
        shift *= 2
    return index, sign


def into_frame(index: Tensor, sign: Tensor, x: Tensor) -> Tensor:
    """Pi^T x for vectors x [..., K]."""
    return torch.zeros_like(x).scatter(-1, index, sign * x)


def one_earlier(index: Tensor, sign: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Pi_{t-1} from Pi_t, time in `dim`; the identity comes first."""
    size = index.size(dim)
    first = torch.arange(index.size(-1), device=index.device).expand_as(index.narrow(dim, 0, 1))
    earlier = torch.cat([first, index.narrow(dim, 0, size - 1)], dim)
    return earlier, torch.cat([torch.ones_like(sign.narrow(dim, 0, 1)), sign.narrow(dim, 0, size - 1)], dim)


def out_of_frame(index: Tensor, sign: Tensor, S: Tensor) -> Tensor:
    """Pi S for states S [..., K, V]."""
    return sign.unsqueeze(-1) * S.gather(-2, index.unsqueeze(-1).expand_as(S))


def into_frames(core: Core, index: Tensor, sign: Tensor) -> Core:
    """(q, k, v, a, b, log_decay) in the frame of the running products (index, sign) [B, T, H, K]."""
    q, k, v, a, b, log_decay = core
    before, sign_before = one_earlier(index, sign, 1)
    a, b = into_frame(before, sign_before, a), into_frame(before, sign_before, b)
    log_decay = into_frame(before, torch.ones_like(sign_before), log_decay)
    return into_frame(index, sign, q), into_frame(index, sign, k), v, a, b, log_decay


def to_dense(index: Tensor, sign: Tensor) -> Tensor:
    """The matrices [..., K, K]."""
    eye = torch.eye(index.size(-1), dtype=sign.dtype, device=sign.device)
    return sign.unsqueeze(-1) * eye[index]


def permuted_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    index: Tensor,
    sign: Tensor,
    S: Tensor,
    kernel: Callable[..., tuple[Tensor, Tensor]] = chunk_delta_rule,
) -> tuple[Tensor, Tensor]:
    """`reference.delta_rule_reference` with G_t given as index, sign [B, T, H, K]; they get no gradient.

    kernel: any plain delta rule (q, k, v, beta, log_decay, S) -> (o, S).
    """
    index, sign = prefix_products(index, sign)
    q, k = into_frame(index, sign, q), into_frame(index, sign, k)
    o, S = kernel(q, k, v, beta, None, S)
    return o, out_of_frame(index[:, -1], sign[:, -1], S)


def permuted_dplr(
    core: Core, index: Tensor, sign: Tensor, S: Tensor, chunk: int = 16, bounded: bool = False
) -> tuple[Tensor, Tensor]:
    """`reference.dplr_reference` with G_t given as index, sign [B, T, H, K]; they get no gradient.

    bounded: see `dplr.chunk_dplr`.
    """
    index, sign = prefix_products(index, sign)
    o, S = chunk_dplr(*into_frames(core, index, sign), S, chunk, bounded)
    return o, out_of_frame(index[:, -1], sign[:, -1], S)
