"""Every scan against a loop over dense matrices in float64."""

import pytest
import torch
from torch import Tensor

from ssm_blocks.ops.scans import METHODS, TRANSITIONS, scan

B, N = 2, 5


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: str, T: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(parameters, dense [B, T, m, m] of the same maps, b [B, T, m])."""
    if kind == "diagonal":
        a = rand(B, T, N).tanh()
        return (a,), torch.diag_embed(a), rand(B, T, N, seed=1)
    if kind == "two_by_two":
        M = rand(B, T, N, 2, 2) / 3
        dense = torch.stack([torch.block_diag(*blocks) for blocks in M.flatten(0, 1)]).unflatten(0, (B, T))
        return (M,), dense, rand(B, T, 2 * N, seed=1)
    if kind == "dense":
        M = rand(B, T, N, N) / 4
        return (M,), M, rand(B, T, N, seed=1)
    eye = torch.eye(N, dtype=torch.float64)
    if kind == "permutation":
        index = rand(B, T, N).argsort(-1)
        sign = rand(B, T, N, seed=2).sign()
        return (index, sign), sign.unsqueeze(-1) * eye[index], rand(B, T, N, seed=1)
    row = (rand(B, T, N).abs() * 10).long() % N
    value = rand(B, T, N, seed=2).tanh()
    return (row, value), (value.unsqueeze(-1) * eye[row]).mT, rand(B, T, N, seed=1)


def loop(dense: Tensor, b: Tensor, h0: Tensor, starts: Tensor | None = None) -> Tensor:
    """h0 [B, m], or with starts [B, T, m]: the state before each token's own sequence."""
    states, h = [], h0 if starts is None else h0[:, 0]
    for t in range(b.size(1)):
        if starts is not None:
            h = torch.where(starts[:, t, None], h0[:, t], h)
        h = (dense[:, t] @ h.unsqueeze(-1)).squeeze(-1) + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


def shaped(kind: str, x: Tensor) -> Tensor:
    return x.unflatten(-1, (N, 2)) if kind == "two_by_two" else x


@pytest.mark.parametrize("T", [1, 2, 15, 16, 37])
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", sorted(TRANSITIONS))
def test_scan_equals_the_loop(kind: str, method: str, T: int) -> None:
    A, dense, b = make(kind, T)
    h0 = rand(B, b.size(-1), seed=3)
    got = scan(kind, A, shaped(kind, b), shaped(kind, h0), method=method)
    torch.testing.assert_close(got, shaped(kind, loop(dense, b, h0)), atol=1e-12, rtol=0)
    without = scan(kind, A, shaped(kind, b), method=method)
    torch.testing.assert_close(without, shaped(kind, loop(dense, b, 0 * h0)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", sorted(TRANSITIONS))
def test_segmented_scan_starts_afresh(kind: str, method: str) -> None:
    T = 37
    A, dense, b = make(kind, T)
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, [0, 1, 17, 36]] = True
    starts[1, [0, 16, 30]] = True
    own = starts.cumsum(1)
    h0 = rand(B, T + 1, b.size(-1), seed=3).gather(1, own.unsqueeze(-1).expand(-1, -1, b.size(-1)))
    got = scan(kind, A, shaped(kind, b), shaped(kind, h0), starts, method)
    torch.testing.assert_close(got, shaped(kind, loop(dense, b, h0, starts)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", ["diagonal", "dense", "column_sparse"])
def test_gradients_equal_the_loop(kind: str, method: str) -> None:
    A, _, b = make(kind, 19)
    values = A[-1].requires_grad_()
    b.requires_grad_()
    h0 = rand(B, N, seed=3).requires_grad_()
    dense = {"diagonal": lambda: torch.diag_embed(values), "dense": lambda: values}.get(
        kind, lambda: (values.unsqueeze(-1) * torch.eye(N, dtype=torch.float64)[A[0]]).mT
    )()
    weight = rand(B, 19, N, seed=9)
    want = torch.autograd.grad((loop(dense, b, h0) * weight).sum(), (values, b, h0))
    got = torch.autograd.grad((scan(kind, A, b, h0, method=method) * weight).sum(), (values, b, h0))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=0)


def test_unknown_names_are_refused() -> None:
    A, _, b = make("dense", 3)
    with pytest.raises(ValueError, match="blelloch"):
        scan("dense", A, b, method="magic")
    with pytest.raises(ValueError, match="two_by_two"):
        scan("triangular", A, b)
