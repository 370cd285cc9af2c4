"""Products of generalised Householder reflections I - beta u u^T, one by one and in compact WY form."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_blocks.ops.inverse import solve_unit_lower


def householder_product_reference(u: Tensor, beta: Tensor) -> Tensor:
    """H_m ... H_1 with H_i = I - beta_i u_i u_i^T; u [..., m, n], beta [..., m] -> [..., n, n]."""
    n = u.size(-1)
    product = torch.eye(n, dtype=u.dtype, device=u.device).expand(*u.shape[:-2], n, n)
    for i in range(u.size(-2)):
        direction = u[..., i, :].unsqueeze(-1)
        product = product - beta[..., i, None, None] * direction @ (direction.mT @ product)
    return product


def householder_product(u: Tensor, beta: Tensor) -> Tensor:
    """The same product as I - U^T W: one triangular solve (Bischof and Van Loan 1987).

    Row i of W is beta_i u_i^T H_{i-1} ... H_1, so (I + tril(diag(beta) U U^T, -1)) W = diag(beta) U.
    """
    scaled = beta.unsqueeze(-1) * u
    W = solve_unit_lower((scaled @ u.mT).tril(-1), scaled)
    return torch.eye(u.size(-1), dtype=u.dtype, device=u.device) - u.mT @ W
