"""018: scores against dense determinants and norms, exact budgets, truncation that keeps the layer stable."""

import pytest
import torch
from torch import Tensor

from ssm_blocks import build
from ssm_blocks.layers.adaptive_rank import (
    allocate_ranks,
    circle,
    coupling,
    frobenius_score,
    hutchinson_traces,
    logdet_score,
    power_series_score,
    reset_optimizer_state,
    truncate_layer,
)
from ssm_blocks.layers.oscillatory import OscillatoryDPLR
from tests.ssm_blocks.mixer_checks import rand, randomised

F64 = torch.float64


def trained(seed: int = 0, coupling_scale: float = 1.0) -> OscillatoryDPLR:
    mixer = build("adaptive_dplr", 8, num_heads=2, state_size=6, rank=4).double()
    assert isinstance(mixer, OscillatoryDPLR)
    randomised(mixer, seed)
    with torch.no_grad():
        assert mixer.P is not None
        mixer.P.mul_(coupling_scale)
    return mixer


def dense_terms(mixer: OscillatoryDPLR, num_points: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, Lambda [H, n, n], A [H, n, n]."""
    with torch.no_grad():
        return circle(num_points), torch.diag_embed(mixer.poles(F64)), mixer.dense(F64)


def test_points_are_the_bilinear_image_of_the_circle() -> None:
    z = circle(16)
    w = (1 + z / 2) / (1 - z / 2)
    torch.testing.assert_close(w.abs(), torch.ones(16, dtype=F64))
    gaps = torch.view_as_complex(torch.view_as_real(w)).angle().sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((15,), 2 * torch.pi / 16, dtype=F64))


def test_logdet_is_the_ratio_of_dense_determinants() -> None:
    mixer = trained()
    z, Lambda, A = dense_terms(mixer, 8)
    eye = torch.eye(6, dtype=A.dtype)
    ratio = [torch.linalg.slogdet(p * eye - A).logabsdet - torch.linalg.slogdet(p * eye - Lambda).logabsdet for p in z]
    assert logdet_score(mixer, 8) == pytest.approx(torch.stack(ratio).abs().mean().item(), rel=1e-9)


def test_power_series_agrees_where_it_converges_and_says_where_not() -> None:
    weak = trained(coupling_scale=0.02)
    series = power_series_score(weak)
    assert series.converges
    with torch.no_grad():
        exact = logdet_score(weak)
    assert series.score == pytest.approx(exact, rel=1e-3)
    strong = power_series_score(trained(coupling_scale=5))
    assert not strong.converges
    assert strong.score > 10 * logdet_score(trained(coupling_scale=5))


def test_frobenius_is_the_dense_norm_and_sees_nilpotent_coupling() -> None:
    mixer = trained()
    z, Lambda, A = dense_terms(mixer, 8)
    eye = torch.eye(6, dtype=A.dtype)
    norms = [torch.linalg.matrix_norm(torch.linalg.inv(p * eye - Lambda) @ (Lambda - A)) for p in z]
    assert frobenius_score(mixer, 8) == pytest.approx(torch.stack(norms).square().mean().sqrt().item(), rel=1e-9)

    class Nilpotent(OscillatoryDPLR):
        """P Q^* with Q^* R P strictly triangular at every z: P = e_1, Q = e_2."""

        def low_rank(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
            unit = torch.eye(6, dtype=torch.complex128).expand(2, 6, 6)
            return unit[..., :1], unit[..., 1:2]

    nilpotent = Nilpotent(8, num_heads=2, state_size=6).double()
    assert logdet_score(nilpotent) == pytest.approx(0, abs=1e-12)
    assert frobenius_score(nilpotent) > 0.1


def test_hutchinson_agrees_with_the_exact_traces() -> None:
    mixer = trained()
    samples = hutchinson_traces(mixer, 4000, torch.Generator().manual_seed(0), num_points=3)
    exact = coupling(mixer, 3).diagonal(dim1=-2, dim2=-1).sum(-1)
    error = (samples.mean(-1) - exact).abs()
    spread = torch.view_as_real(samples).var(-2).sum(-1).sqrt() / 4000**0.5
    assert (error < 4 * spread).all()


def test_allocation_spends_the_budget() -> None:
    assert allocate_ranks([10.0, 1.0, 1.0, 0.0], 16, r_max=8) == [8, 4, 3, 1]
    assert allocate_ranks([0.0] * 4, 4, r_max=8) == [1, 1, 1, 1]
    assert allocate_ranks([1e308] * 4, 16, r_max=8) == [4] * 4  # the sum of these is no float
    assert allocate_ranks([1.0] * 3, 3, r_max=8) == [1] * 3
    assert allocate_ranks([1.0] * 3, 24, r_max=8) == [8] * 3
    for budget in (3, 33):
        with pytest.raises(ValueError, match=r"4\.\.32"):
            allocate_ranks([1.0] * 4, budget, r_max=8)
    with pytest.raises(ValueError, match="whole numbers"):
        allocate_ranks([1.0] * 4, 8.5, r_max=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        allocate_ranks([float("nan"), 1.0], 4, r_max=8)


def test_layers_without_a_coupling() -> None:
    bare = build("oscillatory_diagonal", 8)
    assert isinstance(bare, OscillatoryDPLR)
    assert logdet_score(bare) == frobenius_score(bare) == 0
    assert power_series_score(bare) == (0, 0)
    with pytest.raises(ValueError, match="no coupling"):
        truncate_layer(bare, 1)
    for function in (logdet_score, lambda layer: truncate_layer(layer, 1)):
        with pytest.raises(ValueError, match="got a DeltaNet"):
            function(build("deltanet", 8))  # type: ignore[arg-type]
    assert build("adaptive_dplr", 8, state_size=4).rank == 4  # never above the state


def test_truncation_keeps_what_matters_and_stays_stable() -> None:
    for seed in range(20):
        mixer = trained(seed, coupling_scale=3)
        before = mixer.dense(F64).detach()
        truncate_layer(mixer, mixer.rank)
        torch.testing.assert_close(mixer.dense(F64).detach(), before, atol=1e-10, rtol=0)
        errors = []
        for rank in (3, 2, 1):
            truncate_layer(mixer, rank)
            with torch.no_grad():
                assert mixer.rank == rank
                A = mixer.dense(F64)
                assert torch.linalg.eigvalsh(A + A.mH).max() <= 1e-10
                assert torch.linalg.matrix_norm(mixer.discrete(F64)[0], 2).max() <= 1 + 1e-9
                errors.append(torch.linalg.matrix_norm(A - before).mean().item())
        assert errors == sorted(errors)
        with torch.no_grad():
            nothing = torch.linalg.matrix_norm(torch.diag_embed(mixer.poles(F64)) - before).mean().item()
        assert errors[0] < 0.7 * nothing
    with pytest.raises(ValueError, match=r"1\.\.1"):
        truncate_layer(mixer, 2)


def test_only_the_replaced_parameters_lose_their_optimizer_state() -> None:
    mixer = trained()
    optimizer = torch.optim.Adam(mixer.parameters())
    x = rand(1, 20, 8)
    mixer(x).square().sum().backward()
    optimizer.step()
    kept = {p: optimizer.state[p]["exp_avg"].clone() for n, p in mixer.named_parameters() if n not in ("P", "X", "K")}
    replaced = truncate_layer(mixer, 2)
    assert set(replaced) == {"P", "X", "K"}
    reset_optimizer_state(optimizer, replaced)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in mixer.parameters()}
    assert all(torch.equal(optimizer.state[p]["exp_avg"], value) for p, value in kept.items())
    assert all(new not in optimizer.state for _, new in replaced.values())
    optimizer.zero_grad()
    mixer(x).square().sum().backward()
    optimizer.step()
    assert mixer.P in optimizer.state
