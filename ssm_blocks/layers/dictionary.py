"""A learned dictionary of signed permutations and the per-token choice among them, both straight through."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_blocks.layers.modules import Gate, Generator, fill_normal
from ssm_blocks.ops.permutation import to_dense


class Choice(NamedTuple):
    """G_t of every token: as integers, and as weights over the dense dictionary for the gradient."""

    entry: Tensor  # int [B, T, H]
    weights: Tensor  # [B, T, H, M], one-hot in value


class PermutationDictionary(nn.Module):
    """M signed permutations of K channels per head; entry 0 is the identity and stays it.

    Permutation m sorts K scores, so it always is one; its gradient is SoftSort's (arXiv:2006.16038). Signs are those of
    K numbers. The choice is the largest of M logits of the token, its gradient that of their softmax.
    """

    def __init__(self, dim: int, num_heads: int, size: int, channels: int, signed: bool) -> None:
        super().__init__()
        if size < 2:
            raise ValueError(f"a dictionary needs at least 2 entries (the identity is one), got {size}")
        self.num_heads, self.size, self.channels = num_heads, size, channels
        self.scores = nn.Parameter(torch.empty(num_heads, size - 1, channels))
        self.signs = nn.Parameter(torch.empty(num_heads, size - 1, channels)) if signed else None
        self.router = Gate(dim, num_heads * size, gain=1.0)

    def init_weights(self, generator: Generator = None) -> None:
        fill_normal(self.scores, 1.0, generator)
        if self.signs is not None:
            fill_normal(self.signs, 0.5, generator)
        self.router.init_weights(generator)

    def choose(self, x: Tensor) -> Choice:
        """x [B, T, D] -> the entry of every token and head."""
        soft = self.router(x).unflatten(-1, (self.num_heads, self.size)).softmax(-1)
        entry = soft.argmax(-1)
        return Choice(entry, F.one_hot(entry, self.size).to(soft.dtype) + (soft - soft.detach()))

    def entries(self) -> tuple[Tensor, Tensor]:
        """All entries as (index, sign) [H, M, K], without gradient."""
        index = self.scores.detach().argsort(dim=-1, stable=True)
        identity = torch.arange(self.channels, device=index.device).expand(self.num_heads, 1, -1)
        sign = torch.ones_like(self.scores) if self.signs is None else _sign(self.signs.detach())
        return torch.cat([identity, index], 1), torch.cat([torch.ones_like(sign[:, :1]), sign], 1)

    def gather(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """(index, sign) [B, T, H, K] of the chosen entries [B, T, H]."""
        index, sign = self.entries()
        heads = torch.arange(self.num_heads, device=entry.device)
        return index[heads, entry], sign[heads, entry]

    def dense(self) -> Tensor:
        """All entries as matrices [H, M, K, K] with the straight-through gradient to scores and signs."""
        hard = to_dense(*self.entries())
        soft = _soft_sort(self.scores)
        if self.signs is not None:
            soft = self.signs.tanh().unsqueeze(-1) * soft
        soft = torch.cat([torch.zeros_like(soft[:, :1]), soft], 1)
        return hard.to(soft.dtype) + (soft - soft.detach())

    def matrices(self, weights: Tensor) -> Tensor:
        """G_t [B, T, H, K, K] for weights [B, T, H, M]."""
        return torch.einsum("bthm,hmij->bthij", weights, self.dense().to(weights.dtype))


def identity_weights(weights: Tensor, mask: Tensor) -> Tensor:
    """Choice weights [B, T, H, M] with the identity, entry 0, wherever mask [B, T] is false."""
    identity = torch.zeros_like(weights)
    identity[..., 0] = 1
    return torch.where(mask[..., None, None], weights, identity)


def _sign(x: Tensor) -> Tensor:
    """+-1, never 0."""
    return torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))


def _soft_sort(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Row i: softmax of how near every score is to the i-th smallest; scores [..., K] -> [..., K, K]."""
    distance = (scores.sort(-1).values.unsqueeze(-1) - scores.unsqueeze(-2)).abs()
    return (-distance / temperature).softmax(-1)
