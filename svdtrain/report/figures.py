"""The figures as data: lines or rasters with their names, axes and numbers. Drawing is done elsewhere."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from svdtrain.monitor.plots import short_name
from svdtrain.monitor.series import Series, Snapshot
from svdtrain.monitor.session import R_OVER_G, metric_column
from svdtrain.report.load import RunData


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. `band` holds (low, high) at each x, where the curve stands for many."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float]] = ()
    dashed: bool = False
    rank: float | None = None
    """Position of a layer in the network, 0 to 1; curves with it are coloured by it and left out of the legend."""


@dataclass(frozen=True, kw_only=True)
class LineFigure:
    """Curves over one axis."""

    key: str
    title: str
    caption: str
    x_label: str
    y_label: str
    lines: list[Line]
    levels: list[tuple[str, float]] = field(default_factory=list)
    """Horizontal lines with a name: limits, chance."""
    events: list[float] = field(default_factory=list)
    """x of vertical marks."""
    event_name: str = ""
    from_zero: bool = False
    """Let the y axis begin at 0, where only the proportion matters."""

    def to_csv(self) -> str:
        """line,x,y,low,high"""
        rows = [["line", self.x_label, self.y_label, "low", "high"]]
        for line in self.lines:
            bands = line.band or [("", "")] * len(line.x)
            rows += [
                [line.name, _cell(x), _cell(y), *map(_cell, b)] for x, y, b in zip(line.x, line.y, bands, strict=True)
            ]
        rows += [[f"level: {name}", "", _cell(value), "", ""] for name, value in self.levels]
        rows += [[f"event: {self.event_name}", _cell(x), "", "", ""] for x in self.events]
        return _csv(rows)


@dataclass(frozen=True, kw_only=True)
class RasterFigure:
    """Layers x steps."""

    key: str
    title: str
    caption: str
    layers: list[str]
    steps: list[int]
    values: list[list[float]]
    """values[layer][step]; nan where unknown."""
    low: float
    high: float
    low_name: str = ""
    high_name: str = ""

    def to_csv(self) -> str:
        """layer, then one column a step"""
        rows = [["layer", *map(str, self.steps)]]
        rows += [[layer, *map(_cell, row)] for layer, row in zip(self.layers, self.values, strict=True)]
        return _csv(rows)


Figure = LineFigure | RasterFigure


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _csv(rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


# --- across runs ---


def comparison_figures(runs: list[RunData]) -> list[Figure]:
    """Loss and bits per byte at equal tokens and at equal time, throughput, probes."""

    def of(name: str) -> Callable[[RunData], Series]:
        return lambda run: run.view.series(name)

    bpb, loss, speed = of("val/bpb"), of("train/loss_ema"), of("train/tok_per_sec")
    figures: list[Figure] = [
        _over_tokens("bpb_tokens", "Validation at equal tokens", "val bpb", bpb, runs, "Lower is better."),
        _over_hours("bpb_time", "Validation at equal time", "val bpb", bpb, runs),
        _over_tokens("loss_tokens", "Training loss at equal tokens", "loss, nats", loss, runs, "Exponential mean."),
        replace(
            _over_tokens("throughput", "Throughput", "tokens per second", speed, runs, _cost_text(runs)), from_zero=True
        ),
    ]
    logged = sorted({name for run in runs for name in run.view.scalars})
    figures += [
        _over_tokens(f"probe_{name.replace('/', '_')}", f"Forgetting probe: {title}", name, of(name), runs, text)
        for name in logged
        for title, text in [PROBES.get(name, (name, PROBE_TEXT))]
        if name in PROBES or "retention" in name.lower()
    ]
    return [figure for figure in figures if _has_numbers(figure)]


PROBE_TEXT = "Loss on first-seen text that is not trained on any more; a rise is forgetting."
PROBES = {
    "probe/harm": ("what was lost", "Nats a token that first-seen text has lost since its best; 0: nothing."),
    "probe/loss": ("loss on first-seen text", PROBE_TEXT),
    "probe/minus_control": (
        "first-seen against never-seen text",
        "Loss on first-seen text minus that on text never trained on: below 0 while something of it is remembered.",
    ),
}


def _over_tokens(
    key: str, title: str, label: str, pick: Callable[[RunData], Series], runs: list[RunData], caption: str
) -> LineFigure:
    lines = []
    for run in runs:
        steps, values = pick(run).points()
        if steps:
            lines.append(Line(name=run.name, x=[s * run.tokens_per_step for s in steps], y=values))
    return LineFigure(key=key, title=title, caption=caption, x_label="tokens", y_label=label, lines=lines)


def _over_hours(key: str, title: str, label: str, pick: Callable[[RunData], Series], runs: list[RunData]) -> LineFigure:
    lines = []
    for run in runs:
        steps, values = pick(run).points()
        if steps and run.view.series("train/dt").last == run.view.series("train/dt").last:
            lines.append(Line(name=run.name, x=run.hours_at(steps), y=values))
    caption = "Hours in training steps, analyses included; evaluations and waiting between restarts left out."
    return LineFigure(key=key, title=title, caption=caption, x_label="hours", y_label=label, lines=lines)


def _cost_text(runs: list[RunData]) -> str:
    costs = [f"{run.name} {100 * cost:.1f} %" for run in runs if (cost := run.analysis_cost) is not None]
    return f"Analyses take, of the training time: {', '.join(costs)}." if costs else ""


# --- one run ---


def run_figures(run: RunData) -> list[Figure]:
    """Ranks, shares and lifts with their chance level, mode raster, rasters and bands of every other metric."""
    snapshots = list(run.view.analyses)
    if not snapshots:
        return []
    metrics = run.view.analyses.metric_names()
    figures: list[Figure] = []
    if "r" in metrics:
        figures.append(_rank_lines(run, snapshots))
    if "mode" in metrics:
        figures.append(_mode_raster(run, snapshots))
    shares = [name for name in metrics if name.endswith("_alignment") and not name.startswith("minor")]
    lifts = [name for name in metrics if name.endswith("_lift")]
    figures += [_share_lines(run, snapshots, name, lifts) for name in shares]
    figures += [_lift_lines(run, snapshots, name) for name in lifts]
    judged = [limit.metric for limit in run.view.limits()][:1] or shares[:1]
    figures += [_raster(run, snapshots, name) for name in judged]
    spectrum = [name for name in metrics if name.startswith(SPECTRUM)]
    if spectrum:
        figures.append(_spectrum_lines(snapshots, spectrum))
    rest = [name for name in metrics if name not in {*shares, *lifts, *spectrum, "r", "mode", "r_next"}]
    figures += [_band_figure(run, snapshots, name) for name in rest]
    return [figure for figure in figures if _has_numbers(figure)]


def _has_numbers(figure: Figure) -> bool:
    if isinstance(figure, RasterFigure):
        return any(math.isfinite(value) for row in figure.values for value in row)
    return any(math.isfinite(value) for line in figure.lines for value in line.y)


def clobbering_steps(run: RunData) -> list[float]:
    """Steps at which a matrix went to low-rank training against clobbering."""
    return sorted(
        {
            float(s["step"])
            for s in run.view.switches
            if s.get("change") == "to_lowrank" and s.get("reason") == "gradient_clobbering_risk"
        }
    )


def _band(snapshots: Sequence[Snapshot], metric: str, name: str) -> Line:
    """Median over the layers, with their lowest and highest."""
    x, y, band = [], [], []
    for snapshot in snapshots:
        values = [v for v in snapshot.column(metric).values() if math.isfinite(v)]
        if values:
            x.append(float(snapshot.step))
            y.append(statistics.median(values))
            band.append((min(values), max(values)))
    return Line(name=name, x=x, y=y, band=band)


def _share_lines(run: RunData, snapshots: Sequence[Snapshot], metric: str, lifts: list[str]) -> LineFigure:
    what = metric.removesuffix("_alignment")
    of_what = {"principal": "gradient", "update": "applied update"}.get(what, what)
    lift = next((name for name in lifts if name.startswith({"principal": "gradient"}.get(what, what))), None)
    limits = [("limit", limit.bound) for limit in run.view.limits() if limit.metric == metric]
    return LineFigure(
        key=metric,
        title=f"Principal share of the {of_what}",
        caption="Median over the layers with their range. Chance: the share that a direction-blind matrix would have.",
        x_label="step",
        y_label="share",
        lines=[_band(snapshots, metric, metric), _chance(run, snapshots, metric, lift)],
        levels=limits,
        events=clobbering_steps(run),
        event_name="switch against clobbering",
    )


def _chance(run: RunData, snapshots: Sequence[Snapshot], metric: str, lift: str | None) -> Line:
    """Chance level of a share, median over the layers: share over lift where that is recorded, else k/g."""
    x, y = [], []
    for snapshot in snapshots:
        if lift is not None:
            lifts, shares = snapshot.column(lift), snapshot.column(metric)
            levels = [shares[name] / lifts[name] for name in shares if lifts.get(name, 0.0) > 0]
        else:
            levels = [1 - share for share in metric_column(run.view, snapshot, R_OVER_G).values()]
        levels = [level for level in levels if math.isfinite(level)]
        if levels:
            x.append(float(snapshot.step))
            y.append(max(0.0, statistics.median(levels)))
    return Line(name="chance", x=x, y=y, dashed=True)


def _lift_lines(run: RunData, snapshots: Sequence[Snapshot], metric: str) -> LineFigure:
    limits = [("limit", limit.bound) for limit in run.view.limits() if limit.metric == metric]
    return LineFigure(
        key=metric,
        title=f"Lift over chance: {metric.removesuffix('_lift')}",
        caption="Share divided by its chance level; median over the layers with their range.",
        x_label="step",
        y_label="times chance",
        lines=[_band(snapshots, metric, metric)],
        levels=[("chance", 1.0), *limits],
        events=clobbering_steps(run),
        event_name="switch against clobbering",
    )


def _rank_lines(run: RunData, snapshots: Sequence[Snapshot]) -> LineFigure:
    layers = run.view.analyses.layers()
    lines = []
    for index, layer in enumerate(layers):
        points = [(float(s.step), v) for s in snapshots if math.isfinite(v := s.get("r", layer))]
        rank = index / max(1, len(layers) - 1)
        lines.append(Line(name=short_name(layer), x=[p[0] for p in points], y=[p[1] for p in points], rank=rank))
    return LineFigure(
        key="r",
        title="Rank r of the trained part",
        caption="One line a matrix, first block dark, last block bright.",
        x_label="step",
        y_label="r",
        lines=lines,
    )


def _mode_raster(run: RunData, snapshots: Sequence[Snapshot]) -> RasterFigure:
    figure = _raster(run, snapshots, "mode")
    return replace(
        figure,
        key="mode",
        title="Mode of every matrix",
        caption="Bright: low-rank training; dark: full training.",
        low=0.0,
        high=1.0,
        low_name="full",
        high_name="low-rank",
    )


def _raster(run: RunData, snapshots: Sequence[Snapshot], metric: str) -> RasterFigure:
    layers = run.view.analyses.layers()
    columns = [snapshot.column(metric) for snapshot in snapshots]
    values = [[column.get(layer, math.nan) for column in columns] for layer in layers]
    finite = sorted(v for row in values for v in row if math.isfinite(v)) or [0.0]
    return RasterFigure(
        key=f"raster_{metric}",
        title=f"{metric}, layer by layer",
        caption="Colours run from the 2nd to the 98th percentile.",
        layers=[short_name(layer) for layer in layers],
        steps=[snapshot.step for snapshot in snapshots],
        values=values,
        low=finite[int(0.02 * (len(finite) - 1))],
        high=finite[math.ceil(0.98 * (len(finite) - 1))],
    )


SPECTRUM = "singular_"  # and the per cent of the directions before it


def _spectrum_lines(snapshots: Sequence[Snapshot], names: list[str]) -> LineFigure:
    """Some singular values over training, the largest first."""
    places = sorted(int(name.removeprefix(SPECTRUM)) for name in names)
    lines = []
    for i, at in enumerate(places):
        band = _band(snapshots, f"{SPECTRUM}{at}", "largest" if at == 0 else f"after {at} % of the directions")
        logs = [math.log10(max(value, 1e-12)) for value in band.y]
        spread = [(math.log10(max(low, 1e-12)), math.log10(max(high, 1e-12))) for low, high in band.band]
        lines.append(replace(band, y=logs, band=spread if i == 0 else ()))
    return LineFigure(
        key="spectrum",
        title="Spectra over training",
        caption="Singular values, logarithms to base 10; median over the layers, for the largest with their range.",
        x_label="step",
        y_label="log10 of the singular value",
        lines=lines,
    )


def _band_figure(run: RunData, snapshots: Sequence[Snapshot], metric: str) -> LineFigure:
    limits = [("limit", limit.bound) for limit in run.view.limits() if limit.metric == metric]
    return LineFigure(
        key=f"band_{metric}",
        title=metric.replace("_", " "),
        caption="Median over the layers with their range.",
        x_label="step",
        y_label=metric,
        lines=[_band(snapshots, metric, metric)],
        levels=limits,
    )
