import math

import pytest
import torch

from svdtrain.spectral import metrics as M
from svdtrain.spectral import null as N
from svdtrain.spectral.decompose import decompose
from svdtrain.spectral.settings import TrackerSettings
from svdtrain.spectral.tracking import SubspaceTracker
from tests.spectral.reference import gaussian, zoo
from tests.spectral.tracked import SIZE, gradients, make_weights, moved, run, tracker_for


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
