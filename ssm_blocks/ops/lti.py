"""Parallel forms of h_t = A h_{t-1} + b_t with one constant A: powers by squaring instead of a general scan."""

from __future__ import annotations

import torch
from torch import Tensor


def lti_states(A: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """All states [B, T, H, n] for A [H, n, n], b [B, T, H, n], h0 [B, H, n]: log2 T rounds h_t += A^s h_{t-s}.

    After the round with shift s, h_t holds the last 2s inputs: doubling (Hillis and Steele 1986) with constant A.
    """
    first = b[:, :1] + _apply(A, h0.unsqueeze(1))
    h = torch.cat([first, b[:, 1:]], 1)
    power, shift = A, 1
    while shift < h.size(1):
        h = torch.cat([h[:, :shift], h[:, shift:] + _apply(power, h[:, :-shift])], 1)
        power, shift = power @ power, 2 * shift
    return h


def krylov(A: Tensor, b: Tensor, length: int) -> Tensor:
    """[b, A b, A^2 b, ...] as [..., length, n] for A [..., n, n], b [..., n], by doubling."""
    columns, power = b.unsqueeze(-2), A
    while columns.size(-2) < length:
        columns = torch.cat([columns, columns @ power.mT], -2)
        power = power @ power
    return columns[..., :length, :]


def power_apply(A: Tensor, h: Tensor, exponents: Tensor) -> Tensor:
    """A^e h with its own e per sequence: A [H, n, n], h [B, H, p, n], exponents int [B], by the bits of e."""
    power, bits = A, exponents
    for _ in range(int(exponents.max()).bit_length()):
        odd = (bits % 2 == 1).view(-1, 1, 1, 1)
        h = torch.where(odd, h @ power.mT, h)
        power, bits = power @ power, bits // 2
    return h


def matrix_power(A: Tensor, exponent: int) -> Tensor:
    """A^exponent for A [..., n, n] by squaring."""
    return torch.linalg.matrix_power(A, exponent)


def causal_convolution(kernel: Tensor, u: Tensor) -> Tensor:
    """y_t = sum_{j <= t} kernel_j u_{t-j} over time (dim 1) by FFT; kernel [T, ...] against u [B, T, ...]."""
    size = 2 * u.size(1)
    product = torch.fft.rfft(kernel, size, dim=0) * torch.fft.rfft(u, size, dim=1)
    return torch.fft.irfft(product, size, dim=1)[:, : u.size(1)]


def _apply(A: Tensor, h: Tensor) -> Tensor:
    """A [H, n, n] on h [B, T, H, n]."""
    return torch.einsum("hij,bthj->bthi", A, h)
