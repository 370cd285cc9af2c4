"""The tracked engine in the controller: it sees what the exact one sees, at a fixed lag, and resumes exactly."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svdtrain.adaptive import controller
from svdtrain.adaptive.attach import attach
from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.config import SVDConfig

SIZE, INTERVAL = 96, 4
NAMES = ("attn.c_q", "attn.c_v")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Two square matrices with a few strong directions over a bulk."""

    def __init__(self) -> None:
        super().__init__()
        self.c_q, self.c_v = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(2))
        for i, layer in enumerate((self.c_q, self.c_v)):
            U, V = (torch.linalg.qr(random(SIZE, 12, seed=10 * i + j)).Q for j in range(2))
            spikes = (U * torch.linspace(9, 4, 12)) @ V.T
            layer.weight.data = spikes + 0.05 * random(SIZE, SIZE, seed=10 * i + 2)


class Run:
    """A controller over two matrices that are moved by given gradients."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.attn = Attention()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        config = {"svd_interval": INTERVAL, "svd_warmup": 0, "svd_switching": False, "svd_min_rank": 84} | settings
        self.svd = AdaptiveSVD(self.model, self.optimizer, SVDConfig(**config))
        self.changes: list[str] = []
        self.seen: list[dict[str, Any]] = []

    def steps(self, first: int, last: int, attack_from: int = 10**9) -> Run:
        """From `attack_from` on the first matrix is rotated at its strongest directions."""
        for step in range(first, last):
            for i, p in enumerate(self.model.parameters()):
                p.grad = random(SIZE, SIZE, seed=100 * step + i)
                if i == 0 and step >= attack_from:
                    U = torch.linalg.svd(p.detach())[0]
                    p.grad = U[:, :8] @ random(8, SIZE, seed=step) * 3
            self.svd.project_gradients()
            self.optimizer.step()
            self.changes += [str(change) for change in self.svd.after_step(step)]
            self.seen.append(self.svd.step_metrics())
            self.optimizer.zero_grad()
        return self


def metric(run: Run, name: str, key: str) -> float:
    return run.svd.metrics().get(f"svd/{name}/{key}", math.nan)


@pytest.fixture(autouse=True)
def _all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stagger group, so that both engines look at the same intervals."""
    from svdtrain.adaptive import monitor
    from svdtrain.spectral.settings import TrackerSettings

    monkeypatch.setattr(monitor, "TrackerSettings", lambda **k: TrackerSettings(stagger=1, oversample=20, **k))


def test_tracked_and_exact_see_the_same() -> None:
    """At step 16 the exact engine looks at steps 12 to 16, the tracked one at 11 to 15: same weights statistics."""
    tracked, exact = (Run(svd_engine=engine).steps(0, 17, attack_from=9) for engine in ("tracked", "exact"))
    for name in NAMES:
        assert metric(tracked, name, "r") == metric(exact, name, "r") == 84
        for key in ("concentration", "reconstruction_error", "minor_energy"):
            assert metric(tracked, name, key) == pytest.approx(metric(exact, name, key), rel=0.1), key
        assert metric(tracked, name, "update_size") == pytest.approx(metric(exact, name, "update_size"), rel=0.15)
        assert metric(tracked, name, "update_lift") == pytest.approx(metric(exact, name, "update_lift"), rel=0.15)
        assert metric(tracked, name, "gradient_lift") == pytest.approx(metric(exact, name, "gradient_lift"), rel=0.15)
        assert metric(tracked, name, "rotation_ratio") == pytest.approx(metric(exact, name, "rotation_ratio"), rel=0.3)
    assert metric(tracked, NAMES[0], "update_lift") > 3 * metric(tracked, NAMES[1], "update_lift")


def test_decisions_use_only_what_was_measured_before() -> None:
    """The attack begins at the deciding step itself: it is seen at the next decision."""
    run = Run().steps(0, 13, attack_from=12)
    assert metric(run, NAMES[0], "gradient_lift") < 1.5
    run.steps(13, 17, attack_from=12)
    assert metric(run, NAMES[0], "gradient_lift") > 3


