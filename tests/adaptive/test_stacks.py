"""Many matrices moved at once, against one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from adaptive_toy import Toy, backward, make_toy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from svdtrain.adaptive import stacks
from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.adaptive.moments import PerMatrix, UnknownState, inverse_cholesky, state_from_factors, state_to_factors
from svdtrain.adaptive.stacks import states_between_factors, states_from_factors, states_to_factors
from svdtrain.adaptive.transitions import Move
from svdtrain.config import SVDConfig
from svdtrain.optim import MuonAdamW
from svdtrain.spectral.decompose import LinAlgError, decompose

SHAPES = [(9, 7, 3), (7, 9, 3), (9, 7, 3), (9, 7, 4), (9, 7, 3)]  # m, n, r


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def muon_state(m: int, n: int, seed: int) -> dict[str, Any]:
    reduced = random(*((m, 1) if m >= n else (1, n)), seed=seed + 50).square()
    return {"momentum_buffer": random(m, n, seed=seed), "second_momentum_buffer": reduced}


def adam_state(m: int, n: int, seed: int) -> dict[str, Any]:
    first, second = random(m, n, seed=seed), random(m, n, seed=seed + 50).square()
    return {"step": torch.tensor(float(seed)), "exp_avg": first, "exp_avg_sq": second, "kind": "adam"}


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-12)
            assert got[key].untyped_storage().nbytes() == got[key].nbytes  # no row of a stack
        else:
            assert got[key] == value


def many() -> tuple[list[dict[str, Any]], list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """States of matrices of several shapes, ranks and optimizers in one list; their factors, and other ones."""
    kinds = (muon_state, adam_state)
    states, old, new = [], [], []
    for seed, (kind, (m, n, r)) in enumerate((kind, shape) for shape in SHAPES for kind in kinds):
        states.append(kind(m, n, seed))
        old.append((random(m, r, seed=100 + seed), random(r, n, seed=200 + seed)))
        new.append((random(m, r - 1, seed=300 + seed), random(r - 1, n, seed=400 + seed)))
    return states, old, new


@pytest.mark.parametrize("limit", [1, 2 * 9 * 7, 1 << 26])
def test_stacked_maps_equal_one_by_one(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """To the factors, to other factors, and back; in stacks of one, of two at most, and of all that are alike."""
    monkeypatch.setattr(stacks, "_MAX_STACK_ELEMENTS", limit)
    states, old, new = many()
    pairs = states_to_factors(states, old)
    expected = [state_to_factors(state, *factors) for state, factors in zip(states, old, strict=True)]
    for pair, wanted in zip(pairs, expected, strict=True):
        assert not isinstance(pair, UnknownState)
        assert_same(pair[0], wanted[0])
        assert_same(pair[1], wanted[1])
    whole = [state_from_factors(*pair, *factors) for pair, factors in zip(expected, old, strict=True)]
    for state, wanted in zip(states_from_factors(expected, old), whole, strict=True):
        assert not isinstance(state, UnknownState)
        assert_same(state, wanted)
    for pair, state, factors in zip(states_between_factors(expected, old, new), whole, new, strict=True):
        assert not isinstance(pair, UnknownState)
        for got, wanted in zip(pair, state_to_factors(state, *factors), strict=True):
            assert_same(got, wanted)


def test_an_unknown_state_spoils_only_its_own_kind() -> None:
    states, factors, _ = many()
    states[1]["hessian"] = torch.zeros(9, 7)
    outcomes = states_to_factors([*states, None], [*factors, factors[0]])
    assert [isinstance(outcome, UnknownState) for outcome in outcomes] == [i == 1 for i in range(len(states) + 1)]
    assert "of shape (9, 7)" in str(outcomes[1])
    assert outcomes[-1] == ({}, {})


def test_step_counts_are_not_shared() -> None:
    """An optimizer counts in place."""
    states, factors, _ = many()
    ((state_B, state_A),) = states_to_factors([states[1]], [factors[1]])  # type: ignore[misc]
    assert float(state_B["step"]) == float(state_A["step"]) == 1
    assert len({id(state_B["step"]), id(state_A["step"]), id(states[1]["step"])}) == 3
    assert not isinstance(state_B["step"], PerMatrix)


@pytest.mark.parametrize("r", [1, 7, 12])
def test_inverse_cholesky_by_blocks(r: int) -> None:
    X = random(3, r, r + 2, seed=r)
    H = X @ X.mT
    expected = torch.linalg.inv(torch.linalg.cholesky(H))
    for block in (2, 5, 64):
        torch.testing.assert_close(inverse_cholesky(H, block), expected, rtol=1e-10, atol=1e-10)
    H[1] -= 2 * torch.linalg.eigvalsh(H[1])[-1] * torch.eye(r)
    with pytest.raises(LinAlgError):
        inverse_cholesky(H, 5)


def optimizer_for(model: Toy, kind: str) -> torch.optim.Optimizer:
    """Attention by one optimizer; of the MLP one layer by another rule of the same optimizer."""
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "c_fc" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "c_fc" in name]
    return MuonAdamW([{"params": matrices, "kind": "muon", "lr": 0.02}, {"params": rest, "kind": "adamw", "lr": 0.01}])


def trained(kind: str, adapter: str, moments: str) -> tuple[Toy, torch.optim.Optimizer, AdaptiveSVD]:
    model = make_toy()
    optimizer = optimizer_for(model, kind)
    config = SVDConfig(svd_preset="off", svd_targets="all", svd_adapter=adapter, svd_moments=moments)  # type: ignore[arg-type]
    svd = AdaptiveSVD(model, optimizer, config)
    for step in range(3):
        one_step(model, optimizer, svd, step)
    return model, optimizer, svd


def one_step(model: Toy, optimizer: torch.optim.Optimizer, svd: AdaptiveSVD, step: int) -> None:
    backward(model, step)
    svd.project_gradients()
    optimizer.step()
    svd.after_step(step)
    optimizer.zero_grad()


def moves(svd: AdaptiveSVD, ranks: Sequence[int | None]) -> list[Move]:
    out = []
    for i, target in enumerate(svd.targets.values()):
        r = ranks[i % len(ranks)]
        out.append(Move(target=target, r=r, decomposition=None if r is None else decompose(target.W)))
    return out


def everything(svd: AdaptiveSVD, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = svd.state_dict()
    parts = {name: target["factors"] for name, target in state["targets"].items()}
    return {"factors": parts, "adapter": state["adapter"], "optimizer": optimizer.state_dict()["state"]}


@pytest.mark.parametrize("moments", ["map", "reset"])
@pytest.mark.parametrize("adapter", ["reregister", "shadow"])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_one_decision_equals_its_moves_one_by_one(kind: str, adapter: str, moments: str) -> None:
    """Mixed shapes, ranks, rules and directions: some enter, some change rank, some leave, some stay as they are."""
    (model, optimizer, svd), (_, other_optimizer, other) = (trained(kind, adapter, moments) for _ in range(2))
    weights = [p.detach().clone() for p in model.parameters()]
    for ranks in ([8, 6, None], [None, 6, 8, 5], [7], [None]):
        svd._transitions.carry_out(moves(svd, ranks))
        for move in moves(other, ranks):
            other._transitions.carry_out([move])
        torch.testing.assert_close(everything(svd, optimizer), everything(other, other_optimizer), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(p.detach(), W) for p, W in zip(model.parameters(), weights, strict=True))
    one_step(model, optimizer, svd, 3)


class Count(TorchDispatchMode):
    """Factorisations and operations at all."""

    def __init__(self) -> None:
        super().__init__()
        self.cholesky = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.cholesky += "cholesky" in str(func)
        return func(*args, **(kwargs or {}))


def test_matrices_of_a_kind_share_their_factorisations() -> None:
    """All are recomputed: one factorisation a shape, however many matrices there are."""
    _, _, svd = trained("adamw", "reregister", "map")
    svd._transitions.carry_out(moves(svd, [8]))
    again = moves(svd, [7])
    with Count() as counted:
        svd._transitions.carry_out(again)
    assert counted.cholesky == len({target.W.shape for target in svd.targets.values()}) == 3
    alone = moves(svd, [7])[:1]
    with Count() as single:
        svd._transitions.carry_out(alone)
    assert counted.all < len(again) * single.all / 2
