"""Many low-rank matrices at once take the step that each takes alone, in few launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svdtrain.adaptive import products, stacks
from svdtrain.adaptive.attach import AttachedSVD, attach
from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.update_rules import State, adam_step, adamw_step, muon_step, orthogonalise, sgd_step
from svdtrain.config import SVDConfig
from svdtrain.spectral.decompose import decompose

# Equal ones, ones that are padded to the next, ones that stand alone.
SHAPES = ((24, 6), (6, 24), (24, 6), (5, 24), (24, 5), (24, 6), (4, 24), (6, 24), (16, 16), (24, 20))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
GROUPS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "kind": "muon"},
    "plain_muon": {"lr": 0.02, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    "adamw": {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
    "amsgrad": {"lr": 0.01, "betas": (0.9, 0.99), "amsgrad": True, "maximize": True},
    "adam": {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1},
    "sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "plain_sgd": {"lr": 0.05},
}
RULES = {
    **dict.fromkeys(("muon", "plain_muon"), muon_step),
    **dict.fromkeys(("adamw", "amsgrad"), adamw_step),
    **dict.fromkeys(("sgd", "plain_sgd"), sgd_step),
    "adam": adam_step,
}


def polar(X: Tensor) -> Tensor:
    """Five quintic steps on one matrix, from the definition."""
    X = X / X.norm()
    for _ in range(5):
        X = 3.4445 * X - 4.7750 * (X @ X.T) @ X + 2.0315 * (X @ X.T) @ (X @ X.T) @ X
    return X * math.sqrt(min(X.shape)) / X.norm()


def naive_muon(p: Tensor, G: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    momentum = group.get("momentum", 0.95)
    M = state["M"] = momentum * state.get("M", torch.zeros_like(p)) + (1 - momentum) * G
    update = polar((1 - momentum) * G + momentum * M if group.get("nesterov", True) else M)
    m, n = p.shape
    scale = 0.2 * max(m, n) ** 0.5 if "adjust_lr_fn" in group else max(1.0, m / n) ** 0.5
    return p * (1 - group["lr"] * group.get("weight_decay", 0.0)) - group["lr"] * scale * update


def naive_adam(p: Tensor, G: Tensor, state: State, group: dict[str, Any], *, decoupled: bool) -> Tensor:
    (beta1, beta2), decay = group["betas"], group.get("weight_decay", 0.0)
    G = -G if group.get("maximize") else G
    G = G if decoupled else G + decay * p
    t = state["t"] = state.get("t", 0) + 1
    M = state["M"] = beta1 * state.get("M", 0) + (1 - beta1) * G
    v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * G * G
    if group.get("amsgrad"):
        v = state["largest"] = torch.maximum(v, state.get("largest", torch.zeros_like(v)))
    p = p * (1 - group["lr"] * decay) if decoupled else p
    return p - group["lr"] * (M / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)


def naive_sgd(p: Tensor, G: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    G = G + group.get("weight_decay", 0.0) * p
    momentum = group.get("momentum", 0.0)
    M = state["M"] = momentum * state["M"] + G if "M" in state else G
    return p - group["lr"] * (G + momentum * M if group.get("nesterov") else M if momentum else G)


def naive(kind: str) -> Callable[[Tensor, Tensor, State], Tensor]:
    group = GROUPS[kind]
    if "muon" in kind:
        return lambda p, G, state: naive_muon(p, G, state, group)
    if "sgd" in kind:
        return lambda p, G, state: naive_sgd(p, G, state, group)
    return lambda p, G, state: naive_adam(p, G, state, group, decoupled=kind != "adam")


@pytest.mark.parametrize("limit", [1 << 26, 300])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", GROUPS)
def test_a_step_of_many_is_the_step_of_each(
    kind: str, dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_MAX_STACK_ELEMENTS", limit)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    params = [nn.Parameter(t.to(dtype)) for t in start]
    alone = [p.detach().double().clone() for p in params]
    states: list[State] = [{} for _ in params]
    alone_states: list[State] = [{} for _ in params]
    for step in range(4):
        # One joins later, so that states of different ages meet in a list.
        taking_part = range(1 if step == 0 else 0, len(params))
        for i in taking_part:
            params[i].grad = torch.randn(SHAPES[i], generator=generator, dtype=torch.float64).to(dtype)
        grads = [None if p.grad is None else p.grad.double().clone() for p in params]
        RULES[kind]([params[i] for i in taking_part], [states[i] for i in taking_part], GROUPS[kind])
        for i in taking_part:
            alone[i] = naive(kind)(alone[i], grads[i], alone_states[i])
    for p, expected in zip(params, alone, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=4 * TOLERANCES[dtype])


def test_float32_momentum_of_16_bit_weights_is_stepped() -> None:
    params = [nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16)) for _ in range(2)]
    states: list[State] = [{"momentum_buffer": torch.ones(6, 4)} for _ in params]
    for p in params:
        p.grad = torch.ones_like(p)
    sgd_step(params, states, {"lr": 0.5, "momentum": 0.5})
    for p, state in zip(params, states, strict=True):
        assert torch.equal(state["momentum_buffer"], torch.full((6, 4), 1.5))
        assert torch.equal(p.detach(), torch.full_like(p, 0.25))


@pytest.mark.parametrize("shape", [(3, 12, 5), (3, 5, 12), (2, 2, 6, 6)])
def test_stacks_are_orthogonalised_matrix_by_matrix(shape: tuple[int, ...]) -> None:
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X[0] *= 1e-3
    X[-1].zero_()
    together = orthogonalise(X)
    assert together.is_contiguous()
    for one, result in zip(X.flatten(0, -3), together.flatten(0, -3), strict=True):
        expected = polar(one) if one.any() else one
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def factored(dtype: torch.dtype, ranks: tuple[int, ...] = (4, 4, 3, 4, 4, 4, 4)) -> list[FactoredWeight]:
    """The second of seven has another shape, the third another rank."""
    lowrank = []
    for i, r in enumerate(ranks):
        shape = (12, 9) if i == 1 else (9, 12)
        W = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(dtype))
        W.grad = torch.randn(shape, generator=torch.Generator().manual_seed(100 + i)).to(dtype)
        lowrank.append(FactoredWeight.split(W, decompose(W), r))
    return lowrank


def nudge(lowrank: list[FactoredWeight]) -> None:
    with torch.no_grad():
        for factors in lowrank:
            factors.B.add_(0.1)
            factors.A.mul_(1.1)


@pytest.mark.parametrize("limit", [1 << 26, 4 * 9 * 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_and_merge_of_many_are_those_of_each(
    dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_MAX_STACK_ELEMENTS", limit)
    together, alone = factored(dtype), factored(dtype)
    for lowrank in (together, alone):
        lowrank[3].W.grad = None
        lowrank[3].B.grad = torch.ones_like(lowrank[3].B)
        nudge(lowrank)
    products.project_gradients(together)
    products.merge(together)
    tolerance = 1e-2 if dtype == torch.bfloat16 else TOLERANCES[dtype] * 10
    for one, other in zip(together, alone, strict=True):
        other.project_gradient()
        other.merge()
        torch.testing.assert_close(one.W, other.W, rtol=tolerance, atol=tolerance)
        if one is together[3]:
            assert one.B.grad is one.A.grad is None
            continue
        torch.testing.assert_close(one.B.grad, other.B.grad, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(one.A.grad, other.A.grad, rtol=tolerance, atol=tolerance)


def test_tensors_of_one_factor_lie_alike() -> None:
    """torch's operations over lists fall back to one launch for each tensor where strides differ."""
    lowrank = factored(torch.float32)
    products.project_gradients(lowrank)
    for factors in lowrank:
        W_p, B, A = factors.W_p, factors.B.detach(), factors.A.detach()
        restored = FactoredWeight.restored(factors.W, W_p, B, A.T.contiguous().T)
        refactored = FactoredWeight.split(factors.W, decompose(factors.W), 2)
        refactored.refactor(decompose(factors.W), factors.r)
        for like in (factors, restored, refactored):
            assert all(t.is_contiguous() for t in (like.B, like.A, like.W_p))
        assert factors.B.grad is not None
        assert factors.A.grad is not None
        assert factors.B.grad.is_contiguous()
        assert factors.A.grad.is_contiguous()


