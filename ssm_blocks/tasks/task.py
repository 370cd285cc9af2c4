"""What a token task is: batches that depend on (seed, step) alone, and a held-out half of all sequences.

A hash of the whole sequence decides which half it belongs to, so the two splits are disjoint at every length by
construction. Both are drawn by rejection: within its half, every sequence is as likely as before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100  # target of positions that are not scored
SPLITS = ("train", "test")
_FEWEST_SEQUENCES = 64  # below, a half may be almost empty


class Task(Protocol):
    """Tokens in, one class per token out."""

    vocabulary: int
    num_classes: int

    def chance(self, length: int) -> float:
        """Accuracy at the last scored position of the best guess that does not look at the sequence."""
        ...

    def batch(
        self, seed: int, step: int, *, size: int, length: int, split: str = "train", device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """(tokens, targets), int64 [size, length], the same for the same arguments; targets may be IGNORED."""
        ...


def generator_for(seed: int, step: int, split: str, device: torch.device | str) -> torch.Generator:
    """Random numbers that depend on these alone (and on the kind of device). Raises ValueError for unknown splits."""
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, got {split!r}")
    mixed = (seed * 1_000_003 + step) * 2 + SPLITS.index(split)
    return torch.Generator(device=device).manual_seed(mixed % 2**63)


def half_of(tokens: Tensor) -> Tensor:
    """0 (train) or 1 (test) for every sequence of tokens [B, T]: one bit of a multilinear hash."""
    weights = _hash_weights(tokens.size(1), str(tokens.device))
    h = ((tokens + 1) * weights).sum(-1)  # int64, wraps around
    for shift in (31, 29):
        h = (h ^ (h >> shift)) * 0x1B8735939E3779B9
    return (h >> 40) & 1


@lru_cache(maxsize=64)
def _hash_weights(length: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(-(2**62), 2**62, (length,), generator=generator).to(device) | 1


def num_candidates(size: int) -> int:
    """Sequences to draw so that `size` of them lie in one half: fewer do with probability below 1e-15."""
    return 4 * size + 64


def keep_split(tokens: Tensor, split: str, size: int) -> Tensor:
    """Indices [size] of the first candidates tokens [num_candidates(size), T] that belong to the split."""
    wrong = half_of(tokens) != SPLITS.index(split)
    return wrong.long().argsort(stable=True)[:size]  # no boolean mask: its size would have to reach the host


def check_sizes(vocabulary: int, size: int, length: int) -> None:
    """Raises ValueError for batches and lengths that no batch can be made of."""
    if size < 1 or length < 1 or vocabulary ** min(length, 64) < _FEWEST_SEQUENCES:
        raise ValueError(
            f"a batch needs size >= 1 and at least {_FEWEST_SEQUENCES} different sequences, got size {size}, length "
            f"{length}, {vocabulary} tokens"
        )
