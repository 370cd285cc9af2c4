"""When a matrix is analysed, and when exactly."""

import pytest
import torch

from svdtrain.spectral import metrics as M
from svdtrain.spectral.decompose import decompose
from tests.spectral.reference import gaussian
from tests.spectral.tracked import SHAPES, SIZE, gradients, make_weights, moved, run, tracker_for


def test_the_spectrum_of_a_matrix_that_became_another_one_is_decomposed_anew() -> None:
    """Projections start at zero: their first updates are most of them, in directions that are not tracked. The values
    behind the tracked ones kept the shape of the first analysis for twenty more, ten times too small at the end."""
    start = (gaussian(SIZE, 24, seed=81) @ gaussian(24, SIZE, seed=82)).float()
    start += 1e-3 * start.norm() / SIZE * gaussian(SIZE, SIZE, seed=83).float()
    tracker = tracker_for({"w": start}, k=8, exact_every=100, oversample=16)
    tracker.analyse(0, {"w": start})
    after = start + 0.8 * start.norm() / SIZE * gaussian(SIZE, SIZE, seed=84).float()
    flags = []
    for step in (1, 2, 3):
        tracker.analyse(step, {"w": after})
        flags.append(tracker.poll()[-1].values["w"]["exact"])
    assert flags == [0, 1, 0]
    truth = torch.linalg.svdvals(after.double())
    found = tracker.spectrum("w").double()
    assert float(found[-SIZE // 8 :].norm()) == pytest.approx(float(truth[-SIZE // 8 :].norm()), rel=1e-3)


def test_reports_are_taken_at_a_fixed_step_whenever_they_arrived() -> None:
    weights = make_weights()
    tracker = tracker_for(weights)
    for step in range(4):
        tracker.step(step, weights, gradients(step))
    assert [(r.kind, r.step) for r in tracker.take(before=3)] == [("slow", 0), ("fast", 1), ("fast", 2)]
    assert tracker.take(before=3) == []
    assert [(r.kind, r.step) for r in tracker.take(before=9)] == [("fast", 3)]


def test_analyses_are_staggered_and_exact_by_age() -> None:
    weights = make_weights()
    tracker = tracker_for(weights, interval=8, exact_every=3, stagger=4)
    run(tracker, weights, range(1, 40))
    slow = [report for report in tracker.poll() if report.kind == "slow"]
    later = slow[1:]
    assert all(len(report.values) == 1 for report in later)
    for index, name in enumerate(SHAPES):
        steps = [report.step for report in later if name in report.values]
        assert all((step + 2 * index) % 8 == 0 for step in steps)
        exact = [report.values[name]["exact"] for report in later if name in report.values]
        assert exact.index(1) == (2 - index) % 3, "the first exact rounds must differ between matrices"


def test_residual_and_request_and_width_ask_for_an_exact_analysis() -> None:
    weights = make_weights()
    tracker = tracker_for(weights, exact_every=100, residual_tolerance=1e-5, max_iterations=1, oversample=16)
    tracker.analyse(0, weights)

    def exact_flags(step: int, W: dict[str, torch.Tensor]) -> dict[str, float]:
        tracker.analyse(step, W)
        return {name: values["exact"] for name, values in tracker.poll()[-1].values.items()}

    assert set(exact_flags(1, weights).values()) == {0}
    jumped = moved(weights, 1, 0.1)
    assert set(exact_flags(2, jumped).values()) == {0}  # warm, but its residual is over tolerance,
    assert set(exact_flags(3, jumped).values()) == {1}  # so the next one is exact
    tracker.request_exact(["fc"])
    assert exact_flags(4, jumped) == {"q": 0, "k": 0, "fc": 1, "proj": 0}
    tracker.set_cuts({"k": 36})  # more than the 32 directions that are known
    assert tracker.basis("k").g >= 36
    assert exact_flags(5, jumped) == {"q": 0, "k": 1, "fc": 0, "proj": 0}
    assert float(M.subspace_angle(tracker.basis("k").U, decompose(jumped["k"]).U, 36)) < 1e-3
    tracker.set_cuts({"q": 60})  # more than half of g: never iterated, analysed less often
    assert exact_flags(6, jumped)["q"] == 1
    assert exact_flags(7, jumped)["q"] == 1
    assert [step for step in range(1, 161) if "q" in tracker.due(step)] == [80, 160]


@pytest.mark.parametrize(
    ("oversample", "k", "width"),
    [(16, 30, 48), (4, 24, 32)],
    ids=["of the 32 known directions", "of which 16 are known"],
)
def test_a_falling_rank_widens_a_basis_without_an_exact_analysis(oversample: int, k: int, width: int) -> None:
    weights = make_weights()
    tracker = tracker_for(weights, exact_every=100, oversample=oversample, max_iterations=8)
    tracker.analyse(0, weights)
    tracker.set_cuts({"k": k})
    later = moved(weights, 1, 0.02)
    tracker.analyse(1, later)
    values = tracker.poll()[-1].values["k"]
    assert values["exact"] == 0
    assert values["residual"] < tracker.settings.residual_tolerance
    truth = decompose(later["k"])
    assert tracker.basis("k").g == width
    gap = float((truth.S[k - 1] - truth.S[k]) / truth.S[0])
    # Wedin: the angle at k is at most the residual over the gap there.
    assert float(M.subspace_angle(tracker.basis("k").U, truth.U, k)) < values["residual"] / gap
    torch.testing.assert_close(tracker.basis("k").S[:k], truth.S[:k], rtol=1e-3, atol=0)
    tracker.observe(2, moved(later, 2))
    share = tracker.poll()[-1].values["k"]["update/share"]
    dW = moved(later, 2)["k"] - later["k"]
    assert share == pytest.approx(float(M.principal_share(dW.double(), truth.U.double(), k)), rel=0.02)


def test_what_a_gpu_decomposes_exactly_it_decomposes_together() -> None:
    weights = make_weights()
    tracker = tracker_for(weights, exact_every=6, exact_together=True)
    flags = []
    for step in range(12):
        if step in (7, 9):
            tracker.request_exact(["q"])
        tracker.analyse(step, weights)
        flags.append([values["exact"] for values in tracker.poll()[-1].values.values()])
    assert [step for step in range(12) if sum(flags[step]) == 4] == [0, 6]
    assert flags[7] == [1, 0, 0, 0]  # what was exact a moment ago does not join,
    assert flags[9] == [1, 1, 0, 0]  # what would be due before long does, of its shape


def test_unchanged_matrices_are_skipped_and_keep_their_reference() -> None:
    weights = make_weights()
    tracker = tracker_for(weights, exact_every=100, skip_tolerance=1e-3)
    tracker.analyse(0, weights)
    before = tracker.basis("k").U.clone()
    after = {**weights, "q": moved(weights, 1, 0.05)["q"], "k": weights["k"] * (1 + 1e-5)}
    tracker.analyse(1, after)
    values = tracker.poll()[-1].values
    assert {name: v["skipped"] for name, v in values.items()} == {"q": 0, "k": 1, "fc": 1, "proj": 1}
    assert torch.equal(tracker.basis("k").U, before)
    tracker.observe(2, after)
    norm = tracker.poll()[-1].values["k"]["update/norm"]
    assert norm == pytest.approx(1e-5 * float(weights["k"].norm()), rel=0.05)


def test_install_at_a_switch() -> None:
    weights = make_weights()
    tracker = tracker_for(weights)
    tracker.analyse(0, weights)
    after = moved(weights, 3, 0.1)
    exact = decompose(after["q"])
    tracker.install({"q": exact}, after, step=5)
    torch.testing.assert_close(tracker.basis("q").U, exact.U[:, : tracker.basis("q").g], rtol=0, atol=0)
    tracker.observe(6, after)
    assert tracker.poll()[-1].values["q"] == {"update/finite": 1.0, "update/norm": 0.0}