def test_every_step_is_summarised_one_step_late() -> None:
    run = Run().steps(0, 12, attack_from=8)
    assert [seen.get("svd_step/of_step") for seen in run.seen] == [None, None, *range(1, 11)]
    assert run.seen[-1]["svd_step/gradient_worst"] == NAMES[0]
    assert run.seen[-1]["svd_step/gradient_lift_max"] > 3
    assert run.seen[-1]["svd_step/gradient_lift_median"] < run.seen[-1]["svd_step/gradient_lift_max"]
    assert run.seen[8]["svd_step/gradient_lift_max"] < 1.5  # step 7's, before the attack


def test_looks_can_be_rarer() -> None:
    run = Run(svd_monitor_every=3).steps(0, 11)
    assert [seen.get("svd_step/of_step") for seen in run.seen if seen] == [3, 6, 9]


@pytest.mark.parametrize("stop", [7, 8, 9, 10, 13])
def test_resume_is_exact_around_a_switch(stop: int) -> None:
    """The real policy switches at step 8 or 12; what is under way at the stop is part of the state."""
    settings = {"svd_switching": True, "svd_min_dwell": 0, "svd_rule": "original", "svd_preset": "fast"}
    straight = Run(**settings).steps(0, 22, attack_from=5)
    assert any("low-rank" in change for change in straight.changes)
    first = Run(**settings).steps(0, stop, attack_from=5)
    file = io.BytesIO()
    states = {"svd": first.svd.state_dict(), "m": first.model.state_dict(), "o": first.optimizer.state_dict()}
    torch.save(states, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Run(**settings)
    second.svd.load_state_dict(saved["svd"])
    second.model.load_state_dict(saved["m"])
    second.optimizer.load_state_dict(saved["o"])
    second.steps(stop, 22, attack_from=5)
    assert first.changes + second.changes == straight.changes
    assert first.seen + second.seen == straight.seen
    assert second.svd.metrics() == straight.svd.metrics()
    for p, q in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("every", "falls_at", "expected"),
    [(1, 0, [8, 12, 16]), (2, 0, [8, 16]), (3, 0, [8]), (3, 12, [8, 12])],
    ids=["each decision", "every second", "every third", "a new rank at once"],
)
def test_decomposes_only_what_changes(
    every: int, falls_at: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix switches at step 8 and is recomputed afterwards; the other is never decomposed by the controller."""
    asked: list[int] = []
    now = [0]
    decompose = controller.decompose_all

    def counting(matrices: list[Tensor]) -> list[Any]:
        assert len(matrices) == 1
        asked.append(now[0])
        return decompose(matrices)

    def decide(measured: Any, thresholds: Any, *, r: int, step: int, lowrank: bool, **rest: Any) -> Any:
        now[0] = step
        attacked = step >= 8 and measured.gradient_lift > 2
        return lowrank or attacked, r - (lowrank and step == falls_at), {"reason": "scripted"}

    monkeypatch.setattr(controller, "decompose_all", counting)
    monkeypatch.setattr(controller, "should_use_lowrank_training", decide)
    run = Run(svd_switching=True, svd_recompute_every=every).steps(0, 18, attack_from=5)
    assert [change.split(" ->")[0] for change in run.changes] == [NAMES[0]] * (2 if falls_at else 1)
    assert asked == expected


def test_trouble_is_said_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    run = Run().steps(0, 7)
    p = next(iter(run.model.parameters()))
    with torch.no_grad():
        kept = p.clone()
    p.grad = torch.full_like(p, math.nan)
    run.svd.after_step(7)
    run.optimizer.zero_grad()
    run.steps(8, 9)
    (event,) = run.svd.events()
    assert (event["step"], event["name"]) == (8, NAMES[0])
    assert "gradient is not finite" in event["message"]
    with torch.no_grad():
        p.fill_(math.inf)
    run.steps(9, 13)
    assert any("not finite" in event["message"] or "failed" in event["message"] for event in run.svd.events())
    with torch.no_grad():
        p.copy_(kept)
    run.steps(13, 25)
    run.svd.events()
    run.steps(25, 29)
    assert run.svd.events() == []


def test_a_missing_gradient_is_said_and_spoils_no_other() -> None:
    run = Run().steps(0, 7)
    for step in (7, 8):
        next(iter(run.model.parameters())).grad = None
        list(run.model.parameters())[1].grad = random(SIZE, SIZE, seed=5)
        run.svd.after_step(step)
    (event,) = run.svd.events()
    assert (event["name"], event["step"]) == (NAMES[0], 8)
    assert "no gradient" in event["message"]
    assert metric(run, NAMES[1], "gradient_lift") > 0


def test_another_engine_can_resume_a_state() -> None:
    """The exact engine's state has no tracker: it starts anew, and the other way round the tracker is dropped."""
    for before, after in (("exact", "tracked"), ("tracked", "exact")):
        first = Run(svd_engine=before).steps(0, 9)
        second = Run(svd_engine=after)
        second.svd.load_state_dict(copy.deepcopy(first.svd.state_dict()))
        second.steps(9, 17)
        assert metric(second, NAMES[0], "r") > 0


def test_memory_is_accounted_for() -> None:
    run = Run().steps(0, 3)
    held = run.svd.memory_bytes()
    assert held["references"] == sum(p.nbytes for p in run.model.parameters())
    assert held["lowrank"] == 0
    run.svd.set_mode(NAMES[0], 9)
    assert run.svd.memory_bytes()["lowrank"] == 4 * (SIZE * SIZE + 2 * 9 * SIZE)


def test_gradients_are_looked_at_where_the_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that average inside their own step: only the look that the next decision uses is at averaged gradients."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for every, expected in ((1, [3, 7, 11]), (2, [2, 3, 6, 7, 10, 11])):
        model = Run().model
        config = SVDConfig(svd_interval=INTERVAL, svd_monitor_every=every)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        svd = attach(model, optimizer, config, average_gradients=True)
        assert [step for step in range(12) if svd.gradients_agree(step)] == expected
        svd.detach()


def test_it_works_inside_autocast() -> None:
    outside, inside = Run().steps(0, 10), Run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.steps(0, 10)
    assert inside.svd.metrics() == outside.svd.metrics()


def test_the_bound_of_the_rotation_is_there_only_where_it_says_something() -> None:
    quiet, loud = Run(), Run()
    quiet.optimizer.param_groups[0]["lr"] = 1e-4
    for run in (quiet, loud):
        run.steps(0, 3 * INTERVAL + 1)
    for name in NAMES:
        assert math.sin(metric(quiet, name, "subspace_angle")) < metric(quiet, name, "wedin") < 1
        assert math.isnan(metric(loud, name, "wedin"))


def test_drift_of_the_factors_is_reported_when_they_are_put_back() -> None:
    run = Run(svd_recompute_every=1).steps(0, INTERVAL)
    name = NAMES[0]
    target = run.svd.targets[name]
    run.svd.set_mode(name, 84)
    assert target.drift == {}
    assert target.factors is not None
    U = torch.linalg.svd(target.W.detach()).U
    with torch.no_grad():
        target.factors.B += 3 * U[:, :1]  # in the principal space now, but not strong enough to lead it
        before = target.factors.B.clone()
        target.factors.merge()
    run.steps(INTERVAL, INTERVAL + 1)
    U = torch.linalg.svd(target.W.detach()).U[:, :12]
    expected = float((U.T @ before).square().sum() / before.square().sum())
    assert expected > 0.1
    assert metric(run, name, "drift_B") == pytest.approx(expected, rel=0.05)
    assert 0 <= metric(run, name, "drift_A") < 0.5
    run.svd.set_mode(name, 84)
    assert max(target.drift.values()) < 1e-9
    run.svd.set_mode(name, None)
    assert target.drift == {}
