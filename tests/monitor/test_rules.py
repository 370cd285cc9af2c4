"""Every rule fires when it should, is quiet when it should, and holds on until things are clearly better."""

import math
import random
import re
from pathlib import Path

import pytest
from run_logs import CONFIG, LAYERS, analysis, record, switch, train, view_of

from svdtrain.monitor.alerts import COOL_DOWN_S, AlertBook, advance
from svdtrain.monitor.findings import CRITICAL, INFO, WARNING, Finding, Situation
from svdtrain.monitor.forecast import fit_trend, steps_until
from svdtrain.monitor.limits import limits_of
from svdtrain.monitor.rules import RULES, evaluate
from svdtrain.monitor.written import WRITTEN


def found(*records, age_s: float = 0.0, active: tuple[str, ...] = (), config=None) -> dict[str, Finding]:
    return evaluate(Situation(view=view_of(*records, config=config), age_s=age_s), active)


def alignments(values: list[float], mode: float = 0.0) -> list[dict]:
    """Analyses every 10 steps with this principal alignment of the first layer; the second one is quiet."""
    quiet = {"principal_alignment": 0.05, "mode": 0.0}
    return [
        analysis(10 * (i + 2), {LAYERS[0]: {"principal_alignment": v, "mode": mode}, LAYERS[1]: quiet})
        for i, v in enumerate(values)
    ]


def steps(losses: list[float], **fields) -> list[dict]:
    return [train(i + 1, loss, **fields) for i, loss in enumerate(losses)]


def test_a_healthy_run_raises_nothing() -> None:
    random_ = random.Random(0)
    records = [record("start", 0, num_iterations=1000), *alignments([0.1, 0.11, 0.1, 0.09, 0.1, 0.11])]
    records += steps([3 - 0.001 * i + random_.gauss(0, 0.05) for i in range(300)])
    assert found(*records) == {}


def test_alerts_have_texts() -> None:
    for name, alert in {**RULES, **WRITTEN}.items():
        text = alert.explain()
        assert name in text
        assert all(len(part) > 4 for part in (alert.fires, alert.resolves, alert.meaning, alert.to_do))


def test_every_alert_that_training_writes_is_explained() -> None:
    written = re.compile(r"""\.alert\((?:step, )?(?:"[A-Z]+"|event\["level"\]), "(\w+)""" + '"')
    root = Path(__file__).resolve().parents[2]
    sources = [p.read_text() for package in ("svdtrain", "nanochat_patch") for p in (root / package).rglob("*.py")]
    names = {name for source in sources for name in written.findall(source)}
    assert {"interference", "svd", "no_sidecar"} <= names
    assert names <= {*RULES, *WRITTEN}


@pytest.mark.parametrize(
    ("value", "rule"), [(0.31, "over_limit"), (0.26, "near_limit"), (0.24, None)]
)  # limit .3, margin .05
def test_distance_to_the_limit(value: float, rule: str | None) -> None:
    assert set(found(*alignments([value]))) == ({rule} if rule else set())


def test_over_limit_holds_until_half_a_margin_below() -> None:
    assert "over_limit" in found(*alignments([0.28]), active=("over_limit",))
    assert "over_limit" not in found(*alignments([0.27]), active=("over_limit",))


def test_low_rank_matrices_are_beyond_no_full_mode_limit() -> None:
    assert found(*alignments([0.5], mode=1.0)) == {}


def test_no_limit_alerts_during_warm_up() -> None:
    early = analysis(5, {LAYERS[0]: {"principal_alignment": 0.5, "mode": 0.0}})
    assert found(early) == {}


def test_switch_now_names_the_matrices_and_goes_away() -> None:
    told = found(*alignments([0.1]), switch(20, LAYERS[0]), switch(20, LAYERS[1]))["switch_now"]
    assert told.level == CRITICAL
    assert set(told.layers) == set(LAYERS)
    later = [*alignments([0.1]), switch(20, LAYERS[0]), train(31)]
    assert "switch_now" not in found(*later)
    assert "switch_now" in found(*alignments([0.1]), switch(20, LAYERS[0]), train(35), active=("switch_now",))


def test_switches_for_other_reasons_are_no_alarm() -> None:
    assert "switch_now" not in found(*alignments([0.1]), switch(20, LAYERS[0], reason="optimal_lowrank_conditions"))
    assert "back_to_full" in found(*alignments([0.1]), switch(20, LAYERS[0], change="to_full"))


def test_a_steep_trend_is_imminent_a_slow_one_information() -> None:
    steep = found(*alignments([0.10, 0.13, 0.161, 0.19, 0.221, 0.249]))
    assert "trend" in steep or "switch_imminent" in steep
    steeper = found(*alignments([0.05, 0.10, 0.151, 0.20, 0.249, 0.2999]))
    assert steeper["switch_imminent"].layers == (LAYERS[0],)
    slow = found(*alignments([0.20, 0.205, 0.21, 0.214, 0.22, 0.225]))
    assert slow["trend"].level == INFO
    assert "switch_imminent" not in slow


