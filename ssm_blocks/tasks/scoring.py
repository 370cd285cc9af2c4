"""Accuracy by length: of tokens, of the final answer, and of whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ssm_blocks.tasks.task import IGNORED, Task

TOKENS_PER_BATCH = 65_536  # bounds the memory of dense scans


def scores(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, 3]: share of scored positions answered rightly, the last scored one right, all right; logits [B, T, C]."""
    scored = targets != IGNORED
    right = (logits.argmax(-1) == targets) & scored
    place = torch.arange(targets.size(1), device=targets.device)
    last = torch.where(scored, place, -1).amax(1, keepdim=True)
    final = right.gather(1, last).squeeze(1)
    token = right.sum(1) / scored.sum(1)
    return torch.stack([token, final.float(), (right == scored).all(1).float()], 1)


@torch.no_grad()
def accuracy_by_length(
    model: Callable[[Tensor], Tensor],
    task: Task,
    lengths: Iterable[int],
    *,
    count: int,
    seed: int,
    device: torch.device | str,
) -> dict[str, dict[str, float]]:
    """{length: {token, final, sequence, chance}} over `count` held-out sequences of each length."""
    found = {}
    for length in lengths:
        size = min(count, max(1, TOKENS_PER_BATCH // length))
        total, seen = torch.zeros(3, dtype=torch.float64, device=device), 0
        while seen < count:
            tokens, targets = task.batch(seed, seen, size=size, length=length, split="test", device=device)
            total += scores(model(tokens), targets).sum(0)
            seen += size
        token, final, sequence = (total / seen).tolist()
        chance = task.chance(length)
        found[str(length)] = {"token": token, "final": final, "sequence": sequence, "chance": chance}
    return found
