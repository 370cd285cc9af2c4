"""Parallel forms of h_t = A h_{t-1} + b_t with one constant A: its powers instead of a general scan."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_blocks.ops.delta import fold, unfold

LARGEST_CHUNK, LARGEST_BLOCK = 16, 256  # tokens per chunk; rows of the matrix that a chunk is multiplied by


def lti_states(A: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """All states [B, T, H, n] for A [H, n, n], b [B, T, H, n], h0 [B, H, n].

    C tokens at a time by one product with the block-triangular matrix of the powers A^(i - j); their last states run
    from chunk to chunk the same way with A^C. Two passes over memory where doubling makes 2 log2 T.
    """
    batch, length, _, n = b.shape
    chunk = min(length, LARGEST_CHUNK, max(2, LARGEST_BLOCK // n))
    powers = _powers(A, chunk)
    folded = fold(b, chunk).permute(1, 0, 2, 3, 4).flatten(3).flatten(1, 2)  # [H, B N, C n]
    inside = folded @ _block_triangle(powers).mT
    num_chunks = folded.size(1) // batch
    starts = h0.unsqueeze(1)
    if num_chunks > 1:
        ends = inside[..., -n:].unflatten(1, (batch, num_chunks)).permute(1, 2, 0, 3)[:, :-1]
        starts = torch.cat([starts, lti_states(powers[:, chunk], ends, h0)], 1)
    ahead = powers[:, 1:].flatten(1, 2)  # [H, C n, n]
    states = inside + starts.permute(2, 0, 1, 3).flatten(1, 2) @ ahead.mT
    return unfold(states.unflatten(-1, (chunk, n)).unflatten(1, (batch, num_chunks)).transpose(0, 1), length)


def _powers(A: Tensor, largest: int) -> Tensor:
    """A^0 ... A^largest as [H, largest + 1, n, n], by doubling."""
    identity = torch.eye(A.size(-1), dtype=A.dtype, device=A.device).expand_as(A)
    powers, step = identity.unsqueeze(1), A
    while powers.size(1) <= largest:
        powers = torch.cat([powers, powers @ step.unsqueeze(1)], 1)
        step = step @ step
    return powers[:, : largest + 1]


def _block_triangle(powers: Tensor) -> Tensor:
    """[H, C n, C n] with A^(i - j) in block (i, j), zero above the diagonal; from A^0 ... A^C."""
    chunk, n = powers.size(1) - 1, powers.size(-1)
    place = torch.arange(chunk, device=powers.device)
    lag = place.unsqueeze(1) - place
    padded = torch.cat([powers[:, :chunk], torch.zeros_like(powers[:, :1])], 1)
    blocks = padded[:, torch.where(lag < 0, chunk, lag)]  # [H, C, C, n, n]
    return blocks.transpose(2, 3).reshape(-1, chunk * n, chunk * n)


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
