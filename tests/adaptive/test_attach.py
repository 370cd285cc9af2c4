"""One line in a plain loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adaptive_toy import backward, batch, make_toy

from svdtrain.adaptive.attach import AttachedSVD, attach
from svdtrain.config import SVDConfig


def test_plain_loop_trains_switches_and_detaches() -> None:
    model = make_toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    svd = attach(model, optimizer, SVDConfig(svd_interval=5, svd_warmup=0, svd_preset="fast"))
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        losses.append(float(backward(model, step)))
        optimizer.step()
    assert svd.step == 30
    assert svd.metrics()
    assert losses[-1] < losses[0]
    svd.set_mode("h.0.attn.c_q", 5)
    svd.detach()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    backward(model, 30)
    optimizer.step()
    assert svd.step == 30


def test_attach_twice_is_refused() -> None:
    model = make_toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    svd = attach(model, optimizer)
    with pytest.raises(ValueError, match="already has"):
        attach(model, optimizer)
    svd.detach()
    attach(model, optimizer)


def test_state_carries_the_step() -> None:
    model = make_toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    svd = attach(model, optimizer)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    other = make_toy()
    svd_2 = attach(other, torch.optim.AdamW(other.parameters(), lr=0.01))
    svd_2.load_state_dict(svd.state_dict())
    assert svd_2.step == 3


def reference_run(reference: bool, *, restored: int = -1) -> tuple[list[float], list[dict[str, float]]]:
    """Losses and readings of twelve steps; `restored`: everything is saved and put into new objects there."""
    config = SVDConfig(svd_interval=100, svd_interference_every=3)
    x, y = batch(900)

    def build():
        model = make_toy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        closure = (lambda: (model(x) - y).square().mean()) if reference else None
        return model, optimizer, attach(model, optimizer, config, reference_loss=closure)

    model, optimizer, svd = build()
    losses, readings = [], []
    for step in range(12):
        if step == restored:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), svd.state_dict()))
            model, optimizer, svd = build()
            svd.load_state_dict(saved[2])
            optimizer.load_state_dict(saved[1])
            model.load_state_dict(saved[0])
        optimizer.zero_grad()
        losses.append(float(backward(model, step)))
        optimizer.step()
        if svd.reading is not None and svd.step % 3 == 0:
            readings.append(svd.metrics())
    return losses, readings


def test_a_reference_closure_measures_and_leaves_training_alone() -> None:
    losses, readings = reference_run(True)
    assert losses == reference_run(False)[0]
    assert len(readings) == 4
    assert "interference/total" not in readings[0]
    for reading in readings[1:]:
        total = sum(reading[f"interference/{name}"] for name in attach_names())
        assert reading["interference/total"] == pytest.approx(total, rel=1e-6)
        change = reading["reference/loss_change"]
        assert abs(reading["interference/unexplained"]) < abs(change) + abs(total)


def test_a_reading_that_no_decision_has_used_survives_a_save() -> None:
    """Both kept their state under one name, so a resumed run decided without it."""
    x, y = batch(900)

    def build(reference: bool = True) -> AttachedSVD:
        model = make_toy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        closure = (lambda: (model(x) - y).square().mean()) if reference else None
        svd = attach(model, optimizer, SVDConfig(svd_interval=100, svd_interference_every=2), reference_loss=closure)
        for step in range(6 if reference else 1):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        return svd

    svd, other, without = build(), build(), build(reference=False)
    other._interference.clear()
    other.load_state_dict(copy.deepcopy(svd.state_dict()))
    assert svd._interference
    assert other._interference == svd._interference
    other.load_state_dict(without.state_dict())
    with pytest.raises(ValueError, match="no count of steps"):
        other.load_state_dict({key: value for key, value in svd.state_dict().items() if key != "step"})


def test_what_accelerate_and_lightning_wrap_is_unwrapped() -> None:
    class Wrapper(torch.optim.Optimizer):
        """Like theirs: it has everything but hooks."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.optimizer.step(closure)

    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    svd = attach(model, Wrapper(optimizer))
    backward(model, 0)
    optimizer.step()
    assert svd.step == 1
    with pytest.raises(ValueError, match="already has"):
        attach(model, optimizer)


def test_what_is_detached_says_so_and_stays_so() -> None:
    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    svd = attach(model, optimizer, SVDConfig(svd_adapter="reregister"))
    state = svd.state_dict()
    svd.detach()
    for use in (lambda: svd.set_mode("h.0.attn.c_q", 5), lambda: svd.load_state_dict(state)):
        with pytest.raises(ValueError, match="is detached"):
            use()
    attach(model, optimizer)
    svd.detach()
    with pytest.raises(ValueError, match="already has"):
        attach(model, optimizer)


def trained_under(default_device: str) -> list[torch.Tensor]:
    """Everything that the method does, while new tensors go somewhere else by default."""
    model, (x, y) = make_toy(), batch(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = SVDConfig(svd_interval=3, svd_warmup=0, svd_interference_every=2, svd_protect="random")
    batches = [batch(step) for step in range(8)]
    with torch.device(default_device):
        svd = attach(model, optimizer, config, reference_loss=lambda: (model(x) - y).square().mean())
        svd.set_mode("h.0.attn.c_q", 6)
        for inputs, targets in batches:
            optimizer.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
        svd.load_state_dict(copy.deepcopy(svd.state_dict()))
        assert svd.metrics()
    return [p.detach() for p in model.parameters()]


def test_the_default_device_of_the_loop_does_not_matter() -> None:
    """torch.set_default_device("cuda") sent what belongs on the host to the GPU."""
    assert all(torch.equal(p, q) for p, q in zip(trained_under("cpu"), trained_under("meta"), strict=True))


def attach_names() -> list[str]:
    model = make_toy()
    return list(attach(model, torch.optim.SGD(model.parameters(), lr=0.1)).targets)


def test_the_reading_survives_a_save() -> None:
    straight, again = reference_run(True), reference_run(True, restored=7)
    assert straight[0] == again[0]
    for left, right in zip(straight[1], again[1], strict=True):
        timing = {"interference/seconds"}
        assert {k: v for k, v in left.items() if k not in timing} == {k: v for k, v in right.items() if k not in timing}
