"""The screen: right size, right characters, right contents; plots that show what they say."""

import math

import pytest
from rich.console import Console
from run_logs import LAYERS, analysis, healthy_run, record, train, write_run

from svdtrain.monitor import plots
from svdtrain.monitor.render import plain, screen
from svdtrain.monitor.sections import Display
from svdtrain.monitor.session import Session, matches, metric_names, next_switches, parse_since


def session_of(path) -> Session:
    session = Session(path)
    session.poll()
    return session


@pytest.mark.parametrize("size", [(80, 24), (200, 50), (60, 20), (130, 24), (300, 90)])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_screen_fits_and_has_every_part(tmp_path, size: tuple[int, int], ascii_only: bool) -> None:
    session = session_of(healthy_run(tmp_path / "run", end=""))
    lines = screen(session, *size, Display(ascii_only=ascii_only, colour=False))
    text = "\n".join(line.plain for line in lines)
    assert len(lines) == size[1]
    assert max(line.cell_len for line in lines) <= size[0]
    for part in (
        "running",
        "step 200/1,000",
        "ETA",
        "train loss",
        "val bpb",
        "tok/s",
        "principal_alignment",
        "worst layers",
    ):
        assert part in text
    for part in ("next switch", "switches: 2", "optimal_lowrank", "alerts"):
        assert part in text
    assert not ascii_only or text.isascii()


def test_a_run_without_any_number_still_has_a_screen(tmp_path) -> None:
    session = session_of(write_run(tmp_path / "run", [record("start", 0, num_iterations=10)], config={}))
    text = "\n".join(line.plain for line in screen(session, 80, 24, Display()))
    assert "no value yet" in text
    assert "no analysis yet" in text


def test_a_curve_shows_its_shape() -> None:
    falling = plots.curve(range(100), [100.0 - i for i in range(100)], width=20, height=5, ascii_only=True)
    assert falling is not None
    first = [row.find("*") for row in falling.rows]
    assert first == sorted(first)
    assert first[0] == 0
    assert falling.rows[-1].rstrip().endswith("*")
    assert (falling.first_step, falling.last_step) == (0, 99)
    assert plots.curve([1], [math.nan], width=10, height=3, ascii_only=True) is None
    flat = plots.curve([1, 2], [2.0, 2.0], width=10, height=3, ascii_only=False)
    assert flat is not None
    assert flat.low < 2.0 < flat.high


def test_few_points_are_joined_by_straight_lines() -> None:
    drawn = plots.curve([0, 100], [0.0, 1.0], width=11, height=11, ascii_only=True)
    assert drawn is not None
    assert [row.index("*") for row in reversed(drawn.rows)] == list(range(11))


def test_sparkline_starts_at_zero() -> None:
    assert plots.sparkline([1, 2, 4], width=3, ascii_only=False) == "▃▅█"
    assert plots.sparkline([4, 4, 4], width=3, ascii_only=False) == "███"
    assert plots.sparkline([], width=3, ascii_only=False) == ""


def test_heatmap_takes_the_newest_of_each_stretch_and_the_highest_of_each_row() -> None:
    columns = [{"a": float(i), "b": 10.0 - i} for i in range(10)]
    drawn = plots.heatmap(list(range(10)), columns, {"a": ["a"], "both": ["a", "b"]}, width=5)
    assert drawn is not None
    values = [drawn.low + cell * (drawn.high - drawn.low) for cell in drawn.cells[0]]
    assert values == pytest.approx([1, 3, 5, 7, 9])
    both = [drawn.low + cell * (drawn.high - drawn.low) for cell in drawn.cells[1]]
    assert both == pytest.approx([9, 7, 5, 7, 9])


def test_many_layers_are_grouped_by_block() -> None:
    layers = [f"transformer.h.{i}.attn.{m}" for i in range(20) for m in ("c_q", "c_k")]
    assert len(plots.group_layers(layers, 40)) == 40
    assert list(plots.group_layers(layers, 20))[:2] == ["h.0", "h.1"]
    few = plots.group_layers(layers, 6)
    assert len(few) <= 6
    assert sum(map(len, few.values())) == 40


def test_layers_metric_and_since_choose(tmp_path) -> None:
    session = session_of(healthy_run(tmp_path / "run"))
    text = "\n".join(
        line.plain for line in screen(session, 80, 24, Display(layers="h.1", metric="stable", since="100"))
    )
    assert "stable_rank" in text
    assert "h.0.attn" not in text
    assert "100" in text
    assert "r/g" in metric_names(session.view)
    assert matches("h.1.attn.c_q", "h.1.*")
    assert not matches("h.1.attn.c_q", "c_k,mlp")


def test_since_takes_steps_and_times(tmp_path) -> None:
    session = session_of(healthy_run(tmp_path / "run"))
    assert parse_since("70", session.view, session.clock()) == 70
    assert parse_since("50s", session.view, session.clock()) == pytest.approx(150, abs=5)
    with pytest.raises(ValueError, match="30m"):
        parse_since("soon", session.view, 0.0)


def test_forecast_counts_from_now(tmp_path) -> None:
    values = [0.10, 0.12, 0.14, 0.16, 0.18, 0.20]
    rising = [
        analysis(10 * (i + 1), {LAYERS[0]: {"principal_alignment": v, "mode": 0.0, "r": 60.0}})
        for i, v in enumerate(values)
    ]
    run = write_run(tmp_path / "run", [record("start", 0, num_iterations=500), *rising, train(65)])
    ahead = next_switches(session_of(run), 3)
    assert ahead == [
        {"layer": LAYERS[0], "to": "low-rank", "metric": "principal_alignment"}
        | {"steps": 45, "earliest": 45, "latest": 45}
    ]
    assert any("next switch: h.0.attn.c_q" in line for line in plain(session_of(run), Display()))


def test_a_deleted_run_keeps_its_last_numbers(tmp_path) -> None:
    session = session_of(healthy_run(tmp_path / "run", end=""))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    session.poll()
    assert session.source.gone
    assert session.view.step == 200


def test_another_run_in_the_same_place_starts_afresh(tmp_path) -> None:
    session = session_of(healthy_run(tmp_path / "run"))
    write_run(tmp_path / "run", [record("start", 0, num_iterations=7), train(1, 9.0)])
    session.poll()
    assert session.view.step == 1
    assert session.view.num_iterations == 7


def test_a_writer_whose_clock_is_wrong_is_not_stalled(tmp_path) -> None:
    run = healthy_run(tmp_path / "run", end="", now=False)  # records say 2001, the file was written just now
    assert session_of(run).state.value == "running"
    future = [train(s, when=4e9 + s) for s in range(1, 80)]
    assert session_of(write_run(tmp_path / "future", future)).state.value == "running"


def test_the_left_column_does_not_dim_the_right_one(tmp_path) -> None:
    session = session_of(healthy_run(tmp_path / "run", end=""))
    for line in screen(session, 200, 50, Display()):
        position = line.plain.find("optimal_lowrank")
        if position >= 0:
            assert not line.get_style_at_offset(Console(), position).dim
            break
    else:
        pytest.fail("no switch on the screen")
