"""Never a wrong update in silence: what could change a matrix behind its factors' back, or train it by a wrong rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adaptive_toy import WATCHED_BY_HAND, Q, attached, backward, make_toy, one_step, relative
from torch import Tensor

from svdtrain.adaptive.attach import attach
from svdtrain.config import SVDConfig


@pytest.mark.parametrize("adapter", ["shadow", "reregister"])
@pytest.mark.parametrize("names", [[Q], [f"h.{i}.attn.{part}" for i in range(2) for part in ("c_q", "c_v", "c_proj")]])
def test_a_checkpoint_loaded_into_the_model_alone_stays_and_is_said(adapter, names, caplog) -> None:
    """The next merge would put the old weights back: by one matrix and by stacks of them."""
    model, optimizer, svd = attached(svd_adapter=adapter)
    for name in names:
        svd.set_mode(name, 6)
    one_step(model, optimizer)
    assert not caplog.records
    model.load_state_dict(make_toy(5).state_dict())
    loaded = {name: svd.targets[name].W.detach().clone() for name in names}
    one_step(model, optimizer, 1)
    assert [name for record in caplog.records for name in names if f"{name} was written" in record.message] == names
    for name in names:
        assert 0 < relative(svd.targets[name].W.detach(), loaded[name]) < 0.1
    caplog.clear()
    one_step(model, optimizer, 2)
    assert not caplog.records


def test_a_swap_there_and_back_is_nothing(caplog) -> None:
    """What an average of weights does for an evaluation."""
    model, optimizer, svd = attached()
    svd.set_mode(Q, 6)
    one_step(model, optimizer)
    trained = copy.deepcopy(model.state_dict())
    model.load_state_dict(make_toy(5).state_dict())
    model.load_state_dict(trained)
    one_step(model, optimizer, 1)
    assert not caplog.records


def test_a_state_with_other_weights_is_said(caplog) -> None:
    model, optimizer, svd = attached()
    svd.set_mode(Q, 6)
    one_step(model, optimizer)
    other, other_optimizer, other_svd = attached(seed=3)
    other_svd.load_state_dict(svd.state_dict())
    before = other.h[0].attn.c_q.weight.detach().clone()
    one_step(other, other_optimizer, 1)
    assert f"{Q} was written" in caplog.text
    assert relative(other.h[0].attn.c_q.weight.detach(), before) < 0.1


@pytest.mark.parametrize(("saved_with", "loaded_with"), [("shadow", "reregister"), ("reregister", "shadow")])
def test_a_state_of_the_other_adapter_is_refused_and_changes_nothing(saved_with: str, loaded_with: str) -> None:
    _, _, svd = attached(svd_adapter=saved_with)
    svd.set_mode(Q, 6)
    _, _, other = attached(svd_adapter=loaded_with)
    with pytest.raises(ValueError, match="adapter"):
        other.load_state_dict(svd.state_dict())
    assert not other.targets[Q].lowrank


class CallsItsParent(torch.optim.SGD):
    """torch hooks the step of both classes once its parent has been used by itself."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("protect", ["minor", "core"])
def test_an_optimizer_that_calls_its_parents_step_takes_one(protect: str) -> None:
    results = []
    for kind in (torch.optim.SGD, CallsItsParent):
        model = make_toy()
        optimizer = kind(model.parameters(), lr=0.05)
        svd = attach(model, optimizer, SVDConfig(**WATCHED_BY_HAND, svd_protect=protect))  # type: ignore[arg-type]
        svd.set_mode(Q, 6)
        for step in range(3):
            one_step(model, optimizer, step)
        assert svd.step == 3
        results.append(model.h[0].attn.c_q.weight.detach())
    assert torch.equal(*results)


def test_a_step_left_out_leaves_no_gradient_behind() -> None:
    """`if not finite: optimizer.zero_grad(); continue`: re-registered, W.grad is out of the optimizer's reach."""
    model, optimizer, svd = attached(svd_adapter="reregister")
    svd.set_mode(Q, 6)
    backward(model, 0)
    optimizer.zero_grad()
    assert model.h[0].attn.c_q.weight.grad is None
    svd.detach()
    assert "zero_grad" not in vars(optimizer)


def low_rank_move(optimizer_of: Any, **settings: Any) -> float:
    """||dW|| of a low-rank matrix over ten steps, over that of plain training."""
    moved = []
    for lowrank in (True, False):
        model = make_toy()
        optimizer = optimizer_of(model.parameters())
        W = model.h[0].attn.c_q.weight
        before = W.detach().clone()
        if lowrank:
            attach(model, optimizer, SVDConfig(**WATCHED_BY_HAND, **settings)).set_mode(Q, 12)
        for step in range(10):
            one_step(model, optimizer, step)
        moved.append(float((W.detach() - before).norm()))
    return moved[0] / moved[1]


