"""A permutation times a diagonal, diagonalised through its cycles: (P L h)_i = l[index_i] h[index_i].

On a cycle of length c the matrix is rho times a cyclic shift, up to a diagonal similarity, with rho^c the product of
its entries: eigenvalues rho e^{2 pi i j / c}, eigenvectors a scaled discrete Fourier transform.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Cycles(NamedTuple):
    """The cycles of permutations [H, n], laid end to end; all tensors int [H, n].

    order: the state at each place; place: its position within its cycle; length: that cycle's length.
    """

    order: Tensor
    place: Tensor
    length: Tensor


def find_cycles(index: Tensor) -> Cycles:
    """Cycles of index [H, n], each walked in the direction values move: from index_i to i."""
    order, place, length = [], [], []
    for row in index.tolist():
        for cycle in _cycles_of(row):
            order += cycle
            place += range(len(cycle))
            length += [len(cycle)] * len(cycle)
    return Cycles(*(torch.tensor(x, device=index.device).view_as(index) for x in (order, place, length)))


def _cycles_of(row: list[int]) -> list[list[int]]:
    target = {source: i for i, source in enumerate(row)}
    cycles, seen = [], set()
    for start in range(len(row)):
        cycle = []
        while start not in seen:
            seen.add(start)
            cycle.append(start)
            start = target[start]
        if cycle:
            cycles.append(cycle)
    return cycles


def diagonalise(l: Tensor, cycles: Cycles) -> tuple[Tensor, Tensor, Tensor]:
    """(eigenvalues [H, n], V [H, n, n], V^{-1}) of P L for positive l [H, n].

    V scales by running products of l / rho along a cycle, in logarithms; they are badly scaled only where the entries
    of one long cycle differ by orders of magnitude.
    """
    order, place, length = cycles
    first = torch.arange(l.size(-1), device=l.device) - place  # where the place's cycle begins
    log = l.gather(-1, order).log()
    running = log.cumsum(-1) - log
    running = running - running.gather(-1, first)
    last = first + length - 1
    log_rho = (running + log).gather(-1, last) / length
    scale = (running - place.to(l.dtype) * log_rho).exp()
    same = (first.unsqueeze(-1) == first.unsqueeze(-2)).to(l.dtype)
    turns = (place.unsqueeze(-1) * place.unsqueeze(-2)).to(l.dtype) / length.unsqueeze(-1)
    wave = torch.polar(same, -2 * math.pi * turns)
    eigenvalues = torch.polar(log_rho.exp(), 2 * math.pi * (place / length.to(l.dtype)))
    V = scale.unsqueeze(-1) * wave
    inverse = wave.mH / (length * scale).unsqueeze(-2)
    rows = order.argsort(-1)  # from places back to states
    return (
        eigenvalues,
        V.gather(-2, rows.unsqueeze(-1).expand_as(V)),
        inverse.gather(-1, rows.unsqueeze(-2).expand_as(V)),
    )
