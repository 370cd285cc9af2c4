"""The definitions, token by token: what every fast form must equal. Slow, plain, differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def scan_reference(apply: Callable[[int, Tensor], Tensor], b: Tensor, h0: Tensor) -> Tensor:
    """h_t = apply(t, h_{t-1}) + b_t for b [B, T, ...], h0 [B, ...] -> [B, T, ...]."""
    states, h = [], h0
    for t in range(b.size(1)):
        h = apply(t, h) + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, S: Tensor, G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S' = exp(log_decay_t) G_t S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = S_t^T q_t.

    q, k [B, T, H, K], v [B, T, H, V], beta, log_decay [B, T, H], S [B, H, K, V], G dense [B, T, H, K, K] or None.
    Returns o [B, T, H, V] and the last S. Source: arXiv:2406.06484; the decay as in arXiv:2412.06464.
    """
    outputs = []
    for t in range(q.size(1)):
        if G is not None:
            S = G[:, t] @ S
        if log_decay is not None:
            S = log_decay[:, t].exp()[..., None, None] * S
        error = v[:, t] - (S.mT @ k[:, t].unsqueeze(-1)).squeeze(-1)
        S = S + beta[:, t, :, None, None] * k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
        outputs.append((S.mT @ q[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1), S


def dplr_reference(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, S: Tensor, G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = G_t (diag(exp log_decay_t) + a_t b_t^T) S_{t-1} + k_t v_t^T; o_t = S_t^T q_t.

    q, k, a, b, log_decay [B, T, H, K], v [B, T, H, V], S [B, H, K, V], G [B, T, H, K, K] or None.
    """
    outputs = []
    for t in range(q.size(1)):
        read = S.mT @ b[:, t].unsqueeze(-1)
        S = log_decay[:, t].exp().unsqueeze(-1) * S + a[:, t].unsqueeze(-1) * read.mT
        if G is not None:
            S = G[:, t] @ S
        S = S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((S.mT @ q[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1), S


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T; o_t = S_t^T q_t; shapes as in `delta_rule_reference`."""
    outputs = []
    for t in range(q.size(1)):
        S = log_decay[:, t].exp()[..., None, None] * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((S.mT @ q[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1), S
