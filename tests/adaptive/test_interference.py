"""<G_ref, dW> in nats: exact to second order, adds up, splits, and leaves training alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from adaptive_toy import batch, make_toy
from torch import Tensor, nn

from svdtrain.adaptive.interference import Interference, Reading, bootstrap_interval

Q = "h.0.attn.c_q"


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n.removesuffix(".weight"): p for n, p in model.named_parameters() if p.ndim == 2}


def reference_loss(model: nn.Module, step: int = 900, size: int = 12):
    x, y = batch(step, size=size, dtype=next(model.parameters()).dtype)
    return lambda: (model(x) - y).square().mean()


def move(model: nn.Module, size: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator) * (p.ndim == 2)


def two_readings(model: nn.Module, size: float) -> tuple[Interference, Reading]:
    interference = Interference(matrices(model), reference_loss(model))
    assert math.isnan(interference.measure().total)
    interference.advance()
    move(model, size)
    return interference, interference.measure()


def test_nats_agree_with_a_float64_reference_of_the_same_definition() -> None:
    model = make_toy()
    exact = copy.deepcopy(model).double()
    x, y = batch(900, dtype=torch.float64)

    def gradient() -> dict[str, Tensor]:
        exact.zero_grad()
        (exact(x) - y).square().mean().backward()
        return {name: W.grad.clone() for name, W in matrices(exact).items()}

    G_before, W_before = gradient(), {name: W.detach().clone() for name, W in matrices(exact).items()}
    _, reading = two_readings(model, 0.01)
    exact.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    G_after = gradient()
    for name, W in matrices(exact).items():
        dW = W.detach() - W_before[name]
        expected = float(((G_before[name] + G_after[name]) / 2 * dW).sum())
        scale = float(G_before[name].norm() * dW.norm())
        assert reading.nats[name] == pytest.approx(expected, abs=2e-3 * scale)  # the old gradient is kept in bf16


def test_it_explains_the_measured_change_to_second_order() -> None:
    """Halving the step divides what is left by about eight; the plain end-point product misses by the curvature."""
    left = []
    for size in (0.02, 0.01):
        _, reading = two_readings(make_toy().double(), size)
        assert abs(reading.unexplained) < 0.05 * abs(reading.loss_change)
        assert reading.curvature > 5 * abs(reading.unexplained)
        left.append(abs(reading.unexplained))
    assert left[1] < left[0] / 4


def test_directions_add_up() -> None:
    model = make_toy()
    interference, reading = two_readings(model, 0.02)
    W = matrices(model)[Q].detach()
    U, P = torch.linalg.svd(W)[0], torch.linalg.qr(torch.randn(20, 20))[0]
    for k in (1, 7):
        parts = interference.split(Q, left=U[:, :k], inputs=P[:, :k])
        assert parts["total"] == pytest.approx(reading.nats[Q], rel=1e-4, abs=1e-7)
        assert parts["left_principal"] + parts["left_minor"] == pytest.approx(parts["total"])
        assert parts["input_principal"] + parts["input_minor"] == pytest.approx(parts["total"])
    everything = interference.split(Q, left=U, inputs=P)
    assert everything["left_minor"] == pytest.approx(0, abs=1e-5)
    assert everything["input_minor"] == pytest.approx(0, abs=1e-5)


def test_an_update_along_one_direction_is_found_there() -> None:
    model = make_toy()
    interference = Interference({Q: matrices(model)[Q]}, reference_loss(model))
    interference.measure()
    interference.advance()
    U, _, Vh = torch.linalg.svd(matrices(model)[Q].detach())
    with torch.no_grad():
        matrices(model)[Q].add_(0.1 * torch.outer(U[:, 0], Vh[3]))
    reading = interference.measure()
    parts = interference.split(Q, left=U[:, :1], inputs=Vh[3:4].T)
    assert parts["left_principal"] == pytest.approx(reading.nats[Q], rel=1e-4)
    assert parts["input_principal"] == pytest.approx(reading.nats[Q], rel=1e-4)
    parts = interference.split(Q, left=U[:, 1:], inputs=Vh[:3].T)
    assert abs(parts["left_principal"]) + abs(parts["input_principal"]) < 1e-4 * abs(reading.nats[Q])


def test_gradients_hooks_and_random_numbers_of_training_are_untouched() -> None:
    model = make_toy()
    dropped = nn.Sequential(model, nn.Dropout(0.5))
    calls: list[int] = []
    weight = matrices(model)[Q]
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    x, y = batch(900)
    before, random = {n: p.detach().clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    interference = Interference(matrices(model), lambda: (dropped(x) - y).square().mean())
    with torch.no_grad():  # as inside an optimizer's hook
        interference.measure()
    interference.advance()
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not calls


def test_parts_give_the_same_mean_and_an_interval_around_it() -> None:
    whole, parts = make_toy(), make_toy()
    rows = batch(900, size=12)
    losses = [(lambda x=rows[0][i : i + 1], y=rows[1][i : i + 1]: (parts(x) - y).square().mean()) for i in range(12)]
    _, expected = two_readings(whole, 0.02)
    interference = Interference(matrices(parts), losses)
    interference.measure()
    interference.advance()
    move(parts, 0.02)
    reading = interference.measure()
    assert reading.total == pytest.approx(expected.total, rel=1e-3)
    assert reading.loss_change == pytest.approx(expected.loss_change, rel=1e-4)
    assert all(map(math.isnan, expected.interval))
    assert reading.interval[0] < reading.total < reading.interval[1]
    for name, (low, high) in reading.intervals.items():
        assert low <= reading.nats[name] <= high


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(torch.randn(40, generator=generator))
        hits += bool(low < 0 < high)
    assert 160 <= hits <= 195  # 90 %, a little less for few rows
    assert all(bool(end.isnan()) for end in bootstrap_interval(torch.ones(1)))


def test_the_window_goes_on_after_a_save() -> None:
    model = make_toy()
    first = Interference(matrices(model), reference_loss(model))
    first.measure()
    first.advance()
    saved = copy.deepcopy(first.state_dict())
    move(model, 0.02)
    second = Interference(matrices(model), reference_loss(model))
    second.load_state_dict(saved)
    assert second.measure().nats == first.measure().nats
    with pytest.raises(ValueError, match="other matrices"):
        Interference({Q: matrices(model)[Q]}, reference_loss(model)).load_state_dict(saved)


def test_memory_is_what_the_docstring_says() -> None:
    model = make_toy()
    interference = Interference(matrices(model), reference_loss(model))
    interference.measure()
    interference.advance()
    assert interference.memory_bytes() == 6 * sum(W.numel() for W in matrices(model).values())


def test_wrong_closures_are_named() -> None:
    model = make_toy()
    x, y = batch(900)
    for loss, words in (
        (lambda: (model(x) - y).square(), "one number"),
        (lambda: (model(x) - y).square().mean().detach(), "one number"),
        (lambda: model.h[1].attn(x).mean(), "does not depend on"),
    ):
        with pytest.raises(ValueError, match=words):
            Interference({Q: matrices(model)[Q]}, loss).measure()
    with pytest.raises(ValueError, match="at least one"):
        Interference({}, reference_loss(model))
