"""Recurrences whose signed permutations G_t are chosen by a network: exact straight-through gradients, cheaply.

G_t = sum_m weights_tm dictionary_m equals a signed permutation in value and carries the gradient. With mu_t the
gradient of G_t S_{t-1}, that of G_t is X_t = mu_t S_{t-1}^T, [K, K] a token. Values need no dense G_t: they are the
permuted-frame forms. In the backward pass, mu_t and S_{t-1} are what holds at their chunk's start plus rank-1 terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_blocks.ops import delta, dplr
from ssm_blocks.ops.permutation import into_frame, into_frames, one_earlier, out_of_frame, prefix_products

LARGEST_PIECE = {"cpu": 1 << 18, "cuda": 1 << 26}  # numbers of [K, K] matrices at once: what fits a cache, few launches

Outer = Callable[[slice], Tensor]  # chunks -> X_t of their tokens in the frame, [B, H, n, C, K, K]


class Routing(NamedTuple):
    """Which G_t a token takes: weights [B, T, H, M], dictionary [H, M, K, K], and the same as index, sign [.., K]."""

    weights: Tensor
    dictionary: Tensor
    index: Tensor
    sign: Tensor


@torch.compiler.disable
def routed_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, routing: Routing, S: Tensor, chunk: int = 64, inverse: str = "solve"
) -> tuple[Tensor, Tensor]:
    """`reference.delta_rule_reference` with G_t learned straight through; shapes and chunks as in `delta`."""
    frame = prefix_products(routing.index, routing.sign)
    return _Routed.apply(_delta_rule, (chunk, inverse), frame, *routing[:2], S, q, k, v, beta)  # type: ignore[return-value]


@torch.compiler.disable
def routed_dplr(
    core: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], routing: Routing, S: Tensor, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """`reference.dplr_reference` with G_t learned straight through; core is (q, k, v, a, b, log_decay).

    Log decays must be bounded: their sums over a chunk at least -80.
    """
    frame = prefix_products(routing.index, routing.sign)
    return _Routed.apply(_dplr, (chunk,), frame, *routing[:2], S, *core)  # type: ignore[return-value]


class _Routed(torch.autograd.Function):
    """A recurrence in the frame, differentiated by autograd, and beside it the gradient of the choices.

    The forward pass keeps the inner graph for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, rule: Callable, options: tuple, frame: tuple, weights: Tensor, dictionary: Tensor, *inputs):
        with torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_() for x in inputs]
            S, *core = ctx.inputs
            ctx.outputs, ctx.taps, ctx.outer = rule(frame, S, core, *options)
        ctx.frame, ctx.chunk = frame, min(options[0], core[0].size(1))
        ctx.save_for_backward(weights, dictionary)
        return tuple(x.detach() for x in ctx.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        leaves = [*ctx.inputs, *ctx.taps]
        found = torch.autograd.grad(ctx.outputs, leaves, gradients, retain_graph=True)
        count = len(ctx.inputs)
        outer = ctx.outer(gradients, found[:count], found[count:])
        d_weights, d_dictionary = _choice_gradients(outer, *ctx.saved_tensors, *ctx.frame, ctx.chunk)
        return None, None, None, d_weights, d_dictionary, *found[:count]


def _choice_gradients(
    outer: Outer, weights: Tensor, dictionary: Tensor, index: Tensor, sign: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """dL/dG_t = Pi_t X_t Pi_{t-1}^T, contracted with the dictionary and with the weights, some chunks at a time."""
    length, keys = index.size(1), index.size(-1)
    before, sign_before = one_earlier(index, sign, 1)
    place = delta.fold(index * keys, chunk), delta.fold(before, chunk)  # X is gathered as a row of K K numbers
    turn = delta.fold(sign, chunk), delta.fold(sign_before, chunk)
    folded = delta.fold(weights, chunk)
    entries = dictionary.flatten(-2)
    d_weights, d_dictionary = torch.empty_like(folded), torch.zeros_like(entries)
    batch, heads, num_chunks = folded.shape[:3]
    largest = LARGEST_PIECE.get(index.device.type, LARGEST_PIECE["cuda"])
    step = max(1, largest // (batch * heads * chunk * keys**2))
    for first in range(0, num_chunks, step):
        part = slice(first, first + step)
        where = (place[0][:, :, part].unsqueeze(-1) + place[1][:, :, part].unsqueeze(-2)).flatten(-2)
        signs = (turn[0][:, :, part].unsqueeze(-1) * turn[1][:, :, part].unsqueeze(-2)).flatten(-2)
        dG = (outer(part).flatten(-2).gather(-1, where) * signs).flatten(2, 3)
        d_weights[:, :, part] = (dG @ entries.mT).unflatten(2, (-1, chunk))
        d_dictionary += (folded[:, :, part].flatten(2, 3).mT @ dG).sum(0)
    return delta.unfold(d_weights, length), d_dictionary.view_as(dictionary)


def _starts_gradients(S: Tensor, starts: tuple[Tensor, ...]) -> Tensor:
    """Gradients of the states at all chunks' starts, [B, H, N, K, V], the first of which is S itself."""
    return torch.stack([S, *starts], 2)


def _delta_rule(frame: tuple[Tensor, Tensor], S: Tensor, core: list[Tensor], chunk: int, inverse: str):
    index, sign = frame
    q, k, v, beta = core
    q, k = into_frame(index, sign, q), into_frame(index, sign, k)
    parts = delta.chunk_delta_parts(q, k, v, beta, None, S, chunk, inverse)
    outputs = parts.o, out_of_frame(index[:, -1], sign[:, -1], parts.S)
    q, k, news = (x.detach() for x in (delta.fold(q, parts.chunk), delta.fold(k, parts.chunk), parts.news))
    starts, ones = torch.stack([x.detach() for x in parts.starts], 2), S.new_ones(parts.chunk, parts.chunk)

    def outer(gradients, inputs, taps) -> Outer:
        """Both factors of X_t change by rank-1 terms from token to token, so X_t changes by three:
        X_{t+1} = X_t - q_t (S_{t-1} do_t)^T + k_t (S_{t-1} dv_t)^T + (mu_{t+1} u_t) k_t^T, for dv_t = beta_t mu^T k_t.
        """
        do, dv = delta.fold(gradients[0], parts.chunk), delta.fold(inputs[3], parts.chunk)
        first = _starts_gradients(inputs[0], taps)

        def of(part: slice) -> Tensor:
            Q, K, U, dO, dV, S, mu = (x[:, :, part] for x in (q, k, news, do, dv, starts, first))
            read = [d @ S.mT + (d @ U.mT).tril(-1) @ K for d in (dO, dV)]
            kept = U @ mu.mT - (U @ dO.mT).tril() @ Q + (U @ dV.mT).tril() @ K
            change = torch.stack([-Q, K, kept], -1) @ torch.stack([*read, K], -2)
            return _sums_from(mu @ S.mT, change, ones.tril(-1))

        return of

    return outputs, parts.starts[1:], outer


def _dplr(frame: tuple[Tensor, Tensor], S: Tensor, core: list[Tensor], chunk: int):
    index, sign = frame
    framed = into_frames(tuple(core), index, sign)  # type: ignore[arg-type]
    parts = dplr.chunk_dplr_parts(*framed, S, chunk, bounded=True)
    outputs = parts.o, out_of_frame(index[:, -1], sign[:, -1], parts.S)
    q, k, v, a, b, log_decay = (delta.fold(x, parts.chunk).detach() for x in framed)
    reads, starts = parts.reads.detach(), torch.stack([x.detach() for x in parts.starts], 2)
    total, ones = log_decay.cumsum(-2), S.new_ones(parts.chunk, parts.chunk)

    def outer(gradients, inputs, taps) -> Outer:
        """lambda_t, the gradient of S_t, from the chunk's end backwards; (D + a b^T) S_{t-1} from its start."""
        do, d_reads = delta.fold(gradients[0], parts.chunk), taps[0]
        last = out_of_frame_transposed(index[:, -1], sign[:, -1], gradients[1])
        ends = torch.stack([*taps[1:], last], 2)

        def of(part: slice) -> Tensor:
            Q, K, V, A, B, R, dR, dO, S, end, G = (
                x[:, :, part] for x in (q, k, v, a, b, reads, d_reads, do, starts, ends, total)
            )
            middle = G[..., G.size(-2) // 2, :].unsqueeze(-2)
            up, down = (G - middle).exp(), (middle - G).exp()  # float32 holds exp(+-40)
            written = torch.stack([A * down, _previous(K * down)], -1) @ torch.stack([R, _previous(V)], -2)
            states = _sums_from(middle.exp().mT * S, written, ones.tril())
            passed = torch.stack([Q * up, _next(B) * up], -1) @ torch.stack([dO, _next(dR)], -2)
            adjoint = _sums_from((G[..., -1:, :] - middle).exp().mT * end, passed, ones.triu())
            # early in a chunk the adjoint is large and the states small, late the other way: no product overflows
            return down.unsqueeze(-1) * (adjoint @ states.mT) * up.unsqueeze(-2)

        return of

    return outputs, [parts.right, *parts.starts[1:]], outer


def out_of_frame_transposed(index: Tensor, sign: Tensor, S: Tensor) -> Tensor:
    """Pi^T S for states S [..., K, V]."""
    return torch.zeros_like(S).scatter(-2, index.unsqueeze(-1).expand_as(S), sign.unsqueeze(-1) * S)


def _next(x: Tensor) -> Tensor:
    """x of the following token, [..., C, D]; zero at the chunk's end."""
    return torch.cat([x[..., 1:, :], torch.zeros_like(x[..., :1, :])], -2)


def _previous(x: Tensor) -> Tensor:
    """x of the token before; zero at the chunk's start."""
    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2)


def _sums_from(start: Tensor, x: Tensor, triangle: Tensor) -> Tensor:
    """start [B, H, N, m, n] plus sums of x [B, H, N, C, m, n] over C, those that a triangle of ones [C, C] selects.

    On a CPU this product is an order of magnitude faster than cumsum over an inner dimension.
    """
    return start.unsqueeze(3) + (triangle @ x.flatten(-2)).view_as(x)
