"""Broken matrices, failing libraries, threads, saved states."""

import io
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch

from svdtrain.spectral.settings import TrackerSettings
from svdtrain.spectral.tracking import SubspaceTracker
from svdtrain.spectral.worker import Worker
from tests.spectral.tracked import SHAPES, gradients, make_weights, moved, run, tracker_for


def test_a_broken_matrix_keeps_its_basis_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    weights = make_weights()
    tracker = tracker_for(weights)
    tracker.analyse(0, weights)
    kept = tracker.basis("k").U.clone()
    broken = {**moved(weights, 1), "k": torch.full_like(weights["k"], float("nan"))}
    with caplog.at_level(logging.WARNING):
        tracker.step(20, broken, gradients(1))
        tracker.analyse(20, broken)
        tracker.analyse(40, broken)  # now by the exact way
    assert "k: analysis at step 20 failed" in caplog.text
    assert "not finite" in caplog.text
    assert torch.equal(tracker.basis("k").U, kept)
    assert tracker.poll()[-1].values["q"]["ok"] == 1
    tracker.analyse(60, moved(weights, 2))
    assert tracker.poll()[-1].values["k"]["exact"] == 1


def test_a_library_failure_keeps_everything_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = make_weights()
    tracker = tracker_for(weights)
    tracker.analyse(0, weights)
    kept = tracker.basis("fc").U.clone()

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("svdtrain.spectral.analysis.warm_steps", fails)
    with caplog.at_level(logging.WARNING):
        tracker.analyse(20, moved(weights, 1))
    assert "out of memory" in caplog.text
    assert tracker.poll()[-1].values == {name: {"ok": 0.0} for name in weights}
    assert torch.equal(tracker.basis("fc").U, kept)
    tracker.analyse(40, moved(weights, 1))
    assert {values["exact"] for values in tracker.poll()[-1].values.values()} == {1}


def test_broken_from_the_start_gives_no_basis(caplog: pytest.LogCaptureFixture) -> None:
    weights = make_weights()
    weights["k"] = torch.full_like(weights["k"], float("inf"))
    tracker = tracker_for(weights)
    tracker.step(0, weights)
    tracker.observe(1, weights)
    assert set(tracker.poll()[-1].values) == {"q", "fc", "proj"}
    with pytest.raises(LookupError):
        tracker.basis("k")


def test_resume_is_exact_and_its_state_is_safe_to_load() -> None:
    settings = {"interval": 4, "exact_every": 3, "participation_every": 3}
    straight, weights = tracker_for(make_weights(), **settings), make_weights()
    weights = run(straight, weights, range(10))
    straight.set_cuts({"k": 30, "q": 14})
    weights = run(straight, weights, range(10, 13))
    straight.flush()
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = tracker_for(make_weights(), **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(straight, weights, range(13, 30))
    run(resumed, weights, range(13, 30))
    one, two = straight.flush(), resumed.flush()
    assert [(r.kind, r.step, r.values) for r in one] == [(r.kind, r.step, r.values) for r in two]
    for name in SHAPES:
        for field in ("U", "S", "V"):
            a, b = getattr(straight.basis(name), field), getattr(resumed.basis(name), field)
            assert torch.equal(a, b)


class Late(Worker):
    """The way of a GPU, on the CPU: a thread that begins when the next step has begun."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), beside=True)

    def submit(self, work: Callable) -> Future:
        def late() -> object:
            time.sleep(0.002)
            return work()

        return super().submit(late)


def test_a_worker_beside_the_step_changes_no_number() -> None:
    inline = tracker_for(make_weights(), interval=4)
    beside = SubspaceTracker(make_weights(), dict.fromkeys(SHAPES, 12), inline.settings, worker=Late())
    for tracker in (inline, beside):
        weights = make_weights()
        for step in range(12):
            G = gradients(step)
            tracker.step(step, weights, G)
            for tensor in (*weights.values(), *G.values()):  # as the next step does, while it is looked at
                tensor.mul_(1.01).add_(0.01 * torch.sin(tensor))
    state = beside.state_dict()["rows"]
    for name, row in inline.state_dict()["rows"].items():
        for field, value in row.items():
            torch.testing.assert_close(state[name][field], value, rtol=0, atol=0)
    one, two = inline.flush(), beside.flush()
    assert sorted((r.kind, r.step) for r in one) == sorted((r.kind, r.step) for r in two)
    values = {(r.kind, r.step): r.values for r in two}
    assert all(values[r.kind, r.step] == r.values for r in one)


def test_what_fails_beside_the_step_is_raised_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights()
    tracker = SubspaceTracker(weights, dict.fromkeys(SHAPES, 12), worker=Late())
    tracker.analyse(0, weights)
    tracker.settle()

    def fails(*_, **__) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("svdtrain.spectral.fast_lane.fast_statistics", fails)
    tracker.observe(1, weights)
    with pytest.raises(RuntimeError, match="out of memory"):
        tracker.settle()
    monkeypatch.undo()
    tracker.observe(2, weights)
    assert [report.step for report in tracker.flush() if report.kind == "fast"] == [2]


def test_state_of_another_model_is_refused_and_changes_nothing() -> None:
    weights = make_weights()
    tracker = tracker_for(weights)
    tracker.analyse(0, weights)
    before = tracker.basis("q").U.clone()
    state = tracker.state_dict()
    with pytest.raises(ValueError, match="other matrices"):
        tracker.load_state_dict({"rows": {**state["rows"], "extra": state["rows"]["q"]}})
    with pytest.raises(ValueError, match="saved with shape"):
        tracker.load_state_dict({"rows": {**state["rows"], "q": state["rows"]["fc"]}})
    assert torch.equal(tracker.basis("q").U, before)


def test_bad_input() -> None:
    W = {"w": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match="a cut for each"):
        SubspaceTracker(W, {})
    with pytest.raises(ValueError, match=r"w: the cut must lie in \[0, 4\]"):
        SubspaceTracker(W, {"w": 5})
    with pytest.raises(ValueError, match="2-D"):
        SubspaceTracker({"w": torch.zeros(4)}, {"w": 0})
    with pytest.raises(ValueError, match="interval"):
        TrackerSettings(interval=0)