def test_each_update_is_matched_to_its_own_norm() -> None:
    lowrank = factored(torch.float64)
    lowrank[3].W.grad = None
    before = [factors.W.detach().clone() for factors in lowrank]
    products.project_gradients(lowrank)
    kept = products.remember(lowrank)
    moved = [factors for factors in lowrank if factors is not lowrank[3]]
    nudge(moved)
    norms = {id(factors): 0.5 + i for i, factors in enumerate(lowrank)}
    untouched = lowrank[3].B.detach().clone()
    products.match_updates(kept, lambda some, W: torch.tensor([norms[id(factors)] for factors in some]))
    products.merge(lowrank)
    assert torch.equal(lowrank[3].B, untouched)
    for factors, W in zip(lowrank, before, strict=True):
        if factors is not lowrank[3]:
            assert float((factors.W.detach() - W).norm()) == pytest.approx(norms[id(factors)], rel=1e-6)


def test_without_a_step_nothing_is_scaled() -> None:
    lowrank = factored(torch.float64)
    products.project_gradients(lowrank)
    kept = products.remember(lowrank)
    before = [factors.B.detach().clone() for factors in lowrank]
    products.match_updates(kept, lambda some, W: torch.ones(len(some)))
    assert all(torch.equal(factors.B, B) for factors, B in zip(lowrank, before, strict=True))


