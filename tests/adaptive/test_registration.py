"""B and A take W's place in the optimizer; nobody else notices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adaptive_toy import Toy, backward, make_toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from svdtrain.adaptive.attach import attach
from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.adaptive.moments import first_to_factors
from svdtrain.config import SVDConfig

QUIET = SVDConfig(svd_preset="off", svd_targets="all")


class LikeMuonAdamW(torch.optim.Optimizer):
    """The state and group keys of a combined optimizer: `kind`, per-parameter buffers, a reduced second moment."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                (self._muon if group["kind"] == "muon" else self._sgd)(p, group)

    def _muon(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[p]
        m, n = p.shape
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
            state["second_momentum_buffer"] = p.new_zeros((m, 1) if m >= n else (1, n))
        assert p.grad is not None
        state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        U, _, Vh = torch.linalg.svd(state["momentum_buffer"], full_matrices=False)
        update = U @ Vh
        v = update.square().mean(dim=-1 if m >= n else -2, keepdim=True)
        state["second_momentum_buffer"].lerp_(v, 1 - group["beta2"])
        p.sub_(group["lr"] * update)

    def _sgd(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        assert p.grad is not None
        p.sub_(0.1 * group["lr"] * p.grad)


def combined(model: Toy) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return LikeMuonAdamW(
        [
            {"params": rest, "kind": "adamw", "lr": 0.1, "initial_lr": 0.1},
            {"params": matrices, "kind": "muon", "lr": 0.02, "initial_lr": 0.02, "momentum": 0.9, "beta2": 0.9},
        ]
    )


def torch_muon(model: Toy) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)


OPTIMIZERS: dict[str, Callable[[Toy], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "named": lambda model: torch.optim.AdamW(model.named_parameters(), lr=0.01),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "muon": torch_muon,
    "combined": combined,
}


def train(
    model: Toy, optimizer: torch.optim.Optimizer, svd: AdaptiveSVD | None, steps: int, start: int = 0
) -> list[Tensor]:
    losses = []
    for step in range(start, start + steps):
        losses.append(backward(model, step))
        if svd is not None:
            svd.project_gradients()
        optimizer.step()
        if svd is not None:
            svd.after_step(step)
        optimizer.zero_grad()
    return losses


def owned(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def factors_of(svd: AdaptiveSVD, name: str) -> Any:
    factors = svd.targets[name].factors
    assert factors is not None
    return factors


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_switch_leaves_w_and_every_other_state_untouched(kind: str) -> None:
    model = make_toy()
    optimizer = OPTIMIZERS[kind](model)
    svd = AdaptiveSVD(model, optimizer, QUIET)
    train(model, optimizer, svd, 3)
    W = svd.targets["h.0.attn.c_q"].W
    weights = {id(p): p.detach().clone() for p in model.parameters()}
    objects = {p: dict(state) for p, state in optimizer.state.items() if p is not W}
    values = {p: {k: v.clone() for k, v in s.items() if isinstance(v, Tensor)} for p, s in objects.items()}

    for r in (8, 5, None):  # to low-rank, a rank change, back to full
        svd.set_mode("h.0.attn.c_q", r)
        assert all(torch.equal(p.detach(), weights[id(p)]) for p in model.parameters())
        for p, state in objects.items():
            assert set(optimizer.state[p]) == set(state)
            assert all(optimizer.state[p][key] is value for key, value in state.items())
            assert all(torch.equal(optimizer.state[p][key], value) for key, value in values[p].items())
    assert set(optimizer.state) == {*objects, W} or not objects


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_through_switches(kind: str) -> None:
    model = make_toy()
    optimizer = OPTIMIZERS[kind](model)
    svd = AdaptiveSVD(model, optimizer, QUIET)
    train(model, optimizer, svd, 2)
    svd.set_mode("h.0.attn.c_q", 8)
    svd.set_mode("h.1.mlp.c_fc", 12)
    before = svd.targets["h.0.attn.c_q"].W.detach().clone()
    losses = train(model, optimizer, svd, 1, start=2)  # the very next step is taken
    assert not torch.equal(svd.targets["h.0.attn.c_q"].W, before)
    svd.set_mode("h.0.attn.c_q", 6)
    losses += train(model, optimizer, svd, 6, start=3)
    svd.set_mode("h.0.attn.c_q", None)
    losses += train(model, optimizer, svd, 6, start=9)
    assert all(bool(loss.isfinite()) for loss in losses)
    assert float(torch.stack(losses[-3:]).mean()) < float(losses[0])


@pytest.mark.parametrize("kind", ["momentum", "muon", "combined", "adamw"])
def test_momentum_is_mapped_by_the_chain_rule(kind: str) -> None:
    model = make_toy()
    optimizer = OPTIMIZERS[kind](model)
    svd = AdaptiveSVD(model, optimizer, QUIET)
    train(model, optimizer, svd, 3)
    W = svd.targets["h.0.attn.c_q"].W
    key = "exp_avg" if kind == "adamw" else "momentum_buffer"
    M = optimizer.state[W][key].clone()
    svd.set_mode("h.0.attn.c_q", 8)
    factors = factors_of(svd, "h.0.attn.c_q")
    expected = first_to_factors(M, factors.B.detach(), factors.A.detach())
    for factor, wanted in zip((factors.B, factors.A), expected, strict=True):
        torch.testing.assert_close(optimizer.state[factor][key], wanted, rtol=0, atol=1e-6)
    assert W not in optimizer.state
    svd.set_mode("h.0.attn.c_q", None)  # back: the same momentum seen through the same factors
    got = first_to_factors(optimizer.state[W][key], factors.B.detach(), factors.A.detach())
    for part, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-6)


def test_reset_starts_factors_without_state() -> None:
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_preset="off", svd_moments="reset"))
    train(model, optimizer, svd, 3)
    svd.set_mode("h.0.attn.c_q", 8)
    factors = factors_of(svd, "h.0.attn.c_q")
    assert factors.B not in optimizer.state
    train(model, optimizer, svd, 1)
    assert float(optimizer.state[factors.B]["step"]) == 1
    svd.set_mode("h.0.attn.c_q", None)
    assert factors.W not in optimizer.state
    assert factors.B not in optimizer.state


