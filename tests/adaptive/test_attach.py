"""One line in a plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from adaptive_toy import backward, batch, make_toy

from svdtrain.adaptive.attach import attach
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


def attach_names() -> list[str]:
    model = make_toy()
    return list(attach(model, torch.optim.SGD(model.parameters(), lr=0.1)).targets)


def test_the_reading_survives_a_save() -> None:
    straight, again = reference_run(True), reference_run(True, restored=7)
    assert straight[0] == again[0]
    for left, right in zip(straight[1], again[1], strict=True):
        timing = {"interference/seconds"}
        assert {k: v for k, v in left.items() if k not in timing} == {k: v for k, v in right.items() if k not in timing}