def test_a_trend_does_not_reach_across_a_switch() -> None:
    rising = alignments([0.05, 0.1, 0.15, 0.2], mode=1.0)
    after = [{**r, "step": r["step"] + 40} for r in alignments([0.22, 0.23])]
    assert not {"trend", "switch_imminent"} & set(found(*rising, *after))


def test_non_finite() -> None:
    assert found(train(1), train(2, math.nan))["non_finite"].level == CRITICAL
    veto = record("alert", 2, level="CRITICAL", rule="non_finite", message="gradient norm is nan")
    assert "non_finite" in found(train(1), veto)
    clean = [train(1, math.nan), *[train(s) for s in range(2, 41)]]
    assert "non_finite" not in found(*clean)
    assert "non_finite" in found(*clean, active=("non_finite",))


def test_stalled_after_a_time_that_fits_the_run() -> None:
    running = [record("start", 0), *steps([2.0] * 50)]
    assert "stalled" not in found(*running, age_s=50)
    assert found(*running, age_s=70)["stalled"].level == CRITICAL
    slow = [record("start", 0), *[train(s, when=1e9 + 30 * s) for s in range(1, 51)]]
    assert "stalled" not in found(*slow, age_s=500)
    assert "stalled" in found(*slow, age_s=700)
    assert "stalled" not in found(*running, record("end", 50, reason="finished"), age_s=9e9)


def test_crashed_and_stopped() -> None:
    assert "crashed" in found(train(1), record("end", 1, reason="exception: RuntimeError: x"))
    assert "crashed" in found(train(1), record("end", 1, reason="non-finite for 3 steps in a row"))
    assert "crashed" not in found(train(1), record("end", 1, reason="exception: KeyboardInterrupt: "))


def test_three_restarts_without_progress() -> None:
    starts = [record("start", 0), *[record("resume", 5, restart=i) for i in range(1, 5)]]
    assert "no_progress" in found(*starts)
    assert "no_progress" not in found(*starts[:4])
    assert "no_progress" not in found(*starts, train(6, restart=4), record("checkpoint", 6, restart=4))


def test_throughput_drop() -> None:
    speeds = [1000.0] * 100 + [700.0] * 20
    dropped = [train(i + 1, tok_per_sec=v) for i, v in enumerate(speeds)]
    assert "700" in found(record("start", 0), *dropped)["throughput"].message
    recovered = [train(i + 1, tok_per_sec=v) for i, v in enumerate([1000.0] * 100 + [850.0] * 20)]
    assert "throughput" not in found(record("start", 0), *recovered)
    assert "throughput" in found(record("start", 0), *recovered, active=("throughput",))


def test_loss_shift_but_not_a_descent_or_noise() -> None:
    random_ = random.Random(1)
    quiet = [2.5 - 0.002 * i + random_.gauss(0, 0.05) for i in range(200)]
    assert "loss_shift" not in found(*steps(quiet))
    assert found(*steps([*quiet, *[v + 0.5 for v in quiet[-10:]]]))["loss_shift"].level == WARNING


def test_a_gradient_norm_that_wanders_is_no_jump() -> None:
    draw, level, norms = random.Random(3), 0.0, []
    for _ in range(400):  # correlated over some ten steps, as real ones are
        level = 0.9 * level + draw.gauss(0, 0.06)
        norms.append(1.3 + level + draw.gauss(0, 0.05))
    ends = range(120, 400, 10)
    fired = [end for end in ends if "grad_norm_jump" in found(*gradient_norms(norms[:end]))]
    assert len(fired) <= 1, fired
    assert "grad_norm_jump" in found(*gradient_norms([*norms[:200], *[2 * v for v in norms[200:210]]]))


def gradient_norms(values: list[float]) -> list[dict]:
    return [train(step, grad_norm=value) for step, value in enumerate(values, 1)]


def test_validation_rising() -> None:
    evals = [record("eval", s, **{"val/bpb": v}) for s, v in ((0, 3.0), (50, 2.0), (100, 2.1))]
    assert "5.0 %" in found(*evals)["val_rising"].message
    assert "val_rising" not in found(*evals[:2], record("eval", 100, **{"val/bpb": 2.02}))


def test_checkpoint_trouble_until_the_next_durable_one() -> None:
    failed = record("alert", 20, level="CRITICAL", rule="checkpoint_failed", message="disk full")
    saved = record("checkpoint", 10, path="x")
    assert found(train(9), saved, train(20), failed)["checkpoint"].level == CRITICAL
    assert "checkpoint" not in found(train(9), failed, train(30), record("checkpoint", 30, path="y"), train(31))