def test_runs_of_equals_keep_order_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_MAX_STACK_ELEMENTS", 10)
    assert stacks.runs_of_equals("abaabc", [4, 1, 5, 2, 20, 3]) == [[0, 2], [1], [3], [4], [5]]
    assert stacks.runs_of_equals([], []) == []


class Many(nn.Module):
    """Matrices without a network; gradients are written by hand."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.ModuleDict({"c_q": nn.Linear(16, 16, bias=False)}) for _ in range(num)])


class StillMuon(torch.optim.Optimizer):
    """A Muon host whose own step does nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__([{"params": list(params), **GROUPS["muon"]}], defaults={})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class Launches(TorchDispatchMode):
    """Counts what would be launched: no views, no reading of CPU counters."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += not (func.is_view or "_local_scalar_dense" in str(func))
        return func(*args, **(kwargs or {}))


def many(num: int, host: Callable[[Any], torch.optim.Optimizer], match: bool = False) -> AttachedSVD:
    torch.manual_seed(0)
    model = Many(num)
    config = SVDConfig(svd_preset="off", svd_targets=r"c_q", svd_match_rms=match)
    svd = attach(model, host(model.parameters()), config)
    for name in reversed(svd.targets):  # not the order of the targets
        svd.set_mode(name, 8)
    return svd


def step(svd: AttachedSVD, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for target in svd.targets.values():
        target.W.grad = torch.randn(16, 16, generator=generator)
    svd._optimizer.step()


@pytest.mark.parametrize("match", [False, True])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_launches_of_a_step_do_not_grow_with_the_number_of_matrices(kind: str, match: bool) -> None:
    def launches(num: int) -> int:
        svd = many(num, StillMuon if kind == "muon" else lambda p: torch.optim.AdamW(p, foreach=True), match)
        step(svd, 0)
        with Launches() as counted:
            step(svd, 1)
        return counted.num - num  # the gradients

    assert launches(12) == launches(5) < 220


def test_nearly_equal_ranks_share_launches() -> None:
    params = [nn.Parameter(torch.ones(shape)) for r in (17, 18, 19, 20, 21, 20) for shape in ((32, r), (r, 32))]
    for p in params:
        p.grad = torch.ones_like(p)
    with Launches() as alone:
        muon_step(params[:1], [{}], GROUPS["muon"])
    with Launches() as together:
        muon_step(params, [{} for _ in params], GROUPS["muon"])
    assert together.num < 6 * alone.num


def test_stacks_do_not_follow_the_order_of_switching() -> None:
    """After a resume the matrices are known in the order of the targets; batches must be the same as without it."""
    seen: list[list[int]] = []
    svd = many(3, StillMuon)
    order = [id(t) for target in svd.targets.values() for t in (target.factors.B, target.factors.A)]

    def spy(params: Any, states: Any, group: Any) -> None:
        seen.append([id(p) for p in params])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svdtrain.adaptive.shadow.rule_for", lambda group, optimizer: (spy, frozenset()))
        step(svd, 0)
    assert seen == [order]


def test_a_matrix_without_gradient_is_left_alone() -> None:
    svd = many(3, StillMuon)
    step(svd, 0)
    idle, *others = svd.targets.values()
    before = [factor.detach().clone() for factor in (idle.factors.B, idle.factors.A)]
    state = {part: dict(values) for part, values in svd.state_dict()["adapter"][idle.name].items()}
    buffer = state["B"]["momentum_buffer"].clone()
    moving = others[0].factors.B.detach().clone()
    for target in others:
        target.W.grad = torch.ones(16, 16)
    idle.W.grad = None
    svd._optimizer.step()
    assert torch.equal(idle.factors.B, before[0])
    assert torch.equal(idle.factors.A, before[1])
    assert torch.equal(svd.state_dict()["adapter"][idle.name]["B"]["momentum_buffer"], buffer)
    assert not torch.equal(others[0].factors.B, moving)
