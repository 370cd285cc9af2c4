"""Protection that lets W keep its optimizer: core and activation; and the choice of singular directions."""

from __future__ import annotations

import copy

import pytest
import torch
from adaptive_toy import WIDTH, backward, make_toy
from torch import Tensor, nn

from svdtrain.adaptive.attach import attach
from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.adaptive.factors import FactoredWeight, trained_columns
from svdtrain.adaptive.guard import UpdateGuard
from svdtrain.config import SVDConfig
from svdtrain.spectral.decompose import decompose

Q = "h.0.attn.c_q"


def covariance(seed: int = 0, n: int = WIDTH) -> Tensor:
    scale = torch.linspace(3, 0.1, n)
    X = torch.randn(500, n, generator=torch.Generator().manual_seed(seed)) * scale
    return X.T @ X / 500


def one_step(config: SVDConfig, C: Tensor | None = None, r: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """W before, the update applied in low-rank mode, and the update of a plain run."""
    updates = []
    for guarded in (True, False):
        model = make_toy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        svd = AdaptiveSVD(model, optimizer, config)
        if C is not None:
            svd.set_references({Q: C})
        if guarded:
            svd.set_mode(Q, r)
        W = svd.targets[Q].W
        before = W.detach().clone()
        backward(model, 0)
        svd.project_gradients()
        optimizer.step()
        svd.after_step(0)
        updates.append(W.detach() - before)
    return before, updates[0], updates[1]


def test_core_takes_out_the_principal_principal_block_only() -> None:
    W, got, plain = one_step(SVDConfig(svd_preset="off", svd_protect="core"))
    U, _, Vh = torch.linalg.svd(W)
    D, expected = U.T @ got @ Vh.T, U.T @ plain @ Vh.T
    assert float(expected[:8, :8].norm()) > 1e-3
    expected[:8, :8] = 0
    torch.testing.assert_close(D, expected, rtol=0, atol=1e-6)


def test_activation_hard_leaves_the_reference_inputs_alone() -> None:
    C = covariance()
    _, got, plain = one_step(SVDConfig(svd_preset="off", svd_protect="activation", svd_protect_share=0.25), C)
    Q_C = torch.linalg.eigh(C.double()).eigenvectors.flip(-1).float()
    P = Q_C[:, : WIDTH // 4]
    assert float((plain @ P).norm()) > 1e-3
    torch.testing.assert_close(got @ P, torch.zeros(WIDTH, WIDTH // 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(got, plain - plain @ P @ P.T, rtol=0, atol=1e-6)


def test_activation_soft_shrinks_by_the_eigenvalue() -> None:
    C = covariance()
    config = SVDConfig(svd_preset="off", svd_protect="activation", svd_protect_strength=4.0)
    _, got, plain = one_step(config, C)
    values, vectors = torch.linalg.eigh(C.double())
    M = (vectors * (1 / (1 + 4 * values / values.mean()))) @ vectors.T
    torch.testing.assert_close(got, plain @ M.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("protect", ["core", "activation"])
def test_match_rms_restores_the_norm(protect: str) -> None:
    config = SVDConfig(svd_preset="off", svd_protect=protect, svd_match_rms=True)  # type: ignore[arg-type]
    _, got, plain = one_step(config, covariance() if protect == "activation" else None)
    assert float(got.norm()) == pytest.approx(float(plain.norm()), rel=1e-4)
    assert not torch.allclose(got, plain, atol=1e-4)


def test_guard_needs_no_change_of_the_optimizer_and_survives_a_save() -> None:
    model = make_toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    svd = attach(model, optimizer, SVDConfig(svd_preset="off", svd_protect="activation"))
    svd.set_references({Q: covariance()})
    svd.set_mode(Q, 12)
    assert svd.parameters_by_name() == {}
    assert svd.summary()["ranks"] == {Q: WIDTH - WIDTH // 4}
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    saved = copy.deepcopy((svd.state_dict(), optimizer.state_dict(), model.state_dict()))
    losses = []
    for run in range(2):
        if run == 1:
            svd.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            model.load_state_dict(saved[2])
        for step in range(3, 6):
            optimizer.zero_grad()
            losses.append(float(backward(model, step)))
            optimizer.step()
    assert losses[:3] == losses[3:]
    before = svd.targets[Q].guard
    svd.set_references({Q: covariance(seed=5)})  # a new reference replaces the guard in force
    assert svd.targets[Q].guard is not before
    svd.set_mode(Q, None)
    assert not svd.targets[Q].lowrank


def test_activation_without_a_reference_warns_and_stays_full(caplog: pytest.LogCaptureFixture) -> None:
    model = make_toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = SVDConfig(svd_protect="activation", svd_rule="original", svd_interval=1, svd_warmup=0, svd_engine="exact")
    svd = AdaptiveSVD(model, optimizer, config)
    U, _, Vh = torch.linalg.svd(svd.targets[Q].W.detach())
    backward(model, 0)
    svd.targets[Q].W.grad = torch.outer(U[:, 0], Vh[0])  # an attack on the top direction
    with caplog.at_level("WARNING"):
        assert all(change.name != Q for change in svd.after_step(0))
    assert any("nothing is known of its inputs" in event["message"] for event in svd.events() if event["name"] == Q)
    with pytest.raises(ValueError, match="set_references"):
        svd.set_mode(Q, 5)
    with pytest.raises(ValueError, match="not watched"):
        svd.set_references({"nope": covariance()})
    with pytest.raises(ValueError, match="must be 20 x 20"):
        svd.set_references({Q: covariance(n=7)})


def test_core_rank_is_checked() -> None:
    W = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="r must lie in"):
        UpdateGuard.core(W, decompose(W), 6)


def test_trained_columns() -> None:
    def columns(protect: str, r: int) -> list[int]:
        return torch.arange(10)[trained_columns(protect, 10, r)].tolist()

    assert columns("minor", 3) == [7, 8, 9]
    assert columns("principal", 3) == [0, 1, 2]
    assert columns("middle", 4) == [3, 4, 5, 6]
    random = columns("random", 5)
    assert random == columns("random", 5) == sorted(set(random))
    assert set(columns("random", 3)) <= set(random)
    with pytest.raises(ValueError, match="does not name"):
        trained_columns("core", 10, 3)


@pytest.mark.parametrize("protect", ["minor", "principal", "middle", "random"])
def test_split_by_any_choice_is_exact(protect: str) -> None:
    W = nn.Parameter(torch.randn(12, 9, generator=torch.Generator().manual_seed(0)))
    before = W.detach().clone()
    factors = FactoredWeight.split(W, decompose(W), 4, protect)
    assert torch.equal(W, before)
    assert factors.split_error() < 1e-6
    S = torch.linalg.svdvals(before)[trained_columns(protect, 9, 4)]
    torch.testing.assert_close(torch.linalg.svdvals(factors.B.detach() @ factors.A.detach())[:4], S, rtol=0, atol=1e-4)
