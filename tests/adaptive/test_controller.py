"""The schedule, the switches that the policy orders, saving, and what goes wrong without stopping training."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adaptive_toy import Toy, backward, make_toy
from torch import Tensor

from svdtrain.adaptive import controller
from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.adaptive.policy import Measurement
from svdtrain.adaptive.target import Change
from svdtrain.config import PolicyThresholds, SVDConfig

Q = "h.0.attn.c_q"
OPTIMIZERS: dict[str, Callable[[Toy], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
}


def script(monkeypatch: pytest.MonkeyPatch, plan: dict[int, tuple[bool, int]]) -> list[int]:
    """Replace the policy: at step s the first matrix gets plan[s] = (mode, r); otherwise all stays."""
    asked: list[int] = []

    def decide(
        measured: Measurement, thresholds: PolicyThresholds, *, lowrank: bool, r: int, step: int, **rest: Any
    ) -> tuple[bool, int, dict[str, Any]]:
        first = step not in asked
        asked.append(step)
        use, r_next = plan[step] if first and step in plan else (lowrank, r)
        return use, r_next, {"reason": "scripted", "r": r}

    monkeypatch.setattr(controller, "should_use_lowrank_training", decide)
    return asked


def steps(
    model: Toy, optimizer: torch.optim.Optimizer, svd: AdaptiveSVD, first: int, last: int
) -> tuple[list[Tensor], list[Change]]:
    losses, changes = [], []
    for step in range(first, last):
        losses.append(backward(model, step))
        svd.project_gradients()
        optimizer.step()
        changes += svd.after_step(step)
        optimizer.zero_grad()
    return losses, changes


@pytest.mark.parametrize("engine", ["tracked", "exact"])
def test_plan_is_carried_out_and_reported(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = script(monkeypatch, {6: (True, 9), 9: (True, 7), 12: (False, 7)})
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    lines: list[str] = []
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_interval=3, svd_warmup=0, svd_engine=engine), log=lines.append)
    _, changes = steps(model, optimizer, svd, 0, 14)
    # What the tracked engine decides from was measured before.
    assert sorted(set(asked)) == ([0, 3, 6, 9, 12] if engine == "exact" else [3, 6, 9, 12])
    assert [(c.name, c.kind, c.r_old, c.r_new, c.step) for c in changes] == [
        (Q, "to_lowrank", 20, 9, 6),
        (Q, "rank", 9, 7, 9),
        (Q, "to_full", 7, 20, 12),
    ]
    assert lines == [f"{Q} -> low-rank r=9: scripted", f"{Q} -> low-rank r=7: scripted", f"{Q} -> full: scripted"]
    assert svd.summary()["num_switches"] == 2
    assert svd.summary()["num_lowrank"] == 0


def test_metrics_are_flat_and_follow_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, {3: (True, 9)})
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_interval=3, svd_engine="exact"))
    assert svd.metrics() == {}
    steps(model, optimizer, svd, 0, 1)
    assert f"svd/{Q}/subspace_angle" not in svd.metrics()  # nothing to compare with yet
    steps(model, optimizer, svd, 1, 4)
    metrics = svd.metrics()
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics[f"svd/{Q}/mode"] == 1.0
    assert metrics["svd/h.1.attn.c_q/mode"] == 0.0
    assert metrics[f"svd/{Q}/r"] == 9.0
    assert metrics[f"svd/{Q}/principal_alignment"] + metrics[f"svd/{Q}/minor_alignment"] == pytest.approx(1)
    assert metrics[f"svd/{Q}/subspace_angle"] > 0
    assert metrics[f"svd/{Q}/update_size"] > 0


def test_parameter_counts_and_names() -> None:
    model = make_toy()
    svd = AdaptiveSVD(model, OPTIMIZERS["adamw"](model), SVDConfig())
    svd.set_mode(Q, 4)
    assert {name: tuple(p.shape) for name, p in svd.parameters_by_name().items()} == {
        f"{Q}.B": (20, 4),
        f"{Q}.A": (4, 20),
    }
    assert svd.summary()["num_parameters"] == 6 * 400
    assert svd.summary()["num_trainable"] == 5 * 400 + 160


def test_watching_only_never_switches() -> None:
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    plain = make_toy()
    plain_optimizer = OPTIMIZERS["adamw"](plain)
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_interval=1, svd_warmup=0, svd_switching=False))
    steps(model, optimizer, svd, 0, 8)
    for step in range(8):
        backward(plain, step)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert svd.metrics()[f"svd/{Q}/principal_alignment"] > 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_the_real_policy_switches_when_the_gradient_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No script: a gradient written into the top direction must raise the alarm, one in the bottom must not."""
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    config = SVDConfig(svd_preset="conservative", svd_interval=1, svd_warmup=0, svd_rule="original", svd_engine="exact")
    svd = AdaptiveSVD(model, optimizer, config)
    for step in range(3):
        for target in svd.targets.values():
            U, _, Vh = torch.linalg.svd(target.W.detach())
            index = 0 if target.name == Q else -1
            target.W.grad = torch.outer(U[:, index], Vh[index])
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        svd.project_gradients()
        changes = svd.after_step(step)
        if step == 0:
            switched = {change.name: change.reason for change in changes}
    assert switched == {Q: "gradient_clobbering_risk"}


