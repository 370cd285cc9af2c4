"""Signed permutations as (index, sign), (G h)_i = sign_i h[index_i], and the delta rule seen from their frame.

S_t = (I - beta k k^T) G_t S_{t-1} + beta k v^T is the plain delta rule on Pi_t^T k_t and Pi_t^T q_t with
Pi_t = G_t ... G_1, whose state is Pi_t^T S_t. Training is an integer scan, a gather, and any chunked delta kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ssm_blocks.ops.delta import chunk_delta_rule
from ssm_blocks.ops.inverse import solve_unit_lower


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


def routed_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    weights: Tensor,
    dictionary: Tensor,
    index: Tensor,
    sign: Tensor,
    S: Tensor,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """`permuted_delta_rule` whose choice of G_t is learned straight through, with the exact straight-through gradient.

    G_t = sum_m weights_tm dictionary_m equals the permutation (index_t, sign_t) in value, and carries the gradient:
    weights [B, T, H, M], dictionary [H, M, K, K]. The gradient of G_t is (dL/dS'_t) S_{t-1}^T, for which the states
    inside a chunk are needed; they are made chunk by chunk and again in the backward pass, never all at once.
    """
    outputs = []
    for start in range(0, q.size(1), chunk):
        part = [x[:, start : start + chunk] for x in (q, k, v, beta, weights, index, sign)]
        o, S = checkpoint(_routed_chunk, *part, dictionary, S, use_reentrant=False)  # type: ignore[misc]
        outputs.append(o)
    return torch.cat(outputs, 1), S


def _routed_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    weights: Tensor,
    index: Tensor,
    sign: Tensor,
    dictionary: Tensor,
    S: Tensor,
) -> tuple[Tensor, Tensor]:
    """One chunk, in the frame of its first state."""
    index, sign = prefix_products(index, sign)
    q, k, v, beta = (x.transpose(1, 2) for x in (into_frame(index, sign, q), into_frame(index, sign, k), v, beta))
    index, sign, weights = (x.transpose(1, 2) for x in (index, sign, weights))
    scaled = beta.unsqueeze(-1) * k
    L = (scaled @ k.mT).tril(-1)
    with torch.no_grad():
        new = solve_unit_lower(L, beta.unsqueeze(-1) * v - scaled @ S)
        before = S.unsqueeze(2) + running_sum(k.unsqueeze(-1) * new.unsqueeze(-2), exclusive=True)
    start = S.unsqueeze(2) + running_sum(nudges(weights, dictionary, index, sign, before))
    predicted = torch.einsum("bhtk,bhtkv->bhtv", scaled, start)
    new = solve_unit_lower(L, beta.unsqueeze(-1) * v - predicted)
    o = torch.einsum("bhtk,bhtkv->bhtv", q, start) + (q @ k.mT).tril() @ new
    last = out_of_frame(index[:, :, -1], sign[:, :, -1], start[:, :, -1] + k.mT @ new)
    return o.transpose(1, 2), last


def nudges(weights: Tensor, dictionary: Tensor, index: Tensor, sign: Tensor, before: Tensor) -> Tensor:
    """Pi_t^T (G_t - its value) Pi_{t-1} S~_{t-1}: zero, with the gradient of a change in G_t; [B, H, C, K, V]."""
    moved = _Nudge.apply(weights, dictionary, out_of_frame(*one_earlier(index, sign, 2), before))
    rows = index.unsqueeze(-1).expand_as(moved)
    return torch.zeros_like(moved).scatter(-2, rows, sign.unsqueeze(-1) * moved)


class _Nudge(torch.autograd.Function):
    """(G - value of G) S for G_t = sum_m weights_tm dictionary_m: zero, so only the backward pass has work to do."""

    @staticmethod
    def forward(ctx, weights: Tensor, dictionary: Tensor, S: Tensor) -> Tensor:
        ctx.save_for_backward(weights, dictionary, S)
        return torch.zeros_like(S)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, dictionary, S = ctx.saved_tensors
        dG = (gradient @ S.mT).flatten(-2)  # [B, H, C, K K]
        d_dictionary = (weights.mT @ dG).sum(0).view_as(dictionary)
        return dG @ dictionary.flatten(-2).mT, d_dictionary, None


def running_sum(x: Tensor, exclusive: bool = False) -> Tensor:
    """Sum over dim 2 of x [B, H, C, K, V] up to each place, without the place itself if exclusive.

    A product with a triangle of ones: on a CPU an order of magnitude faster than cumsum over an inner dimension.
    """
    ones = torch.ones(x.size(2), x.size(2), dtype=x.dtype, device=x.device).tril(-1 if exclusive else 0)
    return (ones @ x.flatten(-2)).view_as(x)
