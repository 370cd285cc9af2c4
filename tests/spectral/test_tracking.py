import io
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch

from svdtrain.spectral import metrics as M
from svdtrain.spectral import null as N
from svdtrain.spectral.decompose import decompose
from svdtrain.spectral.settings import TrackerSettings
from svdtrain.spectral.tracking import SubspaceTracker
from svdtrain.spectral.worker import Worker
from tests.spectral.reference import gaussian, zoo
from tests.spectral.test_subspace import trained

torch.set_num_threads(1)
SIZE = 96
SHAPES = {"q": (SIZE, SIZE), "k": (SIZE, SIZE), "fc": (2 * SIZE, SIZE), "proj": (SIZE, 2 * SIZE)}


def make_weights() -> dict[str, torch.Tensor]:
    return {name: trained(10 * i, *shape).float() for i, (name, shape) in enumerate(SHAPES.items())}


def gradients(seed: int) -> dict[str, torch.Tensor]:
    return {name: gaussian(*shape, seed=seed * 10 + i).float() for i, (name, shape) in enumerate(SHAPES.items())}


def moved(weights: dict[str, torch.Tensor], seed: int, size: float = 0.002) -> dict[str, torch.Tensor]:
    return {name: W + size * W.norm() / (g := gradients(seed)[name]).norm() * g for name, W in weights.items()}


def tracker_for(weights: dict[str, torch.Tensor], k: int = 12, **settings) -> SubspaceTracker:
    return SubspaceTracker(weights, dict.fromkeys(weights, k), TrackerSettings(**settings))


def run(tracker: SubspaceTracker, weights: dict[str, torch.Tensor], steps: range) -> dict[str, torch.Tensor]:
    for step in steps:
        weights = moved(weights, step)
        tracker.step(step, weights, gradients(step + 100))
    return weights


