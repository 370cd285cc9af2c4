"""The table and the data of bench_spectral.py: rows that are timed and checked, and matrices like trained ones."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdtrain.spectral.decompose import Decomposition

OVERSAMPLE = 32


@dataclass
class Result:
    """One line of the table."""

    section: str
    variant: str
    k: int | None = None
    ms: float | None = None
    check: str = ""
    note: str = ""


class Bench:
    """Data, clock and table."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.num, self.size, self.repeats = arguments.num, arguments.size, arguments.repeats
        self.ks = [k for k in arguments.ks if k + OVERSAMPLE < self.size]
        self.results: list[Result] = []
        self.weights = [trained_matrix(self.size, self.size, seed, self.device) for seed in range(self.num)]
        self.after = [drifted(W, seed) for seed, W in enumerate(self.weights)]
        self.gradients = [random_matrix(W.shape, 7_000 + seed, self.device) for seed, W in enumerate(self.weights)]
        self.old: list[Decomposition]
        self.new: list[Decomposition]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clock(self, work: Callable[[], object], repeats: int | None = None, warm_up: bool = True) -> float:
        """Fastest of a few runs, in ms, the device drained before and after."""
        if warm_up:
            work()
        times = []
        for _ in range(repeats or self.repeats):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        return min(times)

    def row(self, section: str, variant: str, measure: Callable[[], tuple[float, str, str]], k: int | None = None):
        """Measure one line; an error becomes its note."""
        try:
            ms, check, note = measure()
            result = Result(section, variant, k, ms, check, note)
        except Exception as error:
            result = Result(section, variant, k, note=f"FAILED {error!r}"[:160])
        self.results.append(result)
        print(format_row(result), flush=True)


# --- data -------------------------------------------------------------------------------------------------------------


def random_matrix(shape: tuple[int, ...] | torch.Size, seed: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def trained_matrix(m: int, n: int, seed: int, device: torch.device) -> Tensor:
    """Noise with a decaying signal of min(m, n)/8 directions, like a trained attention matrix."""
    rank = min(m, n) // 8
    left = torch.linalg.qr(random_matrix((m, rank), 1_000 + seed, device)).Q
    right = torch.linalg.qr(random_matrix((n, rank), 2_000 + seed, device)).Q
    signal = (left * torch.logspace(math.log10(8), math.log10(1.2), rank, device=device)) @ right.mT
    return random_matrix((m, n), 3_000 + seed, device) / max(m, n) ** 0.5 + signal


def drifted(W: Tensor, seed: int, size: float = 0.01) -> Tensor:
    """W after an isotropic update of relative size `size`."""
    dW = random_matrix(W.shape, 4_000 + seed, W.device)
    return W + dW * (size * W.norm() / dW.norm())


# --- sections ---------------------------------------------------------------------------------------------------------


def format_row(result: Result) -> str:
    ms = f"{result.ms:10.2f}" if result.ms is not None else " " * 10
    k = f"{result.k:4d}" if result.k is not None else "    "
    return f"{result.section:26s} {result.variant:28s} {k} {ms}  {result.check:42s} {result.note}"