def test_an_optimizer_of_another_kind_is_said_and_its_size_can_be_kept(caplog) -> None:
    """RMSprop's learning rate means something else to SGD, which is the nearest rule that B and A have."""
    assert low_rank_move(lambda p: torch.optim.RMSprop(p, lr=0.01)) < 0.1
    assert "RMSprop is none of AdamW, Adam, SGD and Muon" in caplog.text
    assert 0.2 < low_rank_move(lambda p: torch.optim.RMSprop(p, lr=0.01), svd_match_rms=True) < 2


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_known_optimizers_are_not_talked_about(kind: Any, caplog) -> None:
    low_rank_move(lambda p: kind(p, lr=0.01))
    assert not caplog.records


class WithoutLearningRate(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"step_size": 0.1})


def test_an_optimizer_without_a_learning_rate_is_refused_at_once() -> None:
    model = make_toy()
    optimizer = WithoutLearningRate(model.parameters())
    with pytest.raises(ValueError, match="keeps no learning rate"):
        attach(model, optimizer)
    attach(model, optimizer, SVDConfig(svd_adapter="reregister"))


def test_a_learning_rate_that_is_none_is_no_learning_rate() -> None:
    """Adafactor of transformers finds its own."""
    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="keeps no learning rate"):
        attach(model, optimizer)


def test_reregister_refuses_one_state_for_all_parameters() -> None:
    model = make_toy()
    with pytest.raises(ValueError, match="LBFGS keeps one state"):
        attach(model, torch.optim.LBFGS(model.parameters()), SVDConfig(svd_adapter="reregister"))


def test_decoupled_decay_is_what_the_group_says() -> None:
    """Adam(decoupled_weight_decay=True) is AdamW."""
    results = []
    for kind, settings in ((torch.optim.AdamW, {}), (torch.optim.Adam, {"decoupled_weight_decay": True})):
        model = make_toy()
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.5, **settings)
        attach(model, optimizer, SVDConfig(**WATCHED_BY_HAND)).set_mode(Q, 6)
        for step in range(5):
            one_step(model, optimizer, step)
        results.append(model.h[0].attn.c_q.weight.detach())
    assert torch.equal(*results)


class Lion(torch.optim.Optimizer):
    """Has betas and a first moment, but neither a second one nor a count of steps."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.sub_(torch.lerp(moment, p.grad, 0.1).sign(), alpha=self.param_groups[0]["lr"])
            moment.lerp_(p.grad, 0.01)


@pytest.mark.parametrize("kind", [torch.optim.Adamax, Lion])
def test_half_of_adams_state_is_none(kind: Any) -> None:
    """A first moment over a second one of zero made the first step of B and A hundreds of times too large."""
    model = make_toy()
    optimizer = kind(model.parameters(), lr=0.003)
    svd = attach(model, optimizer, SVDConfig(**WATCHED_BY_HAND))
    for step in range(30):
        one_step(model, optimizer, step)
    W = model.h[0].attn.c_q.weight
    before = W.detach().clone()
    svd.set_mode(Q, 12)
    one_step(model, optimizer, 30)
    assert float((W.detach() - before).norm()) < 2 * 0.003 * W.shape[0]  # a sign update has lr x 20


def test_a_subclass_with_a_step_of_its_own_is_said(caplog) -> None:
    model = make_toy()
    attach(model, CallsItsParent(model.parameters(), lr=0.1))
    assert "CallsItsParent is none of" in caplog.text


def test_what_the_host_moves_inside_its_own_step_is_not_foreign(caplog) -> None:
    """LBFGS runs its closure at several places; what it wrote there is not what a low-rank matrix becomes."""
    model = make_toy(dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    svd = attach(model, optimizer, SVDConfig(**WATCHED_BY_HAND))
    svd.set_mode(Q, 2)
    W = model.h[0].attn.c_q.weight
    before = W.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 0, dtype=torch.float64)

    optimizer.step(closure)
    assert "was written" not in caplog.text
    assert torch.linalg.matrix_rank(W.detach() - before, rtol=1e-4) <= 4


def test_directions_that_are_zero_are_said_to_stand_still(caplog) -> None:
    model, _, svd = attached()
    with torch.no_grad():
        model.h[0].attn.c_q.weight.zero_()
    svd.set_mode(Q, 6)
    assert f"{Q}: the 6 directions to train are exactly zero" in caplog.text


@pytest.mark.parametrize("C", [torch.eye(7), torch.full((20, 20), float("nan"))])
def test_a_covariance_that_cannot_be_is_refused_when_it_is_given(C: Tensor) -> None:
    _, _, svd = attached(svd_protect="activation")
    with pytest.raises(ValueError, match="must be 20 x 20 and finite"):
        svd.set_references({Q: C})


def test_matched_updates_without_a_norm_to_match_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="needs Muon"):
        attached(svd_adapter="reregister", svd_match_rms=True)
    attached(svd_adapter="shadow", svd_match_rms=True)
    attached(svd_adapter="reregister", svd_match_rms=True, svd_protect="core")