def test_a_vetoed_step_changes_nothing_and_drops_gradients() -> None:
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_interval=1, svd_warmup=0))
    svd.set_mode(Q, 5)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    svd.project_gradients()
    assert svd.after_step(0, stepped=False) == []
    factors = svd.targets[Q].factors
    assert factors is not None
    assert factors.W.grad is factors.B.grad is factors.A.grad is None
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert svd.metrics() == {}


def test_gradients_accumulate_within_a_step_but_not_across() -> None:
    model = make_toy(dtype=torch.float64)
    optimizer = OPTIMIZERS["momentum"](model)
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_preset="off"))
    svd.set_mode(Q, 5)
    factors = svd.targets[Q].factors
    assert factors is not None
    for start in (0, 2):
        backward(model, start, dtype=torch.float64)
        one = factors.W.grad.clone()
        backward(model, start + 1, dtype=torch.float64)
        fresh = copy.deepcopy(model)
        fresh.zero_grad()
        backward(fresh, start + 1, dtype=torch.float64)
        total = one + fresh.h[0].attn.c_q.weight.grad
        torch.testing.assert_close(factors.W.grad, total, rtol=0, atol=1e-14)
        svd.project_gradients()
        torch.testing.assert_close(factors.B.grad, total @ factors.A.detach().T, rtol=0, atol=1e-14)
        optimizer.step()
        svd.after_step(start)
        optimizer.zero_grad()
        assert factors.W.grad is None