def test_unknown_state_restarts_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    svd = AdaptiveSVD(model, optimizer, QUIET)
    train(model, optimizer, svd, 1)
    W = svd.targets["h.0.attn.c_q"].W
    optimizer.state[W]["hessian"] = torch.zeros(W.shape)
    with caplog.at_level("WARNING"):
        svd.set_mode("h.0.attn.c_q", 8)
    assert "'hessian'" in caplog.text
    assert factors_of(svd, "h.0.attn.c_q").B not in optimizer.state


names = st.sampled_from(["h.0.attn.c_q", "h.0.attn.c_proj", "h.1.attn.c_v", "h.1.mlp.c_fc"])
moves = st.lists(st.tuples(names, st.sampled_from([None, 4, 9])), max_size=12)


def layout(svd: AdaptiveSVD, model: Toy, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    found = {id(p): name for name, p in model.named_parameters()}
    found |= {id(p): name for name, p in svd.parameters_by_name().items()}
    return [[found[id(p)] for p in group["params"]] for group in optimizer.param_groups]


@settings(deadline=None, max_examples=30)
@given(moves=moves)
def test_layout_depends_on_the_modes_and_not_on_history(moves: list[tuple[str, int | None]]) -> None:
    model = make_toy()
    optimizer = combined(model)
    plain = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    svd = AdaptiveSVD(model, optimizer, QUIET)
    final: dict[str, int] = {}
    for name, r in moves:
        svd.set_mode(name, r)
        final.pop(name, None)
        if r is not None:
            final[name] = r

    other = make_toy()
    other_optimizer = combined(other)
    other_svd = AdaptiveSVD(other, other_optimizer, QUIET)
    for name in sorted(final):
        other_svd.set_mode(name, final[name])
    assert layout(svd, model, optimizer) == layout(other_svd, other, other_optimizer)
    for name in final:
        svd.set_mode(name, None)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == plain


def test_schedulers_reach_the_factors() -> None:
    """torch's schedulers raise when the number of groups changes under them."""
    model = make_toy()
    optimizer = combined(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    svd = AdaptiveSVD(model, optimizer, QUIET)
    train(model, optimizer, svd, 1)
    svd.set_mode("h.0.attn.c_q", 8)
    scheduler.step()
    (group,) = [g for g in optimizer.param_groups if any(p is factors_of(svd, "h.0.attn.c_q").B for p in g["params"])]
    assert group["kind"] == "muon"
    assert group["lr"] == pytest.approx(0.01)


def test_every_matrix_low_rank_and_back() -> None:
    model = make_toy()
    targets = [p for name, p in model.named_parameters() if "attn" in name]
    rest = [p for name, p in model.named_parameters() if "attn" not in name]
    optimizer = torch.optim.AdamW([{"params": targets, "lr": 0.01}, {"params": rest}], lr=0.02)
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_preset="off"))
    for name in svd.targets:
        svd.set_mode(name, 5)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2 * len(targets), len(rest)]
    train(model, optimizer, svd, 3)
    svd.detach()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in targets]
    train(model, optimizer, None, 2)


