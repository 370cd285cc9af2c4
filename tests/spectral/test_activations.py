import pytest
import torch
from torch import nn

from svdtrain.spectral import activations as A
from svdtrain.spectral.null import functional_drift
from tests.spectral.reference import gaussian, orthonormal

torch.set_num_threads(1)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
        self.out = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.q(x) * self.k(x)))


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def test_streamed_covariances_equal_the_plain_ones(toy: Toy) -> None:
    batches = [torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with A.collect_input_covariances({"q": toy.q, "k": toy.k, "out": toy.out}) as collector, torch.no_grad():
        for batch in batches:
            toy(batch)
    toy(100 * batches[0])  # after the context: not counted
    got = collector.result()
    rows = torch.cat(batches).reshape(-1, 6)
    hidden = torch.relu(toy.q(rows) * toy.k(rows)).detach()
    torch.testing.assert_close(got["q"].C, rows.mT @ rows / 63)
    torch.testing.assert_close(got["k"].C, got["q"].C, rtol=0, atol=0)
    torch.testing.assert_close(got["out"].C, hidden.mT @ hidden / 63)
    assert {name: c.num_rows for name, c in got.items()} == {"q": 63, "k": 63, "out": 63}
    assert not toy.q._forward_pre_hooks


def test_half_precision_inputs_are_summed_in_float32(toy: Toy) -> None:
    half = toy.bfloat16()
    x = torch.ones(4096, 6, dtype=torch.bfloat16)
    with A.collect_input_covariances({"q": half.q}) as collector, torch.no_grad():
        half(x)
        half(x)
    assert collector.result()["q"].C.dtype == torch.float32
    torch.testing.assert_close(collector.result()["q"].C, torch.ones(6, 6))


def test_works_with_gradients_on_and_leaves_them_alone(toy: Toy) -> None:
    x = torch.randn(4, 6)
    toy(x).sum().backward()
    expected = toy.q.weight.grad
    assert expected is not None
    expected = expected.clone()
    toy.zero_grad()
    with A.collect_input_covariances({"q": toy.q}):
        toy(x).sum().backward()
    torch.testing.assert_close(toy.q.weight.grad, expected, rtol=0, atol=0)


def test_bad_input_is_named(toy: Toy) -> None:
    with pytest.raises(ValueError, match="2-D weight"), A.collect_input_covariances({"norm": nn.LayerNorm(4)}):
        pass
    with pytest.raises(ValueError, match="two names"), A.collect_input_covariances({"a": toy.q, "b": toy.q}):
        pass
    with A.collect_input_covariances({"q": toy.q}) as unused:
        pass
    with pytest.raises(ValueError, match="no input reached"):
        unused.result()
    assert unused.unreached == ["q"]
    assert unused.result(skip_unreached=True) == {}
    with A.collect_input_covariances({"q": toy.q}) as broken, torch.no_grad():
        toy(torch.full((2, 6), float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        broken.result()
    with (
        A.collect_input_covariances({"out": toy.out}) as _,
        pytest.raises(ValueError, match="6 features"),
        torch.no_grad(),
    ):
        toy.out(torch.ones(2, 6))
    assert not toy.out._forward_pre_hooks


def covariance(n: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    Q = orthonormal(n, n)
    values = torch.logspace(1, -2, n, dtype=torch.float64)
    return (Q * values) @ Q.mT, Q, values


def test_input_basis_and_counts() -> None:
    C, Q, values = covariance()
    basis = A.input_basis(C)
    torch.testing.assert_close(basis.eigenvalues, values)
    torch.testing.assert_close((basis.top(4).mT @ Q[:, :4]).abs(), torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0)
    share = float(values[:3].sum() / values.sum())
    assert basis.count_for_energy(share) == 3
    assert basis.count_for_energy(share + 1e-6) == 4
    assert basis.count_for_energy(1.0) == 12
    assert A.input_basis(torch.zeros(5, 5)).count_for_energy(0.9) == 0
    assert A.input_basis(torch.stack([C, C]).float()).top(2).shape == (2, 12, 2)
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="share of energy"):
            basis.count_for_energy(wrong)
    with pytest.raises(ValueError, match="protected directions"):
        basis.top(13)


def test_hard_projection_removes_the_protected_inputs_only() -> None:
    C, Q, _ = covariance()
    P = A.input_basis(C).top(4)
    X = gaussian(7, 12, seed=3)
    kept = A.remove_inputs(X, P)
    assert float((kept @ Q[:, :4]).abs().max()) < 1e-12
    torch.testing.assert_close(kept @ Q[:, 4:], X @ Q[:, 4:])
    assert float(functional_drift(kept, X, C).value) < 0.15 * float(functional_drift(X, X, C).value)


@pytest.mark.parametrize("strength", [0.0, 1.0, 4.0])
def test_soft_projection_both_ways(strength: float) -> None:
    C, Q, values = covariance()
    expected = (Q * (1 / (1 + strength * values / values.mean()))) @ Q.mT
    torch.testing.assert_close(A.shrink_matrix(C, strength), expected)
    torch.testing.assert_close(A.soft_projection(A.input_basis(C), strength), expected)
    torch.testing.assert_close(A.shrink_matrix(torch.zeros(3, 3), strength), torch.eye(3))


def test_soft_projection_refuses_a_negative_strength() -> None:
    with pytest.raises(ValueError, match="negative"):
        A.shrink_matrix(torch.eye(3), -1.0)


def test_outside_share() -> None:
    C, Q, values = covariance()
    assert float(A.outside_share(C, Q[:, :3])) == pytest.approx(float(values[3:].sum() / values.sum()))
    assert float(A.outside_share(torch.zeros(12, 12), Q[:, :3])) == 0


def test_a_layer_whose_weight_lies_the_other_way_is_refused() -> None:
    """Square, it would be protected on the wrong side."""

    class Conv1D(torch.nn.Module):
        weight = torch.zeros(20, 20)

    with pytest.raises(ValueError, match=r"as \[in, out\]"), A.collect_input_covariances({"c": Conv1D()}):
        pass