@pytest.mark.parametrize("engine", ["tracked", "exact"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("cut", [7, 13])
def test_resume_is_exact_across_switches(engine: Any, kind: str, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight 20 steps equal cut + resume at atol 0; states go through torch.save and a weights_only load."""
    plan = {4: (True, 9), 6: (True, 8), 8: (True, 6), 12: (False, 6), 14: (True, 5)}
    config = SVDConfig(svd_interval=2, svd_warmup=0, svd_engine=engine)
    script(monkeypatch, plan)
    model = make_toy()
    optimizer = OPTIMIZERS[kind](model)
    svd = AdaptiveSVD(model, optimizer, config)
    straight, straight_changes = steps(model, optimizer, svd, 0, 20)

    script(monkeypatch, plan)
    first = make_toy()
    first_optimizer = OPTIMIZERS[kind](first)
    first_svd = AdaptiveSVD(first, first_optimizer, config)
    losses, changes = steps(first, first_optimizer, first_svd, 0, cut)
    file = io.BytesIO()
    torch.save({"svd": first_svd.state_dict(), "o": first_optimizer.state_dict(), "m": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = make_toy(seed=99)
    second_optimizer = OPTIMIZERS[kind](second)
    second_svd = AdaptiveSVD(second, second_optimizer, config)
    second_svd.load_state_dict(saved["svd"])
    second.load_state_dict(saved["m"])
    second_optimizer.load_state_dict(saved["o"])
    more, more_changes = steps(second, second_optimizer, second_svd, cut, 20)
    assert torch.equal(torch.stack(losses + more), torch.stack(straight))
    assert [str(c) for c in changes + more_changes] == [str(c) for c in straight_changes]
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), model.parameters(), strict=True))
    assert second_svd.metrics() == svd.metrics()


def test_loading_into_a_run_that_has_already_switched_other_matrices() -> None:
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_preset="off"))
    svd.set_mode(Q, 5)
    steps(model, optimizer, svd, 0, 3)
    saved = copy.deepcopy((svd.state_dict(), model.state_dict(), optimizer.state_dict()))
    straight, _ = steps(model, optimizer, svd, 3, 6)
    svd.set_mode(Q, None)
    svd.set_mode("h.1.attn.c_v", 7)
    steps(model, optimizer, svd, 6, 8)
    svd.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    again, _ = steps(model, optimizer, svd, 3, 6)
    assert torch.equal(torch.stack(straight), torch.stack(again))


def test_optimizer_state_needs_the_layout_first() -> None:
    """Trap: without `load_state_dict` on the SVD side first, torch refuses instead of loading something wrong."""
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    svd = AdaptiveSVD(model, optimizer, SVDConfig())
    svd.set_mode(Q, 5)
    saved = copy.deepcopy((svd.state_dict(), optimizer.state_dict()))
    other = make_toy()
    other_optimizer = OPTIMIZERS["adamw"](other)
    other_svd = AdaptiveSVD(other, other_optimizer, SVDConfig())
    with pytest.raises(ValueError, match="doesn't match the size"):
        other_optimizer.load_state_dict(saved[1])
    other_svd.restore_layout(saved[0])
    other_optimizer.load_state_dict(saved[1])


def test_state_of_another_model_is_refused() -> None:
    model = make_toy()
    svd = AdaptiveSVD(model, OPTIMIZERS["adamw"](model), SVDConfig())
    deeper = make_toy(depth=3)
    other = AdaptiveSVD(deeper, OPTIMIZERS["adamw"](deeper), SVDConfig())
    with pytest.raises(ValueError, match=r"3 matrices differ, e\.g\. h\.2\.attn\.c_proj: saved None, here \(20, 20\)"):
        other.load_state_dict(svd.state_dict())
    guarded = AdaptiveSVD(other_model := make_toy(), OPTIMIZERS["adamw"](other_model), SVDConfig(svd_protect="core"))
    with pytest.raises(ValueError, match="saved with svd_protect=minor, here it is core"):
        guarded.load_state_dict(svd.state_dict())
    with pytest.raises(ValueError, match="version"):
        other.load_state_dict({**other.state_dict(), "version": 99})


def test_second_controller_on_one_optimizer_is_refused_until_detached() -> None:
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    svd = AdaptiveSVD(model, optimizer, SVDConfig())
    with pytest.raises(ValueError, match="already has an AdaptiveSVD"):
        AdaptiveSVD(model, optimizer, SVDConfig(svd_targets="mlp"))
    svd.detach()
    AdaptiveSVD(model, optimizer, SVDConfig(svd_targets="mlp"))


@pytest.mark.parametrize("what", ["gradient", "weight", "missing", "decomposition"])
def test_trouble_warns_and_training_goes_on(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script(monkeypatch, {1: (True, 9)})
    model = make_toy()
    optimizer = OPTIMIZERS["adamw"](model)
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_interval=1, svd_warmup=0, svd_engine="exact"))
    backward(model, 0)
    target = svd.targets[Q]
    if what == "gradient":
        target.W.grad[3, 3] = float("nan")
    elif what == "weight":
        with torch.no_grad():
            target.W[3, 3] = float("inf")
    elif what == "missing":
        target.W.grad = None
    else:
        monkeypatch.setattr(
            controller, "decompose_all", lambda Ws: ["SVD did not converge", *real_decompose(list(Ws)[1:])]
        )
    with caplog.at_level("WARNING"):
        assert all(change.name != Q for change in svd.after_step(0))
    (event,) = svd.events()
    assert (event["level"], event["name"], event["step"]) == ("WARNING", Q, 0)
    words = {"gradient": "gradient is not finite", "weight": "weight is not finite", "missing": "no gradient"}
    assert words.get(what, "did not converge") in event["message"]
    assert Q in caplog.text
    assert svd.events() == []
    assert not target.lowrank
    assert f"svd/{Q}/r" not in svd.metrics()
    assert "svd/h.1.attn.c_q/r" in svd.metrics()


real_decompose = controller.decompose_all


def test_zero_matrix_is_never_made_low_rank() -> None:
    """B and A of a zero matrix are zero, and so are their gradients: it would never train again."""
    model = make_toy()
    with torch.no_grad():
        model.h[0].attn.c_q.weight.zero_()
    optimizer = OPTIMIZERS["adamw"](model)
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_interval=1, svd_warmup=0))
    for step in range(4):
        backward(model, step)
        svd.after_step(step)
    assert f"svd/{Q}/r" in svd.metrics()
    assert not svd.targets[Q].lowrank
    assert svd.events() == []


def test_debug_log_prints_counts_and_split_error(caplog: pytest.LogCaptureFixture) -> None:
    model = make_toy()
    svd = AdaptiveSVD(model, OPTIMIZERS["adamw"](model), SVDConfig())
    with caplog.at_level("DEBUG"):
        svd.set_mode(Q, 4)
        svd.set_mode(Q, None)
    assert "r=4, matrix 400, trainable 160, frozen 400, total 560 parameters, split error" in caplog.text
    full = "r=20, matrix 400, trainable 400, frozen 0, total 400 parameters, split error 0"
    for when in ("before the switch to low-rank", "after the switch to full"):
        assert f"{Q}, {when}: {full}" in caplog.text
    assert caplog.text.count("split error") == 4


def test_set_mode_explains_itself() -> None:
    model = make_toy()
    svd = AdaptiveSVD(model, OPTIMIZERS["adamw"](model), SVDConfig())
    with pytest.raises(ValueError, match=r"'nope' is not watched; watched are: h\.0"):
        svd.set_mode("nope", 3)
    with pytest.raises(ValueError, match="r must lie in"):
        svd.set_mode(Q, 20)
    assert not svd.targets[Q].lowrank
