"""The split, the chain rule, the merge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.precision import full_precision
from svdtrain.spectral.decompose import decompose


def parameter(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype))


@settings(deadline=None, max_examples=25)
@given(
    m=st.integers(2, 24),
    n=st.integers(2, 24),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_split_reproduces_w_and_does_not_write_it(
    m: int, n: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    W = parameter(m, n, seed, dtype)
    before = W.detach().clone()
    r = data.draw(st.integers(1, min(m, n) - 1)) if min(m, n) > 1 else 1
    factors = FactoredWeight.split(W, decompose(W), r)
    assert torch.equal(W, before)
    assert factors.B.dtype == factors.A.dtype == dtype
    exact = factors.W_p.double() + factors.B.double() @ factors.A.double()
    eps = torch.finfo(factors.W_p.dtype).eps
    torch.testing.assert_close(exact, before.double(), rtol=0, atol=20 * eps * float(before.abs().max()))
    factors.merge()
    if dtype == torch.bfloat16:  # W_p is kept in float32, so that even 16-bit weights come back to the last bit
        assert torch.equal(W, before)
    else:
        torch.testing.assert_close(W.detach(), before, rtol=0, atol=20 * eps * float(before.abs().max()))


def test_factors_are_the_minor_directions_with_root_singular_values() -> None:
    W = parameter(9, 6, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
    factors = FactoredWeight.split(W, decompose(W), 2)
    torch.testing.assert_close(factors.B @ factors.A, (U[:, -2:] * S[-2:]) @ Vh[-2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.B.T @ factors.B, torch.diag(S[-2:]), rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.A @ factors.A.T, torch.diag(S[-2:]), rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.W_p, (U[:, :-2] * S[:-2]) @ Vh[:-2], rtol=0, atol=1e-12)


def test_projected_gradient_is_autograds() -> None:
    W = parameter(8, 11, dtype=torch.float64)
    factors = FactoredWeight.split(W, decompose(W), 3)
    x = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (x @ W.T).sin().sum().backward()
    factors.project_gradient()
    B, A = (t.detach().clone().requires_grad_() for t in (factors.B, factors.A))
    (x @ (factors.W_p + B @ A).T).sin().sum().backward()
    torch.testing.assert_close(factors.B.grad, B.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.A.grad, A.grad, rtol=0, atol=1e-12)


def test_without_a_gradient_the_factors_have_none_either() -> None:
    W = parameter(8, 8)
    factors = FactoredWeight.split(W, decompose(W), 3)
    factors.B.grad = torch.ones_like(factors.B)
    factors.project_gradient()
    assert factors.B.grad is None
    assert factors.A.grad is None


def test_refactor_keeps_w_and_the_parameter_objects() -> None:
    W = parameter(12, 10)
    factors = FactoredWeight.split(W, decompose(W), 6)
    B, A = factors.B, factors.A
    with torch.no_grad():
        factors.B.add_(0.1)
    factors.merge()
    before = W.detach().clone()
    factors.refactor(decompose(W), 4)
    assert torch.equal(W, before)
    assert factors.B is B
    assert factors.A is A
    assert B.shape == (12, 4)
    assert A.shape == (4, 10)
    assert factors.split_error() < 1e-6


def test_counts() -> None:
    W = parameter(12, 10)
    counts = FactoredWeight.split(W, decompose(W), 3).counts()
    assert (counts.matrix, counts.trainable, counts.frozen, counts.total) == (120, 66, 120, 186)


@pytest.mark.parametrize("r", [0, 10, 11])
def test_impossible_rank_is_refused(r: int) -> None:
    W = parameter(12, 10)
    with pytest.raises(ValueError, match="r must lie in"):
        FactoredWeight.split(W, decompose(W), r)


def test_restored_shares_no_memory_with_the_saved_tensors() -> None:
    W = parameter(12, 10)
    factors = FactoredWeight.split(W, decompose(W), 3)
    saved = {"W_p": factors.W_p, "B": factors.B.detach(), "A": factors.A.detach()}
    other = FactoredWeight.restored(W, **saved)
    with torch.no_grad():
        other.B.zero_()
    assert torch.equal(other.A, factors.A)
    assert not torch.equal(other.B, factors.B)


def test_split_error_sees_a_wrong_factor() -> None:
    W = parameter(12, 10)
    factors = FactoredWeight.split(W, decompose(W), 3)
    assert factors.split_error() < 1e-6
    with torch.no_grad():
        factors.B.mul_(2)
    expected = torch.linalg.svdvals(W.detach())[-3:].norm() / W.detach().norm()
    assert factors.split_error() == pytest.approx(float(expected), rel=1e-4)


def test_full_precision_restores_the_loops_setting() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "high"
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision(before)
