"""Steps of hosts that are not plain: writes between them, exceptions and closures inside them, hooks around them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adaptive_toy import WATCHED_BY_HAND, Q, Toy, attached, backward, make_toy, one_step, relative
from torch import Tensor, nn

from svdtrain.adaptive import products
from svdtrain.adaptive.attach import attach
from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.config import SVDConfig


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 8), (3, 5)])
def test_any_single_entry_changes_the_checksum(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """A sign that flips changes no norm; one entry of many changes none in float32."""
    W = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    many = [FactoredWeight(W, torch.ones(shape[0], 2), torch.ones(2, shape[1])) for _ in range(2)]
    products.note_checksums(many)
    assert products.rewritten(many, wait=False) == []
    W.data[0, 1] *= -1
    assert products.rewritten(many, wait=False) == many


@pytest.mark.parametrize("assign", [False, True])
def test_a_write_through_data_stays_and_is_said(assign: bool, caplog) -> None:
    """`p.data.clamp_()` and its like: PyTorch does not count them, and the next merge undid them."""
    model, optimizer, svd = attached()
    svd.set_mode(Q, 6)
    one_step(model, optimizer)
    W = model.h[0].attn.c_q.weight
    if assign:
        W.data = 2 * W.data
    else:
        W.data.mul_(2)
    svd.set_mode("h.0.attn.c_v", 6)
    doubled = W.detach().clone()
    one_step(model, optimizer, 1)
    assert f"{Q} was written" in caplog.text
    assert 0 < relative(W.detach(), doubled) < 0.1
    caplog.clear()
    one_step(model, optimizer, 2)
    assert not caplog.records


def test_a_device_is_waited_for_at_decisions_only() -> None:
    model, optimizer, svd = attached()
    svd.set_mode(Q, 6)
    (factors,) = (t.factors for t in svd.targets.values() if t.factors is not None)
    one_step(model, optimizer)
    model.h[0].attn.c_q.weight.data.mul_(2)
    elsewhere = SimpleNamespace(
        W=SimpleNamespace(
            device=torch.device("meta"),
            shape=factors.W.shape,
            dtype=factors.W.dtype,
            numel=factors.W.numel,
            detach=factors.W.detach,
        ),
        checksum=factors.checksum,
        counted_a_write=False,
    )
    assert products.rewritten([elsewhere], wait=False) == []  # type: ignore[list-item]
    assert products.rewritten([elsewhere], wait=True) == [elsewhere]  # type: ignore[list-item]


@pytest.mark.parametrize("protect", ["minor", "core"])
def test_a_step_that_ended_in_an_exception_is_over(protect: str, caplog) -> None:
    """The next one starts anew: what was loaded in between stays."""
    model, optimizer, svd = attached(svd_protect=protect)
    svd.set_mode(Q, 6)
    one_step(model, optimizer)

    def interrupted() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    model.load_state_dict(make_toy(5).state_dict())
    loaded = model.h[0].attn.c_q.weight.detach().clone()
    one_step(model, optimizer, 1)
    assert 0 < relative(model.h[0].attn.c_q.weight.detach(), loaded) < 0.1
    assert svd.step == 2


class Perturbs(torch.optim.SGD):
    """Sharpness-aware: the gradient is that of a place further up, and the step starts where it was."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        gradients = [p.grad.clone() for p in params]
        torch._foreach_add_(params, gradients)
        with torch.enable_grad():
            loss = closure()
        torch._foreach_sub_(params, gradients)
        torch._foreach_sub_(params, [0.05 * p.grad for p in params])
        return loss


@pytest.mark.parametrize("optimizer_of", [Perturbs, torch.optim.LBFGS])
@pytest.mark.parametrize("match", [False, True])
def test_a_guard_keeps_the_whole_step_out_whatever_the_closure_saw(optimizer_of: Any, match: bool) -> None:
    model = make_toy(dtype=torch.float64)
    optimizer = optimizer_of(model.parameters(), lr=0.05)
    svd = attach(model, optimizer, SVDConfig(**WATCHED_BY_HAND, svd_protect="core", svd_match_rms=match))
    svd.set_mode(Q, 6)
    W, guard = model.h[0].attn.c_q.weight, svd.targets[Q].guard
    assert guard is not None
    before = W.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 0, dtype=torch.float64)

    closure()
    optimizer.step(closure)
    dW = W.detach() - before
    assert float((guard.tensors["U_k"].T @ dW @ guard.tensors["V_k"]).norm()) < 1e-9 * float(dW.norm())


