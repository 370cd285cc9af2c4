"""One line in a plain loop."""

from __future__ import annotations

import pytest
import torch
from adaptive_toy import backward, make_toy

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
