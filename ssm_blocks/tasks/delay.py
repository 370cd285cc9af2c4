"""Say what was read a given number of tokens ago: trivial for a buffer, a test of how finely a state resolves time."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_blocks.tasks.task import IGNORED, check_sizes, generator_for, keep_split, num_candidates


class Delay:
    """Uniform tokens; the target at t is the token at t - delay, nothing before that. Raises ValueError for delays
    below 1.
    """

    def __init__(self, delay: int, vocabulary: int = 4) -> None:
        if delay < 1 or vocabulary < 2:
            raise ValueError(f"a delay is at least 1 and a vocabulary at least 2, got {delay} and {vocabulary}")
        self.delay, self.vocabulary, self.num_classes = delay, vocabulary, vocabulary

    def chance(self, length: int) -> float:
        """Any token is as likely as any other."""
        return 1 / self.vocabulary

    def batch(
        self, seed: int, step: int, *, size: int, length: int, split: str = "train", device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """See `Task.batch`. Raises ValueError for lengths within the delay."""
        check_sizes(self.vocabulary, size, length)
        if length <= self.delay:
            raise ValueError(f"a delay of {self.delay} needs longer sequences than that, got {length}")
        generator = generator_for(seed, step, split, device)
        shape = (num_candidates(size), length)
        tokens = torch.randint(self.vocabulary, shape, generator=generator, device=device)
        tokens = tokens[keep_split(tokens, split, size)]
        targets = torch.full_like(tokens, IGNORED)
        targets[:, self.delay :] = tokens[:, : -self.delay]
        return tokens, targets
