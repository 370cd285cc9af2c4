"""The pieces of Muon against float64 references."""

import pytest
import torch
from torch import Tensor

from svdtrain.optim import muon

SHAPES = [(6, 6), (20, 8), (8, 20), (256, 8), (8, 256), (1, 12), (12, 1), (1, 1)]


def matrices(m: int, n: int, count: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def naive_polynomials(s: Tensor) -> Tensor:
    """What five steps make of a singular value, one polynomial after the other."""
    for a, b, c in muon.POLAR_EXPRESS_COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_polar_express_applies_its_polynomials_to_the_singular_values(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    X = matrices(*shape, dtype=dtype)
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    S = S / (1.01 * torch.linalg.vector_norm(S, dim=-1, keepdim=True) + 1e-6)
    expected = (U * naive_polynomials(S)[:, None, :]) @ Vh
    atol = 1e-10 if dtype == torch.float64 else 1e-3
    Y = muon.polar_express(X)
    assert Y.dtype == dtype
    torch.testing.assert_close(Y.double(), expected, atol=atol, rtol=0)
    torch.testing.assert_close(muon.polar_express(X[0]).double(), expected[0], atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (40, 160), (160, 40), (256, 8), (1, 12)], ids=str)
def test_polar_express_is_near_the_polar_factor(shape: tuple[int, int]) -> None:
    """Same singular vectors; every singular value above 1.1e-3 of the Frobenius norm ends within 14.2 % of 1."""
    X = matrices(*shape)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    rotated = U.mT @ muon.polar_express(X) @ Vh.mT
    reached = rotated.diagonal(dim1=-2, dim2=-1)
    assert (rotated - reached.diag_embed()).abs().max() < 1e-10
    large = S / torch.linalg.vector_norm(S, dim=-1, keepdim=True) > 1.1e-3
    assert large.float().mean() > 0.9
    assert (reached[large] - 1).abs().max() < 0.142
    assert reached.max() < 1.142


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (192, 48)], ids=str)
def test_fp32_keeps_small_singular_values(shape: tuple[int, int], ratio: float) -> None:
    """Ill-conditioned input in fp32: no direction may blow up, and the large ones must be right."""
    U, _, Vh = torch.linalg.svd(matrices(*shape, count=1), full_matrices=False)
    S = torch.logspace(0, torch.tensor(ratio).log10().item(), 48, dtype=torch.float64)
    X = (U * S) @ Vh
    exact, single = muon.polar_express(X), muon.polar_express(X.float()).double()
    assert torch.linalg.matrix_norm(single - exact, 2).max() < 0.02


@pytest.mark.parametrize("steps", [0, 6])
def test_polar_express_knows_one_to_five_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="1 to 5"):
        muon.polar_express(matrices(3, 3), steps)


def test_nesterov_momentum() -> None:
    grads = [torch.tensor([1.0, -2.0]), torch.tensor([4.0])]
    buffers = [torch.tensor([0.5, 0.5]), torch.tensor([0.0])]
    ahead = muon.nesterov_momentum(grads, buffers, 0.9)
    torch.testing.assert_close(buffers, [torch.tensor([0.55, 0.25]), torch.tensor([0.4])])
    torch.testing.assert_close(ahead, [torch.tensor([0.1 + 0.495, -0.2 + 0.225]), torch.tensor([0.76])])
    assert grads[0].tolist() == [1, -2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equilibrated_rows_are_equally_long(shape: tuple[int, int]) -> None:
    X = matrices(*shape)
    Y = muon.equilibrate_rows(X)
    norms = torch.linalg.vector_norm(Y, dim=-1)
    torch.testing.assert_close(norms, norms.mean(-1, keepdim=True).expand_as(norms))
    torch.testing.assert_close(torch.linalg.vector_norm(Y, dim=(1, 2)), torch.linalg.vector_norm(X, dim=(1, 2)))
    cosine = (X * Y).sum(-1) / torch.linalg.vector_norm(X, dim=-1) / norms
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_renormalized_to_the_norm_of_a_polar_factor() -> None:
    Y = muon.renormalize(matrices(20, 8))
    torch.testing.assert_close(torch.linalg.vector_norm(Y, dim=(1, 2)), torch.full((3,), 8**0.5, dtype=Y.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_variance_reduction(shape: tuple[int, int]) -> None:
    """Keeps the norm, moves the state, and from a fresh state makes the long side's lines equally long."""
    X = matrices(*shape)
    tall = shape[0] >= shape[1]
    state = torch.zeros(3, *muon.second_momentum_shape(torch.Size(shape)), dtype=X.dtype)
    assert state.numel() == 3 * max(shape)
    Y = muon.reduce_variance(X, state, beta2=0.9)
    torch.testing.assert_close(state, 0.1 * X.square().mean(2 if tall else 1, keepdim=True))
    torch.testing.assert_close(torch.linalg.vector_norm(Y, dim=(1, 2)), torch.linalg.vector_norm(X, dim=(1, 2)))
    lines = torch.linalg.vector_norm(Y, dim=2 if tall else 1)
    torch.testing.assert_close(lines, lines.mean(-1, keepdim=True).expand_as(lines))
    before = state.clone()
    muon.reduce_variance(2 * X, state, beta2=0.9)
    torch.testing.assert_close(state, 0.9 * before + 4 * before)


def test_decay_only_where_it_agrees_with_the_update() -> None:
    W = torch.tensor([[2.0, -2.0], [2.0, -2.0]])
    U = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    expected = [[2 - 0.1 - 0.1 * 0.5 * 2, -2 - 0.1], [2 + 0.1, -2 + 0.1 + 0.1 * 0.5 * 2]]
    torch.testing.assert_close(muon.apply_update(W, U, 0.1, 0.5), torch.tensor(expected))
    torch.testing.assert_close(muon.apply_update(W, U, 0.1, 0.0), W - 0.1 * U)


def test_tall_matrices_take_larger_steps() -> None:
    assert muon.shape_scale(torch.Size((256, 64))) == 2
    assert muon.shape_scale(torch.Size((64, 256))) == 1


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16), (1, 12)], ids=str)
def test_zero_gradient_stays_zero(shape: tuple[int, int]) -> None:
    X = torch.zeros(2, *shape)
    state = torch.zeros(2, *muon.second_momentum_shape(torch.Size(shape)))
    U = muon.orthogonalized_update(X, state, beta2=0.9, steps=5)
    assert U.abs().max() == 0
