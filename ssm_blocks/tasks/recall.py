"""Multi-query associative recall (MQAR, arXiv:2312.04927): read key-value pairs, then name the value of each key asked.

k_1 v_1 k_2 v_2 ... k_m v_m, then filler with the m keys strewn in, each once, in any order; only these are scored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_blocks.tasks.task import IGNORED, generator_for, keep_split, num_candidates


class Recall:
    """pairs: m; keys, values: how many of each there are to draw from (values may repeat, keys do not).

    Tokens: keys, then values, then the filler. Raises ValueError where the pairs do not fit.
    """

    def __init__(self, pairs: int, keys: int = 64, values: int = 64) -> None:
        if not 1 <= pairs <= keys or values < 2:
            raise ValueError(f"recall needs 1 <= pairs <= keys and at least 2 values, got {pairs}, {keys}, {values}")
        self.pairs, self.keys, self.num_classes = pairs, keys, values
        self.filler = keys + values
        self.vocabulary = keys + values + 1

    def chance(self, length: int) -> float:
        """A value drawn at random."""
        return 1 / self.num_classes

    def batch(
        self, seed: int, step: int, *, size: int, length: int, split: str = "train", device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """See `Task.batch`. Raises ValueError for lengths below 3 tokens a pair."""
        if length < 3 * self.pairs or size < 1:
            raise ValueError(
                f"{self.pairs} pairs need a length of at least {3 * self.pairs}, got {length}; size {size}"
            )
        generator = generator_for(seed, step, split, device)
        shape = (num_candidates(size), length)
        tokens = torch.full(shape, self.filler, device=device)
        targets = torch.full(shape, IGNORED, device=device)
        keys = _draw(shape[0], self.keys, self.pairs, generator)
        values = torch.randint(self.num_classes, keys.shape, generator=generator, device=device)
        start = 2 * self.pairs
        tokens[:, 0:start:2], tokens[:, 1:start:2] = keys, self.keys + values
        order = _draw(shape[0], self.pairs, self.pairs, generator)
        places = start + _draw(shape[0], length - start, self.pairs, generator)
        tokens.scatter_(1, places, keys.gather(1, order))
        targets.scatter_(1, places, values.gather(1, order))
        kept = keep_split(tokens, split, size)
        return tokens[kept], targets[kept]


def _draw(rows: int, count: int, picks: int, generator: torch.Generator) -> Tensor:
    """`picks` different numbers below `count` in random order, [rows, picks]."""
    noise = torch.rand(rows, count, generator=generator, device=generator.device)
    return noise.argsort(1)[:, :picks]
