"""Learning rate, momentum and weight decay as pure functions of the step, with nanochat's shapes and constants."""

from __future__ import annotations

import math

import torch

from svdtrain.config import OptimConfig

REFERENCE_BATCH_TOKENS = 524_288  # tokens per step for which the learning rates in OptimConfig are meant
MOMENTUM_WARMUP_STEPS = 400
MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90


def lr_multiplier(step: int, num_iterations: int, config: OptimConfig) -> float:
    """Share of the initial learning rate: linear warm-up, constant, linear warm-down to final_lr_frac.

    step counts from 0; step num_iterations is the end of the warm-down.
    """
    warmdown_steps = round(config.warmdown_ratio * num_iterations)
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if step <= num_iterations - warmdown_steps:
        return 1.0
    left = max(num_iterations - step, 0) / max(warmdown_steps, 1)
    return left + (1 - left) * config.final_lr_frac


def muon_momentum(step: int, num_iterations: int, config: OptimConfig) -> float:
    """Momentum of Muon: .85 to .97 over 400 steps, then .97, and down to .90 during the learning rate's warm-down.

    As in nanochat, a run shorter than 400 steps ends before the rise does.
    """
    warmdown_steps = round(config.warmdown_ratio * num_iterations)
    warmdown_start = num_iterations - warmdown_steps
    if step < MOMENTUM_WARMUP_STEPS:
        return _blend(MOMENTUM_START, MOMENTUM_PEAK, step / MOMENTUM_WARMUP_STEPS)
    if warmdown_steps == 0 or step < warmdown_start:
        return MOMENTUM_PEAK
    return _blend(MOMENTUM_PEAK, MOMENTUM_END, min((step - warmdown_start) / warmdown_steps, 1.0))


def weight_decay_multiplier(step: int, num_iterations: int) -> float:
    """Share of the initial weight decay of the matrices: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(step / num_iterations, 1.0)))


def batch_lr_scale(total_batch_size: int) -> float:
    """Factor on all learning rates for total_batch_size tokens per step: the square root of the batch ratio."""
    return math.sqrt(total_batch_size / REFERENCE_BATCH_TOKENS)


def scaled_weight_decay(
    weight_decay: float, total_batch_size: int, target_tokens: float, reference_tokens: float
) -> float:
    """Weight decay that keeps T_epoch = B / (lr decay D) constant as batch B and horizon D change (arXiv:2405.13698).

    target_tokens: length of this run. reference_tokens: length of the run that weight_decay was tuned on.
    """
    return weight_decay * batch_lr_scale(total_batch_size) * (reference_tokens / target_tokens)


def apply_schedule(optimizer: torch.optim.Optimizer, step: int, num_iterations: int, config: OptimConfig) -> None:
    """Write this step's lr into every group, momentum and weight decay into the muon groups, from their initial_*."""
    multiplier = lr_multiplier(step, num_iterations, config)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group.get("kind") == "muon":
            group["momentum"] = muon_momentum(step, num_iterations, config)
            group["weight_decay"] = group["initial_weight_decay"] * weight_decay_multiplier(step, num_iterations)


def _blend(start: float, end: float, share: float) -> float:
    return (1 - share) * start + share * end
