"""What is learned from records: restarts, repeats, odd values, bounded memory."""

import itertools
import math

import pytest
from run_logs import LAYERS, analysis, record, switch, train, view_of

from svdtrain.monitor.series import Analyses, Schema, Series, Snapshot, column_of_line
from svdtrain.monitor.view import RunView
from svdtrain.runlog import encode_record


def test_a_series_of_any_length_stays_bounded_and_keeps_its_mean() -> None:
    series = Series(max_points=64)
    for step in range(1, 10_001):
        series.add(step, step % 10)
    steps, values = series.points()
    assert len(steps) <= 65
    assert steps == sorted(steps)
    assert steps[-1] == 10_000
    assert sum(values) / len(values) == pytest.approx(4.5, abs=0.2)


def test_values_that_are_not_finite_are_counted_and_spoil_no_mean() -> None:
    series = Series()
    assert series.add(1, 1.0)
    assert not series.add(2, math.nan)
    assert not series.add(3, math.inf)
    series.add(4, 3.0)
    assert series.points() == ([1, 4], [1.0, 3.0])
    assert series.num_non_finite == 2


def test_truncated_series_goes_on_from_there() -> None:
    series = Series()
    for step in range(1, 11):
        series.add(step, float(step))
    series.truncate(6)
    series.add(7, 70.0)
    assert series.points(since=5) == ([5, 6, 7], [5.0, 6.0, 70.0])
    assert series.last == 70.0


def test_analyses_cover_the_whole_run_evenly() -> None:
    analyses = Analyses(max_snapshots=32, num_recent=4)
    for index in range(1000):
        analyses.add(Snapshot(10 * index, record=analysis(10 * index, {"a": {"x": 1.0}})))
    steps = [s.step for s in analyses]
    assert len(steps) <= 36
    assert steps[0] == 0
    assert steps[-4:] == [9960, 9970, 9980, 9990]
    gaps = {b - a for a, b in itertools.pairwise(steps[:-4])}
    assert len(gaps) == 1


def test_an_undecoded_line_gives_the_same_numbers() -> None:
    written = analysis(5, {"h.0.c_q": {"lift": 1.5, "r": 9.0}, "h.1.c_q": {"lift": math.nan, "r": 7.0}})
    line = encode_record(written).encode()
    lazy, decoded = Snapshot(5, line=line), Snapshot(5, record=written)
    assert column_of_line(line, "r") == {"h.0.c_q": 9.0, "h.1.c_q": 7.0}
    lift = lazy.column("lift")
    assert not lazy.is_materialised
    assert lift["h.0.c_q"] == 1.5
    assert math.isnan(lift["h.1.c_q"])
    assert lazy.column("if") == {}
    for metric in decoded.metrics:
        for layer in decoded.layers(metric):
            assert lazy.get(metric, layer) == pytest.approx(decoded.get(metric, layer), nan_ok=True)
    assert math.isnan(lazy.get("none", "h.0.c_q"))


def test_values_that_are_no_numbers_are_nan() -> None:
    odd = record("svd", 1, **{"svd/a/x": None, "svd/b/x": 2.0, "svd/lonely": 3.0})
    assert Schema.of(odd).positions == {"x": {"a": 0, "b": 1}}
    assert math.isnan(Snapshot(1, record=odd).get("x", "a"))


def test_a_restart_takes_back_what_came_after_its_step() -> None:
    before = [record("start", 0, num_iterations=50)]
    before += [train(step, float(step)) for step in range(1, 21)]
    before += [switch(12, LAYERS[0]), analysis(10, {"a": {"x": 1.0}}), analysis(20, {"a": {"x": 2.0}})]
    view = view_of(*before, record("resume", 10, restart=1, num_iterations=50))
    assert view.step == 10
    assert not view.switches
    assert view.analyses.last_step == 10
    for step in range(11, 16):
        view.feed(train(step, 100.0, restart=1))
    assert view.series("train/loss").points(since=10) == ([10, 11, 12, 13, 14, 15], [10.0] + [100.0] * 5)
    assert view.num_resumes == 1
    assert view.step == 15


def test_a_restart_takes_back_switches_and_not_what_never_counted_as_one() -> None:
    view = view_of(
        record("start", 0), switch(4, "a"), switch(12, "a", "rank"), switch(14, "a", "to_full"),
        record("alert", 15, rule="svd", layer="a"), record("resume", 10, restart=1),
    )  # fmt: skip
    assert view.switch_counts["a"] == 1


def test_late_records_of_the_older_process_do_not_count() -> None:
    view = view_of(
        record("start", 0), train(1), record("resume", 1, restart=1), train(2, 5.0, restart=1), train(2, 9.0)
    )
    assert view.series("train/loss").last == 5.0
    assert view.num_late == 1


def test_repeated_records_count_once() -> None:
    again = train(1, 3.0)
    view = view_of(record("start", 0), again, again, train(2, 4.0), again)
    assert view.series("train/loss").points() == ([1, 2], [3.0, 4.0])
    alert = record("alert", 2, level="WARNING", rule="svd", message="x")
    view.feed(alert)
    view.feed(alert)
    view.feed({**alert, "message": "y"})
    assert len(view.alerts) == 2


def test_a_lost_resume_line_rewinds_too() -> None:
    view = view_of(record("start", 0), *[train(s, 1.0) for s in range(1, 11)], train(5, 7.0, restart=1))
    assert view.series("train/loss").points(since=4) == ([4, 5], [1.0, 7.0])


def test_an_old_schema_without_time_and_restart_is_readable() -> None:
    view = RunView()
    view.feed_line(b'{"kind": "train", "step": 1, "train/loss": 2.5}')
    view.feed_line(b'{"kind": "train", "step": 2, "train/loss": 2.4}')
    view.feed_line(b'{"kind": "svd", "step": 2, "svd/a/x": 1.0}')
    view.feed_line(b'{"loss": 2.5}')
    view.feed_line(b'{"kind": "tra')
    assert view.series("train/loss").last == 2.4
    assert view.analyses.layers() == ["a"]
    assert view.num_unreadable == 2
    assert math.isnan(view.eta_s)


def test_clock_jumps_do_not_spoil_the_eta() -> None:
    times = [100.0 + s for s in range(50)] + [90_000.0 + s for s in range(50)] + [500.0 + s for s in range(50)]
    records = [train(step + 1, when=when) for step, when in enumerate(times)]
    view = view_of(record("start", 0, num_iterations=250), *records)
    assert view.seconds_per_step == pytest.approx(1.0)
    assert view.eta_s == pytest.approx(100.0)
    assert view.longest_gap < 1.5


def test_a_log_that_invents_metrics_without_end_stays_bounded() -> None:
    view = RunView()
    for step in range(1, 500):
        view.feed(record("train", step, **{f"train/x{step}": 1.0}))
    assert len(view.scalars) <= 64


def test_non_finite_losses_are_remembered() -> None:
    view = view_of(train(1), train(2, math.nan), train(3, grad_norm=math.inf))
    assert list(view.bad_steps) == [2, 3]