def test_the_norm_to_match_is_that_of_the_whole_step() -> None:
    moved = []
    for lowrank in (True, False):
        model = make_toy(dtype=torch.float64)
        optimizer = Perturbs(model.parameters(), lr=0.05)
        W = model.h[0].attn.c_q.weight
        before = W.detach().clone()
        if lowrank:
            attach(model, optimizer, SVDConfig(**WATCHED_BY_HAND, svd_match_rms=True)).set_mode(Q, 6)
        backward(model, 0, dtype=torch.float64)

        def closure(model: Toy = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            return backward(model, 0, dtype=torch.float64)

        optimizer.step(closure)
        moved.append(float((W.detach() - before).norm()))
    assert moved[0] == pytest.approx(moved[1], rel=1e-6)


@pytest.mark.parametrize("before_attach", [False, True])
def test_post_hooks_of_others_come_after_the_merge(before_attach: bool, caplog) -> None:
    """One that clamps W was undone by the merge where it had been registered first."""
    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    W = model.h[0].attn.c_q.weight

    @torch.no_grad()
    def clamp(*_: Any) -> None:
        W.clamp_(-0.01, 0.01)

    if before_attach:
        optimizer.register_step_post_hook(clamp)
    svd = attach(model, optimizer, SVDConfig(**WATCHED_BY_HAND))
    if not before_attach:
        optimizer.register_step_post_hook(clamp)
    svd.set_mode(Q, 6)
    for step in range(2):
        one_step(model, optimizer, step)
        assert float(W.detach().abs().max()) <= 0.01
    assert f"{Q} was written" in caplog.text


class TakesTheEpoch(torch.optim.SGD):
    def step(self, epoch: int) -> None:  # type: ignore[override]
        assert epoch == 3
        super().step()


def test_what_is_no_closure_is_left_alone() -> None:
    model = make_toy()
    optimizer = TakesTheEpoch(model.parameters(), lr=0.05)
    attach(model, optimizer, SVDConfig(**WATCHED_BY_HAND)).set_mode(Q, 6)
    W = model.h[0].attn.c_q.weight
    before = W.detach().clone()
    backward(model, 0)
    optimizer.step(3)
    assert not torch.equal(W.detach(), before)


@pytest.mark.parametrize("adapter", ["shadow", "reregister"])
def test_what_the_user_takes_out_of_the_optimizer_stays_out(adapter: str) -> None:
    model, optimizer, svd = attached(svd_adapter=adapter)
    svd.set_mode(Q, 6)
    left_out = model.head.bias if adapter == "reregister" else model.h[0].attn.c_q.weight
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not left_out]
    before = left_out.detach().clone()
    for step in range(2):
        one_step(model, optimizer, step)
        svd.set_mode("h.0.attn.c_v", 5)
    torch.testing.assert_close(left_out.detach(), before, rtol=0, atol=1e-6)  # W_p + B A rounds


def test_a_model_of_another_type_is_refused_in_words() -> None:
    model, optimizer, svd = attached()
    svd.set_mode(Q, 6)
    state = copy.deepcopy(svd.state_dict())
    model.to(torch.bfloat16)
    backward(model, 0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"has become torch\.bfloat16"):
        optimizer.step()
    with pytest.raises(ValueError, match="resume in the same type"):
        svd.load_state_dict(state)


def test_sparse_gradients_are_refused_in_words() -> None:
    model = torch.nn.Embedding(40, 20, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, SVDConfig(svd_targets="weight"))
    model(torch.arange(10)).square().sum().backward()
    with pytest.raises(ValueError, match="sparse gradients"):
        optimizer.step()
