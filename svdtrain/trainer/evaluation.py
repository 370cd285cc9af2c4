"""Validation loss in bits per byte, which does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from svdtrain.trainer.distributed import World, sum_over_ranks


@torch.no_grad()
def evaluate_bits_per_byte(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    *,
    device: torch.device,
    world: World,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Sum of the targets' losses over the sum of their bytes.

    Args:
        model: (idx [B, T], targets [B, T], loss_reduction="none") -> losses [B * T] or [B, T], nats.
        batches: this rank's share of the validation text.
        token_bytes: [vocab] bytes of every token, 0 for special tokens, which are not counted.
        between_batches: called after every batch; may raise to end the evaluation.
    Returns:
        val/bpb, and val/loss: mean nats over the counted tokens. Both nan if there were none.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # bytes, tokens
    token_bytes = token_bytes.to(device)
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        losses = model(inputs, targets, loss_reduction="none").view(-1).double()
        flat = targets.view(-1)
        sizes = torch.where(flat >= 0, token_bytes[flat.clamp_min(0)], 0)
        nats += (losses * (sizes > 0)).sum()
        counts += torch.stack([sizes.sum(), (sizes > 0).sum()])
        between_batches()
    totals = sum_over_ranks(torch.cat([nats[None], counts.double()]).cpu(), world).tolist()
    total_nats, total_bytes, total_tokens = totals
    return {
        "val/bpb": total_nats / (math.log(2) * total_bytes) if total_bytes else math.nan,
        "val/loss": total_nats / total_tokens if total_tokens else math.nan,
    }


def bits_per_byte_evaluator(
    validation: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    token_bytes: Tensor,
    *,
    device: torch.device,
    world: World,
    between_batches: Callable[[], None] = lambda: None,
) -> Callable[[nn.Module], dict[str, float]]:
    """The trainer's `evaluate` over a fixed validation set."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        return evaluate_bits_per_byte(
            model, validation(), token_bytes, device=device, world=world, between_batches=between_batches
        )

    return evaluate
