"""The small pieces every block is made of: linear map, norm, rotary embedding, MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Bias-free linear map whose master weight stays in its own type and is cast to the input's type when used.

    The optimizer then updates fp32 weights while the matrix products run in the activations' type; autocast does
    the same with more bookkeeping.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


def rms_norm(x: Tensor) -> Tensor:
    """x [..., D] divided by the root mean square over its last dimension; no learnable gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary cosines and signed sines, both fp32 [1, length, 1, head_dim].

    Channel i is paired with channel i + head_dim/2. The sine of the first half is positive and that of the second
    negative, so `apply_rotary` needs no negation. Source: RoFormer (arXiv:2104.09864), rotating by minus theta as
    nanochat does; only relative angles reach the scores.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / (base**exponents)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1)[None, :, None, :], torch.cat([sin, -sin], -1)[None, :, None, :]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs of x [B, T, H, D] by position; cos and sin [1, T, 1, D] come from `rotary_tables`."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, arXiv:2109.08668)."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        squared = _ReluSquared.apply(x)
        assert isinstance(squared, Tensor)
        return squared
    return F.relu(x).square()


class _ReluSquared(torch.autograd.Function):
    """Two passes over memory each way; autograd's chain of relu and square makes seven (15 % of a step at depth 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(grad_outputs[0], positive).mul_(2)


class MLP(nn.Module):
    """Width -> 4 x width -> relu squared -> width."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.c_fc = Linear(n_embd, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(relu_squared(self.c_fc(x)))
