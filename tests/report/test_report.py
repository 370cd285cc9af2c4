"""The page: every figure there, its numbers with it, nothing fetched, nothing a log could smuggle in."""

import base64
import csv
import html.parser
import io
import re
import struct
import zlib
from pathlib import Path

import pytest
from run_logs import CONFIG, LAYERS, analysis, healthy_run, record, switch, train, write_run

from svdtrain.report.cli import main
from svdtrain.report.figures import LineFigure, RasterFigure, comparison_figures, run_figures
from svdtrain.report.load import distinct_names, load_run
from svdtrain.report.page import build_page
from svdtrain.report.svg import number, png, ticks

VOID = {"meta", "link"}


class Checker(html.parser.HTMLParser):
    """Collects tags and addresses, and complains of what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.identities: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("href", "src")]
        self.identities += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(set(checker.identities)) == len(checker.identities)
    assert all(address.startswith("data:") for address in checker.addresses)
    assert "script" not in checker.tags
    return checker


def restarted_run(path: Path) -> Path:
    """Two processes; step 3 was done twice; clobbering at 20; a probe; an alert."""
    records = [record("start", 0, total_batch_size=512), *[train(s, 3.0, loss_ema=3.0) for s in range(1, 4)]]
    records += [record("resume", 2, restart=1, total_batch_size=512)]
    for step in range(3, 61):
        if step % 10 == 0:
            numbers = {
                "principal_alignment": 0.2,
                "gradient_lift": 2.0,
                "r": 96.0,
                "mode": float(step > 20),
                "stable_rank": 7.0,
                "singular_0": 10.0,
                "singular_50": 0.1,
            }
            records.append(analysis(step, {layer: numbers for layer in LAYERS}, restart=1))
        if step == 20:
            records.append(switch(20, LAYERS[0]) | {"restart": 1})
        records.append(train(step, 2.0, restart=1, loss_ema=2.0, dt=2.0 if step % 10 == 0 else 1.0))
    records.append(record("eval", 60, restart=1, **{"val/bpb": 1.5}))
    records.append(record("forgetting", 60, restart=1, **{"probe/loss": 2.5, "probe/harm": 0.1, "interference/x": 1.0}))
    records.append(
        record("alert", 60, restart=1, level="CRITICAL", rule="switch_now", message="<script>alert(1)</script>")
    )
    return write_run(path, records)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path) -> None:
    runs = [load_run(healthy_run(tmp_path / "a")), load_run(restarted_run(tmp_path / "b"))]
    page = build_page(runs)
    checker = check_page(page)
    assert checker.tags.count("svg") == checker.tags.count("figure") > 15
    assert checker.tags.count("svg") <= checker.tags.count("title")
    assert page.count('role="img"') == checker.tags.count("svg")
    for text in ("Validation at equal tokens", "Validation at equal time", "Rank r", "Mode of every matrix", "chance"):
        assert text in page
    for text in (
        "Throughput",
        "Forgetting probe: loss on first-seen text",
        "Forgetting probe: what was lost",
        "stable rank",
        "Configuration of a",
        "prefers-color-scheme",
    ):
        assert text in page
    assert "<script>alert" not in page
    assert not re.search(r"\b(nan|inf)\b[ ,\"LMV]", "".join(re.findall(r'd="[^"]*"', page)))


def test_repeated_steps_count_once_and_hours_are_training_hours(tmp_path) -> None:
    run = load_run(restarted_run(tmp_path / "run"))
    loss = next(f for f in comparison_figures([run]) if f.key == "loss_tokens")
    assert isinstance(loss, LineFigure)
    assert list(loss.lines[0].x) == [512 * step for step in range(1, 61)]
    assert list(loss.lines[0].y) == [3.0, 3.0] + [2.0] * 58
    assert run.hours_at([60])[0] * 3600 == pytest.approx(60 + 6)
    assert run.analysis_cost == pytest.approx(6 / 61, rel=0.05)


def test_chance_is_share_over_lift_or_follows_from_the_rank(tmp_path) -> None:
    run = load_run(restarted_run(tmp_path / "run"))
    figure = next(f for f in run_figures(run) if f.key == "principal_alignment")
    assert isinstance(figure, LineFigure)
    share, chance = figure.lines
    assert share.y == [0.2] * 6
    assert chance.y == pytest.approx([0.1] * 6)
    assert figure.events == [20.0]
    assert ("limit", 0.3) in figure.levels
    plain = load_run(healthy_run(tmp_path / "plain"))
    figure = next(f for f in run_figures(plain) if f.key == "principal_alignment")
    assert isinstance(figure, LineFigure)
    assert figure.lines[1].y[0] == pytest.approx(1 - 60 / 128)


def test_every_metric_of_the_log_has_a_figure(tmp_path) -> None:
    keys = {figure.key for figure in run_figures(load_run(restarted_run(tmp_path / "run")))}
    assert {
        "r",
        "mode",
        "principal_alignment",
        "gradient_lift",
        "band_stable_rank",
        "raster_principal_alignment",
        "spectrum",
    } <= keys
    assert not any("singular" in key for key in keys)


def test_the_spectrum_is_drawn_in_logarithms_largest_first(tmp_path) -> None:
    figure = next(f for f in run_figures(load_run(restarted_run(tmp_path / "run"))) if f.key == "spectrum")
    assert isinstance(figure, LineFigure)
    assert [line.name for line in figure.lines] == ["largest", "after 50 % of the directions"]
    assert [line.y[0] for line in figure.lines] == pytest.approx([1.0, -1.0])


def test_embedded_csv_holds_the_numbers(tmp_path) -> None:
    page = build_page([load_run(restarted_run(tmp_path / "run"))])
    found = dict(re.findall(r'download="([^"]+)" href="data:text/csv;base64,([^"]+)"', page))
    rows = list(csv.reader(io.StringIO(base64.b64decode(found["run0-mode.csv"]).decode())))
    assert rows[0] == ["layer", "10", "20", "30", "40", "50", "60"]
    assert rows[1] == [LAYERS[0], "0", "0", "1", "1", "1", "1"]
    lines = list(csv.reader(io.StringIO(base64.b64decode(found["all-bpb_tokens.csv"]).decode())))
    assert lines[1][:3] == ["run", "30720", "1.5"]


def test_command_writes_page_csv_and_png(tmp_path, capsys) -> None:
    run = restarted_run(tmp_path / "run")
    assert main([str(run), str(run), "--csv", str(tmp_path / "csv"), "--png", str(tmp_path / "png")]) == 0
    check_page((run / "report.html").read_text())
    figures = {p.stem for p in (tmp_path / "csv").iterdir()}
    assert figures == {p.stem for p in (tmp_path / "png").iterdir()}
    assert "run (2)" in (run / "report.html").read_text()
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_with_next_to_nothing_still_has_a_page(tmp_path) -> None:
    check_page(build_page([load_run(write_run(tmp_path / "run", [record("start", 0)], config={}))]))
    one = write_run(
        tmp_path / "one", [record("start", 0), train(1, float("nan")), analysis(1, {"a": {"r": float("nan")}})]
    )
    check_page(build_page([load_run(one)]))


def test_differing_settings_are_listed(tmp_path) -> None:
    other = {**CONFIG, "svd": {**CONFIG["svd"], "svd_preset": "conservative"}}
    runs = [
        load_run(write_run(tmp_path / name / "run", [train(1)], config))
        for name, config in (("a", CONFIG), ("b", other))
    ]
    distinct_names(runs)
    page = build_page(runs)
    assert "svd.svd_preset" in page
    assert "svd.svd_interval</td>" not in page


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.013, 0.094, 5) == [0.02, 0.04, 0.06, 0.08]
    assert ticks(5, 5, 4) == [5]
    assert [number(v, [0, 2.5e6, 5e6]) for v in (0, 2.5e6, 5e6)] == ["0", "2.5M", "5M"]
    assert [number(v, [0.1, 0.15]) for v in (0.1, 0.15)] == ["0.10", "0.15"]
    assert [number(v, [0, 0.25]) for v in (0, 0.25)] == ["0.00", "0.25"]


def test_png_is_an_image_of_the_right_pixels() -> None:
    data = png([[(1, 2, 3), (4, 5, 6)], [(7, 8, 9), (10, 11, 12)]])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (2, 2)
    begin = data.index(b"IDAT") + 4
    raw = zlib.decompress(data[begin : begin + struct.unpack(">I", data[begin - 8 : begin - 4])[0]])
    assert raw == b"\0\1\2\3\4\5\6\0\7\10\11\12\13\14"


def test_rasters_keep_layers_in_the_order_of_the_network(tmp_path) -> None:
    figure = next(f for f in run_figures(load_run(healthy_run(tmp_path / "run"))) if isinstance(f, RasterFigure))
    assert figure.layers == list(LAYERS)