def test_names_of_a_named_optimizer_follow() -> None:
    model = make_toy()
    optimizer = OPTIMIZERS["named"](model)
    svd = AdaptiveSVD(model, optimizer, QUIET)
    names = list(optimizer.param_groups[0]["param_names"])
    svd.set_mode("h.0.attn.c_q", 8)
    assert optimizer.param_groups[0]["param_names"][:3] == ["h.0.attn.c_q.weight.B", "h.0.attn.c_q.weight.A", names[1]]
    svd.set_mode("h.0.attn.c_q", None)
    assert optimizer.param_groups[0]["param_names"] == names


def test_optimizer_that_does_not_own_a_target_is_refused() -> None:
    model = make_toy()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not own 6 of 6 targets, e\.g\. 'h\.0\.attn\.c_q'"):
        AdaptiveSVD(model, optimizer, SVDConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveSVD(model, optimizer, SVDConfig())  # a failed attempt leaves nothing behind


def test_parameters_added_by_the_user_later_stay() -> None:
    model = make_toy()
    optimizer = OPTIMIZERS["sgd"](model)
    svd = AdaptiveSVD(model, optimizer, QUIET)
    extra, more = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    optimizer.param_groups[0]["params"].append(extra)
    svd.set_mode("h.0.attn.c_q", 8)
    optimizer.add_param_group({"params": [more]})
    svd.set_mode("h.0.attn.c_v", 8)
    assert {id(extra), id(more)} <= set(owned(optimizer))
    svd.detach()
    assert {id(extra), id(more)} <= set(owned(optimizer))


def test_an_optimizer_state_that_was_loaded_first_stays() -> None:
    """Rolling back in place, in the wrong order: where the layout is the same nothing refuses it, and the moments of B
    and A were dropped without a word."""
    model = make_toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    svd = attach(model, optimizer, SVDConfig(svd_preset="off", svd_adapter="reregister"))
    svd.set_mode("h.0.attn.c_q", 6)

    def steps(first: int) -> list[Tensor]:
        for step in range(first, first + 3):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    steps(0)
    saved = copy.deepcopy((optimizer.state_dict(), svd.state_dict(), model.state_dict()))
    straight = steps(3)
    for each, state in zip((optimizer, svd, model), saved, strict=True):
        each.load_state_dict(copy.deepcopy(state))
    assert all(torch.equal(p, q) for p, q in zip(straight, steps(3), strict=True))