def test_flapping_two_writers_unreadable_restarted() -> None:
    to_and_fro = [
        switch(s, LAYERS[0], change) for s, change in ((20, "to_lowrank"), (30, "to_full"), (40, "to_lowrank"))
    ]
    assert "flapping" not in found(*alignments([0.1] * 5), *to_and_fro)
    assert "flapping" in found(*alignments([0.1] * 5), *to_and_fro, switch(50, LAYERS[0], "to_full"))
    assert "two_writers" in found(record("start", 0), record("resume", 1, restart=1), train(2))
    assert "restarted" in found(record("start", 0), record("resume", 1, restart=1), train(2, restart=1))
    view = view_of(train(1))
    view.feed_line(b"{torn")
    assert "unreadable" in evaluate(Situation(view=view))


def test_calibrated_limits_need_evidence_and_an_established_matrix() -> None:
    config = {**CONFIG, "svd": {**CONFIG["svd"], "svd_rule": "calibrated"}}

    def over(**values: float) -> bool:
        metrics = {"update_lift": 1.8, "update_z": 9.0, "update_size": 0.01, "mode": 0.0, **values}
        return "over_limit" in found(analysis(20, {"a": metrics}), config=config)

    assert over()
    assert not over(update_z=1.0)
    assert not over(update_size=0.9)
    assert not over(update_lift=1.2)
    names = [limit.metric for limit in limits_of(config, ["update_lift", "rotation_ratio", "gradient_lift"])]
    assert names == ["update_lift", "rotation_ratio", "gradient_lift"]


# --- the book ---

UP = {"r": Finding(level=WARNING, message="m")}


def test_an_alert_is_told_once_and_resolved_after_two_clear_checks() -> None:
    book, told = advance(AlertBook(), UP, step=1, now=0.0)
    assert [e.rule for e in told] == ["r"]
    book, told = advance(book, UP, step=2, now=1.0)
    assert told == []
    book, told = advance(book, {}, step=3, now=2.0)
    assert told == []
    assert "r" in book.active
    book, told = advance(book, {}, step=4, now=3.0)
    assert [e.resolved for e in told] == [True]
    assert book.worst is None


def test_information_is_told_but_its_end_is_not() -> None:
    book, told = advance(AlertBook(), {"r": Finding(level=INFO, message="m")}, step=1, now=0.0)
    assert len(told) == 1
    for step in (2, 3):
        book, told = advance(book, {}, step=step, now=1.0)
        assert told == []
    assert not book.active


def test_cool_down_keeps_a_flickering_alert_quiet_but_up() -> None:
    book, _ = advance(AlertBook(), UP, step=1, now=0.0)
    for step in (2, 3):
        book, _ = advance(book, {}, step=step, now=float(step))
    book, told = advance(book, UP, step=4, now=5.0)
    assert told == []
    assert book.worst == WARNING
    for step in (5, 6):
        book, _ = advance(book, {}, step=step, now=float(step))
    _, told = advance(book, UP, step=7, now=COOL_DOWN_S + 1)
    assert len(told) == 1


def test_a_rise_in_level_is_told_at_once() -> None:
    book, _ = advance(AlertBook(), UP, step=1, now=0.0)
    book, told = advance(book, {"r": Finding(level=CRITICAL, message="worse")}, step=2, now=1.0)
    assert [e.level for e in told] == [CRITICAL]
    assert book.worst == CRITICAL


# --- the forecast ---


def test_forecast_of_a_straight_line_is_exact() -> None:
    trend = fit_trend([(10 * i, 0.1 + 0.01 * i) for i in range(8)])
    assert trend is not None
    forecast = steps_until(trend, 0.3)
    assert forecast is not None
    assert forecast.steps == pytest.approx(130)
    assert forecast.earliest == pytest.approx(130)
    assert steps_until(trend, 0.0, above=False) is None
    assert steps_until(trend, 0.05) is not None
    assert fit_trend([(0, 1.0)] * 4) is None


def test_forecast_interval_covers_most_crossings() -> None:
    """Noise around a line that reaches .3 after step 400: the true crossing of the line lies inside about 80 %."""
    random_ = random.Random(0)
    inside = 0
    for _ in range(300):
        points = [(10 * i, 0.1 + 0.0005 * 10 * i + random_.gauss(0, 0.01)) for i in range(20)]
        trend = fit_trend(points)
        assert trend is not None
        forecast = steps_until(trend, 0.3)
        inside += forecast is not None and forecast.earliest <= 400 - 190 <= forecast.latest
    assert 0.8 <= inside / 300 <= 0.99
