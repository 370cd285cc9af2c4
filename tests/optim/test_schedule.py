"""The schedules at their corners."""

import math

import pytest
import torch

from svdtrain.config import OptimConfig
from svdtrain.optim import (
    MuonAdamW,
    apply_schedule,
    batch_lr_scale,
    lr_multiplier,
    muon_momentum,
    scaled_weight_decay,
    weight_decay_multiplier,
)

CONFIG = OptimConfig(warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1 / 40), (38, 39 / 40), (39, 1), (350, 1), (675, 0.525), (1000, 0.05), (2000, 0.05)]
)
def test_lr(step: int, expected: float) -> None:
    assert lr_multiplier(step, 1000, CONFIG) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.85), (200, 0.91), (399, 0.85 + 0.12 * 399 / 400), (400, 0.97), (700, 0.97), (1350, 0.935), (2000, 0.90)],
)
def test_momentum(step: int, expected: float) -> None:
    assert muon_momentum(step, 2000, CONFIG) == pytest.approx(expected)


def test_short_run_stays_in_the_rise_of_the_momentum() -> None:
    values = [muon_momentum(step, 100, CONFIG) for step in range(101)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(0.88)


@pytest.mark.parametrize("ratio", [0.0, 0.001, 1.0])
@pytest.mark.parametrize("iterations", [1, 10, 1000])
@pytest.mark.parametrize("warmup", [0, 40])
def test_no_division_by_zero_and_no_excess(ratio: float, iterations: int, warmup: int) -> None:
    config = OptimConfig(warmdown_ratio=ratio, warmup_steps=warmup)
    for step in range(iterations + 2):
        assert 0 < lr_multiplier(step, iterations, config) <= 1
        assert 0.85 <= muon_momentum(step, iterations, config) <= 0.97
        assert 0 <= weight_decay_multiplier(step, iterations) <= 1
    if ratio == 0:
        assert lr_multiplier(iterations, iterations, OptimConfig(warmdown_ratio=0, warmup_steps=0)) == 1


def test_weight_decay_and_batch() -> None:
    assert weight_decay_multiplier(0, 100) == 1
    assert weight_decay_multiplier(25, 100) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert weight_decay_multiplier(100, 100) == 0
    assert (batch_lr_scale(524288), batch_lr_scale(131072)) == (1, 0.5)
    assert scaled_weight_decay(0.28, 131072, 4e9, 2e9) == pytest.approx(0.28 * 0.5 * 0.5)


def test_applied_to_the_groups() -> None:
    matrix, vector = (torch.nn.Parameter(torch.zeros(s)) for s in ((2, 2), (2,)))
    optimizer = MuonAdamW(
        [
            {"kind": "muon", "params": [matrix], "lr": 9, "initial_lr": 0.02, "initial_weight_decay": 0.4},
            {"kind": "adamw", "params": [vector], "lr": 9, "initial_lr": 0.3, "weight_decay": 0.01},
        ]
    )
    apply_schedule(optimizer, 675, 1000, CONFIG)
    muon, adamw = optimizer.param_groups
    assert (muon["lr"], adamw["lr"]) == (pytest.approx(0.0105), pytest.approx(0.1575))
    assert muon["momentum"] == pytest.approx(0.97 - 0.07 * 0.5)
    assert muon["weight_decay"] == pytest.approx(0.4 * weight_decay_multiplier(675, 1000))
    assert adamw["weight_decay"] == 0.01
    assert "momentum" not in adamw
