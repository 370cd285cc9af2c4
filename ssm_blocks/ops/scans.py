"""Parallel scans of h_t = A_t h_{t-1} + b_t for five kinds of transition.

A transition is a tuple of tensors [B, T, ...]; what the tuple means is in `TRANSITIONS`:

    diagonal       (a [.., n],)                 h_i <- a_i h_i
    two_by_two     (M [.., n, 2, 2],)           n independent 2-vectors, h [.., n, 2]
    permutation    (index, sign) both [.., n]   h_i <- sign_i h[index_i]
    column_sparse  (row, value) both [.., n]    h[row_j] += value_j h_j: one entry per column (PD-SSM, arXiv:2509.22284)
    dense          (M [.., n, n],)

All five are closed under multiplication, which is what a scan needs. A segmented scan carries (flag, A, b): a flag
says that something inside the range started afresh, so that nothing from before it may enter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Params = tuple[Tensor, ...]


class Transition(NamedTuple):
    """The algebra of one kind: compose(second, first) is the map that applies first, then second."""

    compose: Callable[[Params, Params], Params]
    apply: Callable[[Params, Tensor], Tensor]
    identity: Callable[[Params], Params]


class Element(NamedTuple):
    """h -> A h + b over a range of time; `started` marks ranges that a new sequence begins in."""

    A: Params
    b: Tensor
    started: Tensor | None  # bool [B, T]; None: nothing begins anywhere


def _times_vector(M: Tensor, h: Tensor) -> Tensor:
    return (M @ h.unsqueeze(-1)).squeeze(-1)


def _scatter_rows(row: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(values).scatter_add(-1, row, values)


def _identity_matrix(params: Params) -> Params:
    M = params[0]
    return (torch.eye(M.size(-1), dtype=M.dtype, device=M.device).expand_as(M),)


def _identity_index(params: Params) -> Params:
    index, factor = params
    return torch.arange(index.size(-1), device=index.device).expand_as(index), torch.ones_like(factor)


TRANSITIONS = {
    "diagonal": Transition(
        lambda second, first: (second[0] * first[0],), lambda p, h: p[0] * h, lambda p: (torch.ones_like(p[0]),)
    ),
    "two_by_two": Transition(
        lambda second, first: (second[0] @ first[0],), lambda p, h: _times_vector(p[0], h), _identity_matrix
    ),
    "permutation": Transition(
        lambda second, first: (first[0].gather(-1, second[0]), second[1] * first[1].gather(-1, second[0])),
        lambda p, h: p[1] * h.gather(-1, p[0]),
        _identity_index,
    ),
    "column_sparse": Transition(
        lambda second, first: (second[0].gather(-1, first[0]), second[1].gather(-1, first[0]) * first[1]),
        lambda p, h: _scatter_rows(p[0], p[1] * h),
        _identity_index,
    ),
    "dense": Transition(
        lambda second, first: (second[0] @ first[0],), lambda p, h: _times_vector(p[0], h), _identity_matrix
    ),
}


def scan(
    kind: str,
    A: Params,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    method: str = "blelloch",
) -> Tensor:
    """All states h [B, T, ...] of h_t = A_t h_{t-1} + b_t.

    h0: state before the first token, [B, ...]; with `starts`, state before each token's own sequence, [B, T, ...].
    starts: bool [B, T], true at the first token of a packed sequence.
    method: blelloch (2T products, 2 log T deep), doubling (T log T products, log T deep; Hillis and Steele 1986),
    chunkwise (doubling inside chunks of 16, then a loop over chunks). Raises ValueError for unknown names.
    """
    if kind not in TRANSITIONS or method not in METHODS:
        raise ValueError(f"scan knows {sorted(TRANSITIONS)} by {sorted(METHODS)}, not {kind!r} by {method!r}")
    transition = TRANSITIONS[kind]
    element = METHODS[method](transition, Element(A, b, starts))
    if h0 is None:
        return element.b
    start = h0 if starts is not None else h0.unsqueeze(1).expand_as(element.b)
    return transition.apply(element.A, start.to(element.b.dtype)) + element.b


def _combine(transition: Transition, second: Element, first: Element) -> Element:
    """The range `first` followed by the range `second`; a start inside `second` cuts `first` off."""
    cut = second.started
    composed = transition.compose(second.A, first.A)
    b = transition.apply(second.A, first.b) + second.b
    if cut is None or first.started is None:
        return Element(composed, b, None)
    A = tuple(_where(cut, kept, new) for kept, new in zip(second.A, composed, strict=True))
    return Element(A, _where(cut, second.b, b), cut | first.started)


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition.view(condition.shape + (1,) * (yes.ndim - condition.ndim)), yes, no)


def _map(function: Callable[..., Tensor], *elements: Element) -> Element:
    A = tuple(function(*parts) for parts in zip(*(e.A for e in elements), strict=True))
    started = None if elements[0].started is None else function(*(e.started for e in elements))
    return Element(A, function(*(e.b for e in elements)), started)


def _doubling(transition: Transition, element: Element) -> Element:
    shift, length = 1, element.b.size(1)
    while shift < length:
        later, earlier = _map(lambda x, s=shift: x[:, s:], element), _map(lambda x, s=shift: x[:, :-s], element)
        combined = _combine(transition, later, earlier)
        element = _map(lambda x, new, s=shift: torch.cat([x[:, :s], new], 1), element, combined)
        shift *= 2
    return element


def _blelloch(transition: Transition, element: Element) -> Element:
    """Pair neighbours, scan the pairs, fill the places between (Blelloch 1990, section 1.4, inclusive form)."""
    length = element.b.size(1)
    if length == 1:
        return element
    odd, even = _map(lambda x: x[:, 1::2], element), _map(lambda x: x[:, : length - 1 : 2], element)
    pairs = _blelloch(transition, _combine(transition, odd, even))
    if length == 2:
        return _map(lambda x, p: torch.cat([x[:, :1], p], 1), element, pairs)
    later = _map(lambda x: x[:, 2::2], element)
    between = _combine(transition, later, _map(lambda p: p[:, : later.b.size(1)], pairs))
    evens = _map(lambda x, new: torch.cat([x[:, :1], new], 1), element, between)
    return _map(lambda e, p: _interleave(e, p, length), evens, pairs)


def _interleave(even: Tensor, odd: Tensor, length: int) -> Tensor:
    if even.size(1) > odd.size(1):
        odd = torch.cat([odd, odd[:, :1]], 1)  # one too many, cut off below
    return torch.stack([even, odd], 2).flatten(1, 2)[:, :length]


def _chunkwise(transition: Transition, element: Element, chunk: int = 16) -> Element:
    batch, length = element.b.shape[:2]
    num_chunks = -(-length // chunk)
    padded = _pad(transition, element, num_chunks * chunk - length)
    folded = _map(lambda x: x.reshape(batch * num_chunks, chunk, *x.shape[2:]), padded)
    inside = _map(lambda x: x.unflatten(0, (batch, num_chunks)), _doubling(transition, folded))
    carry = _map(lambda x: x[:, 0], inside)
    chunks = [carry]
    for i in range(1, num_chunks):
        last = _map(lambda x: x[:, -1:].expand_as(x), carry)
        carry = _combine(transition, _map(lambda x, i=i: x[:, i], inside), last)
        chunks.append(carry)
    return _map(lambda *x: torch.cat(x, 1)[:, :length], *chunks)


def _pad(transition: Transition, element: Element, count: int) -> Element:
    """`count` tokens more that change nothing."""
    if count == 0:
        return element
    tail = _map(lambda x: x[:, :1].expand(-1, count, *x.shape[2:]), element)
    started = None if tail.started is None else torch.zeros_like(tail.started)
    tail = Element(transition.identity(tail.A), torch.zeros_like(tail.b), started)
    return _map(lambda x, t: torch.cat([x, t], 1), element, tail)


METHODS = {"blelloch": _blelloch, "doubling": _doubling, "chunkwise": _chunkwise}
