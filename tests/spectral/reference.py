"""Matrices with known truths, and naive float64 twins."""

import math

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthonormal(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(m, k, seed=seed)).Q


def with_spectrum(m: int, n: int, S: Tensor, seed: int = 0) -> Tensor:
    """A matrix [m, n] with exactly these singular values and random bases."""
    g = S.shape[0]
    return (orthonormal(m, g, seed) * S.double()) @ orthonormal(n, g, seed + 1).mT


def rotated(U: Tensor, k: int, angle: float) -> Tensor:
    """U [m, m] with its k-th direction turned by `angle` into the (k+1)-th: one principal angle, the rest zero."""
    out = U.clone()
    out[:, k - 1] = math.cos(angle) * U[:, k - 1] + math.sin(angle) * U[:, k]
    out[:, k] = math.cos(angle) * U[:, k] - math.sin(angle) * U[:, k - 1]
    return out


def zoo() -> dict[str, Tensor]:
    """The shapes and spectra of the accuracy contract, float64 masters."""
    spikes = torch.cat([torch.tensor([10.0, 8.0, 6.0]), torch.linspace(1, 0.1, 37)])
    clustered = torch.cat([torch.full((20,), 2.0), torch.full((20,), 1.0)])
    return {
        "random": gaussian(40, 40),
        "tall": gaussian(64, 24, seed=1),
        "wide": gaussian(24, 64, seed=2),
        "row": gaussian(1, 33, seed=3),
        "column": gaussian(33, 1, seed=4),
        "one_by_one": gaussian(1, 1, seed=5),
        "spiked": with_spectrum(40, 40, spikes, seed=6),
        "clustered": with_spectrum(40, 40, clustered, seed=7),
        "rank_deficient": gaussian(40, 5, seed=8) @ gaussian(5, 32, seed=9),
        "zero": torch.zeros(20, 12, dtype=torch.float64),
        "identity": torch.eye(16, dtype=torch.float64),
        "graded": with_spectrum(30, 30, torch.logspace(0, -14, 30, dtype=torch.float64), seed=10),
        "huge": gaussian(30, 20, seed=11) * 1e36,
        "tiny": gaussian(30, 20, seed=12) * 1e-36,
    }