def test_first_report_is_exact_and_compares_with_nothing() -> None:
    weights = make_weights()
    tracker = tracker_for(weights)
    assert tracker.due(7) == list(weights)
    with pytest.raises(LookupError, match="no basis"):
        tracker.basis("q")
    tracker.step(0, weights, gradients(0))
    (report,) = tracker.poll()
    assert (report.kind, report.step, set(report.values)) == ("slow", 0, set(weights))
    values = report.values["q"]
    truth = torch.linalg.svdvals(weights["q"].double())
    assert (values["ok"], values["exact"]) == (1, 1)
    assert not {"rho", "angle", "update_ratio"} & set(values)
    assert values["stable_rank"] == pytest.approx(float(M.stable_rank(truth)), rel=1e-4)
    assert values["entropy_rank"] == pytest.approx(float(M.entropy_rank(truth)), rel=1e-4)
    assert values["threshold_rank"] == 12
    torch.testing.assert_close(tracker.spectrum("q").double(), truth, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_lane_gives_the_plain_metrics(dtype: torch.dtype) -> None:
    weights = make_weights()
    tracker = tracker_for(weights, fast_dtype=dtype, chunk=1, gradient_right_side=True)
    tracker.analyse(0, weights)
    after, G = moved(weights, 1, 0.01), gradients(5)
    tracker.observe(1, after, G)
    report = next(r for r in tracker.poll() if r.kind == "fast")
    share_tolerance = 1e-5 if dtype == torch.float32 else 1e-3  # the contract asks for 1e-3 of energies, .01 of shares
    for name, W in weights.items():
        m, n = W.shape
        d, dW, values = decompose(W), after[name] - W, report.values[name]
        blocks = M.block_energies(dW, d.U, d.V, 12)
        for block, expected in {
            "pp": blocks.pp, "pm": blocks.pm + blocks.po, "mp": blocks.mp + blocks.op,
            "mm": blocks.mm + blocks.mo + blocks.om,
        }.items():  # fmt: skip
            assert values[f"update/{block}"] == pytest.approx(float(expected / blocks.total), abs=share_tolerance)
        share, participation = M.principal_share(G[name], d.U, 12), M.matrix_participation_ratio(G[name])
        evidence = N.share_evidence(share, 12, m, participation)
        assert values["gradient/share"] == pytest.approx(float(share), abs=share_tolerance)
        assert values["gradient/norm"] == pytest.approx(float(G[name].norm()), rel=1e-3)
        if dtype == torch.float32:
            assert values["gradient/z"] == pytest.approx(float(evidence.z), abs=0.02)
            assert values["gradient/lift"] == pytest.approx(float(evidence.lift), rel=1e-3)
            diagonal = M.principal_diagonal(dW, d.U, d.V, 12)
            erasure = float((diagonal * d.S[:12]).sum() / d.S[:12].square().sum())
            assert values["update/erasure"] == pytest.approx(erasure, abs=1e-5)
        assert values["gradient/participation"] == pytest.approx(float(participation), rel=1e-3)
        assert values["gradient/right_share"] == pytest.approx(
            float(M.principal_share(G[name].mT, d.V, 12)), abs=share_tolerance
        )
        assert values["update/pp_lift"] == pytest.approx(values["update/pp"] * m * n / 144)


def test_the_cpu_saves_the_right_side_of_the_gradient() -> None:
    weights = make_weights()
    tracker = tracker_for(weights)
    tracker.analyse(0, weights)
    tracker.observe(1, moved(weights, 1), gradients(1))
    values = tracker.poll()[-1].values["q"]
    assert {"update/right_share", "update/mm", "gradient/share", "gradient/pp"} <= set(values)
    assert not {"gradient/right_share", "gradient/mm"} & set(values)


def test_updates_can_be_given_and_tiny_and_broken_ones_are_reported() -> None:
    weights = make_weights()
    tracker = tracker_for(weights)
    tracker.analyse(0, weights)
    updates = gradients(3)
    expected = float(M.principal_share(updates["q"], decompose(weights["q"]).U, 12))
    updates["q"] *= 1e-30
    updates["k"][0, 0] = float("nan")
    updates["fc"].zero_()
    tracker.observe(1, weights, updates=updates)
    values = tracker.poll()[-1].values
    assert values["q"]["update/share"] == pytest.approx(expected, abs=1e-5)
    assert values["k"] == {"update/finite": 0.0}
    assert values["fc"] == {"update/finite": 1.0, "update/norm": 0.0}
    assert values["proj"]["update/finite"] == 1.0


def test_tracked_bases_stay_within_the_contract() -> None:
    """40 small steps, warm analyses only: angle within .01, singular values within 1e-3, rho near 1 for noise."""
    weights = make_weights()
    tracker = tracker_for(weights, interval=5, exact_every=100)
    weights = run(tracker, weights, range(41))
    tracker.analyse(41, weights)
    slow = [report for report in tracker.poll() if report.kind == "slow"]
    assert sum(values["exact"] for report in slow for values in report.values.values()) == len(weights)
    for name, W in weights.items():
        truth = decompose(W)
        assert float(M.subspace_angle(tracker.basis(name).U, truth.U, 12)) < 0.01
        torch.testing.assert_close(tracker.basis(name).S[:12], truth.S[:12], rtol=1e-3, atol=0)
        assert float(M.stable_rank(tracker.spectrum(name))) == pytest.approx(float(M.stable_rank(truth.S)), rel=1e-2)
        assert float(M.entropy_rank(tracker.spectrum(name))) == pytest.approx(float(M.entropy_rank(truth.S)), rel=2e-2)
    rhos = [values["rho"] for report in slow for values in report.values.values() if "rho" in values]
    assert len(rhos) > 20
    assert 0.7 < sum(rhos) / len(rhos) < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", zoo())
def test_every_kind_of_matrix_is_tracked_within_the_contract(name: str, dtype: torch.dtype) -> None:
    """Warm analyses after small steps against float64: angle .01 and shares .01 where there is a gap, energies 1e-3."""
    W = zoo()[name].to(dtype)
    m, n = W.shape
    g, size = min(m, n), float(W.abs().max())
    k = {"spiked": 3, "clustered": 20, "rank_deficient": 5}.get(name, max(1, g // 4))
    settings = TrackerSettings(interval=1, stagger=1, oversample=8, widest_share=1.0, exact_every=100)
    tracker = SubspaceTracker({"w": W}, {"w": k}, settings)
    for step in range(5):
        tracker.analyse(step, {"w": W})
        basis, (report,) = tracker.basis("w"), tracker.flush()
        assert report.values["w"]["ok"] == 1
        U, S, _ = torch.linalg.svd(W.double(), full_matrices=False)
        energy, found = (float((T[:k].double() / (size or 1.0)).square().sum()) for T in (S, basis.S))
        assert found == pytest.approx(energy, rel=1e-3)
        if k < g and S[k - 1] - S[k] > 1e-3 * S[0]:
            assert float(M.subspace_angle(basis.U, U, k)) < 0.01
            G = gaussian(m, n, seed=99)
            shares = [float(M.principal_share(G, T.double(), k)) for T in (U, basis.U)]
            assert shares[0] == pytest.approx(shares[1], abs=0.01)
        W = (W.double() + 0.02 * size / m**0.5 * gaussian(m, n, seed=step)).to(dtype)


def test_a_new_direction_is_found_without_an_exact_analysis() -> None:
    """Rank one, anywhere, twice as strong as all there was: outside the old basis on both sides but for chance."""
    weights = make_weights()
    tracker = tracker_for(weights, exact_every=100)
    tracker.analyse(0, weights)
    u, v = (gaussian(SIZE, seed=seed).float() for seed in (71, 72))
    after = {**weights, "q": weights["q"] + 12 * torch.outer(u / u.norm(), v / v.norm())}
    tracker.analyse(1, after)
    values = tracker.poll()[-1].values["q"]
    assert values["exact"] == 0
    assert values["intruders"] == 1
    assert float(M.subspace_angle(tracker.basis("q").U, decompose(after["q"]).U, 12)) < 0.01
    assert values["update_lift"] > 4
    assert values["update_share"] == pytest.approx(1, abs=0.05)


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


def test_warm_errors_do_not_add_up() -> None:
    """Thirty analyses without an exact one end as close as the first."""
    weights = {"q": make_weights()["q"]}
    tracker = tracker_for(weights, exact_every=100)
    tracker.analyse(0, weights)
    for step in range(1, 31):
        weights = {"q": moved({**make_weights(), **weights}, step, 0.01)["q"]}
        tracker.analyse(step, weights)
    assert all(report.values["q"]["exact"] == 0 for report in tracker.poll()[1:])
    assert float(M.subspace_angle(tracker.basis("q").U, decompose(weights["q"]).U, 12)) < 0.01


def test_reports_are_taken_at_a_fixed_step_whenever_they_arrived() -> None:
    weights = make_weights()
    tracker = tracker_for(weights)
    for step in range(4):
        tracker.step(step, weights, gradients(step))
    assert [(r.kind, r.step) for r in tracker.take(before=3)] == [("slow", 0), ("fast", 1), ("fast", 2)]
    assert tracker.take(before=3) == []
    assert [(r.kind, r.step) for r in tracker.take(before=9)] == [("fast", 3)]


def test_rotation_numbers_agree_with_exact_ones() -> None:
    weights = make_weights()
    tracker = tracker_for(weights, exact_every=100)
    tracker.analyse(0, weights)
    after = moved(weights, 1, 0.02)
    d = decompose(weights["q"])
    directed = d.U[:, 12:24] @ gaussian(12, 12, seed=4).float() @ d.V[:, :12].mT
    after["q"] = weights["q"] + 0.5 * directed / directed.norm()
    tracker.analyse(20, after)
    values = tracker.poll()[-1].values
    for name, W in weights.items():
        old, new = decompose(W), decompose(after[name])
        expected = N.rotation_null(old.S, 12, N.update_variance(after[name] - W), W.shape[0])
        sin_squared = M.sin_theta_squared(old.U[:, :12], new.U[:, :12])
        assert values[name]["exact"] == 0
        assert values[name]["sin_squared"] == pytest.approx(float(sin_squared), rel=0.1)
        assert values[name]["expected"] == pytest.approx(float(expected), rel=0.05)
        assert values[name]["angle"] == pytest.approx(float(M.subspace_angle(old.U, new.U, 12)), abs=0.01)
    assert values["q"]["rho"] > 4 * values["k"]["rho"]
    assert values["q"]["intruders"] == 0


def test_no_gap_is_said_instead_of_an_angle() -> None:
    W = {"w": torch.eye(SIZE) + 1e-5 * gaussian(SIZE, SIZE).float()}
    tracker = tracker_for(W)
    tracker.analyse(0, W)
    tracker.analyse(1, {"w": W["w"] * 1.01})
    values = tracker.poll()[-1].values["w"]
    assert values["no_gap"] == 1
    assert "angle" not in values
    assert math.isfinite(values["rho"])


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


def test_bfloat16_weights_and_memory_table() -> None:
    weights = {name: W.bfloat16() for name, W in make_weights().items()}
    tracker = tracker_for(weights)
    tracker.step(0, weights)
    tracker.step(1, {name: W + 0.01 for name, W in weights.items()}, weights)
    assert tracker.poll()[-1].values["q"]["gradient/finite"] == 1
    assert tracker.basis("q").U.dtype == torch.float32
    assert tracker.memory_bytes()["references"] == sum(W.nbytes for W in weights.values())


@pytest.mark.parametrize("k", [0, 40])
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (40, 40)])
def test_edge_cuts_and_shapes(shape: tuple[int, int], k: int) -> None:
    W = {"w": gaussian(*shape).float()}
    tracker = SubspaceTracker(W, {"w": min(k, *shape)})
    for step in range(3):
        tracker.step(step, {"w": W["w"] * (1 + 0.01 * step)}, W)
    values = tracker.poll()[-1].values["w"]
    assert math.isfinite(values["gradient/z"])
    tracker.analyse(5, W)
    assert tracker.poll()[-1].values["w"]["ok"] == 1


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
