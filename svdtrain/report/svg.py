"""Figures as inline SVG that follows the page's colours, with an accessible name and description."""

from __future__ import annotations

import base64
import itertools
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

from svdtrain.report.figures import Figure, Line, LineFigure, RasterFigure

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 40
NUM_SERIES_COLOURS = 8
MAX_DRAWN_POINTS = 600
MAX_LABELLED_ROWS = 24
ROW_HEIGHT, MIN_RASTER_HEIGHT, MAX_RASTER_HEIGHT = 14, 120, 420
# viridis, sampled
COLOURS = (
    (68, 1, 84), (70, 50, 126), (54, 92, 141), (39, 127, 142), (31, 161, 135), (74, 193, 109), (160, 218, 57),
    (253, 231, 37),
)  # fmt: skip


def draw(figure: Figure, identity: str) -> str:
    """The figure as an <svg> element; `identity` is unique in the page."""
    body, height = (_lines(figure), HEIGHT) if isinstance(figure, LineFigure) else _raster(figure)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{identity}-t {identity}-d">'
        f'<title id="{identity}-t">{escape(figure.title)}</title>'
        f'<desc id="{identity}-d">{escape(describe(figure))}</desc>{body}</svg>'
    )


def describe(figure: Figure) -> str:
    """The figure in words, for those who do not see it."""
    if isinstance(figure, RasterFigure):
        span = f"steps {figure.steps[0]} to {figure.steps[-1]}"
        values = f"values from {figure.low:.4g} to {figure.high:.4g}"
        return f"{len(figure.layers)} layers over {span}, {values}. {figure.caption}"
    parts = [
        f"{line.name} from {line.y[0]:.4g} to {line.y[-1]:.4g}"
        for line in figure.lines[:6]
        if len(line.y) and line.rank is None
    ]
    ranked = [line for line in figure.lines if line.rank is not None]
    if ranked:
        parts.append(f"{len(ranked)} layers")
    return f"{figure.y_label} over {figure.x_label}: {'; '.join(parts)}. {figure.caption}"


# --- lines ---


def _lines(figure: LineFigure) -> str:
    xs = [x for line in figure.lines for x in line.x]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = _y_range(figure)
    x_ticks, y_ticks = ticks(x_low, x_high, 5), ticks(y_low, y_high, 5)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def px(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        share = (min(max(y, y_low), y_high) - y_low) / ((y_high - y_low) or 1)
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(x_ticks, y_ticks, px, py), _axis_names(figure.x_label, figure.y_label)]
    bottom = HEIGHT - BOTTOM
    parts += [f'<path class="event" d="M{px(x):.1f} {TOP}V{bottom}"/>' for x in figure.events if x_low <= x <= x_high]
    colour = 0
    for line in figure.lines:
        parts.append(_line(line, colour % NUM_SERIES_COLOURS, px, py))
        colour += line.rank is None
    for name, value in figure.levels:
        if y_low <= value <= y_high:
            y = py(value)
            parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(
                f'<text class="level-name" x="{WIDTH - RIGHT - 3}" y="{y - 4:.1f}">{escape(name)} {value:.4g}</text>'
            )
    return "".join(parts)


def _y_range(figure: LineFigure) -> tuple[float, float]:
    """All of the data; the highest 1 % only where they do not dwarf the rest. Near limits are kept in sight."""
    ys = sorted(v for line in figure.lines for pair in _extremes(line) for v in pair if math.isfinite(v)) or [0.0, 1.0]
    low, high = min(ys[0], 0.0) if figure.from_zero else ys[0], ys[-1]
    robust = ys[math.ceil(0.99 * (len(ys) - 1))]
    if high - low > 4 * (robust - low) > 0:
        high = robust
    span = (high - low) or abs(high) or 1.0
    for _, value in figure.levels:
        if low - span < value < high + span:
            low, high = min(low, value), max(high, value)
    return (low, high) if high > low else (low - span / 20, high + span / 20)


def _extremes(line: Line) -> Sequence[tuple[float, float]]:
    return line.band or [(y, y) for y in line.y]


def _line(line: Line, colour: int, px, py) -> str:
    keep = _thin(len(line.x))
    points = [(px(line.x[i]), py(line.y[i])) for i in keep if math.isfinite(line.y[i])]
    if not points:
        return ""
    title = f"<title>{escape(line.name)}</title>"
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    if line.rank is not None:
        red, green, blue = colour_at(0.28 + 0.54 * line.rank)
        return f'<path class="layer" style="stroke:rgb({red},{green},{blue})" d="{path}">{title}</path>'
    band = ""
    if line.band:
        upper = [f"{px(line.x[i]):.1f} {py(line.band[i][1]):.1f}" for i in keep]
        lower = [f"{px(line.x[i]):.1f} {py(line.band[i][0]):.1f}" for i in reversed(keep)]
        band = f'<path class="band s{colour}" d="M{"L".join([*upper, *lower])}Z"/>'
    dash = " dashed" if line.dashed else ""
    dot = (
        f'<circle class="dot s{colour}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>'
        if len(points) == 1
        else ""
    )
    return f'{band}<path class="line s{colour}{dash}" d="{path}">{title}</path>{dot}'


def _thin(n: int) -> list[int]:
    stride = max(1, math.ceil(n / MAX_DRAWN_POINTS))
    keep = list(range(0, n, stride))
    return keep if not n or keep[-1] == n - 1 else [*keep, n - 1]


def legend(figure: Figure) -> str:
    """Names beside the colours, as HTML: it wraps on a phone."""
    if not isinstance(figure, LineFigure):
        return _raster_legend(figure)
    named = [line for line in figure.lines if line.rank is None]
    classes = [f"key s{i % NUM_SERIES_COLOURS}{' dashed' * line.dashed}" for i, line in enumerate(named)]
    items = [
        f'<li><span class="{style}"></span>{escape(line.name)}</li>' for style, line in zip(classes, named, strict=True)
    ]
    if figure.events:
        items.append(f'<li><span class="key event-key"></span>{escape(figure.event_name)} ({len(figure.events)})</li>')
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def _raster_legend(figure: RasterFigure) -> str:
    low, high = figure.low_name or f"{figure.low:.3g}", figure.high_name or f"{figure.high:.3g}"
    return f'<p class="scale"><span>{escape(low)}</span><span class="ramp"></span><span>{escape(high)}</span></p>'


def _grid(x_ticks: list[float], y_ticks: list[float], px, py) -> str:
    parts = []
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y-tick" x="{LEFT - 6}" y="{py(y) + 4:.1f}">{number(y, y_ticks)}</text>')
    for x in x_ticks:
        parts.append(f'<text class="x-tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 15}">{number(x, x_ticks)}</text>')
    return "".join(parts) + f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'


def _axis_names(x_label: str, y_label: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<text class="x-name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x_label)}</text>'
        f'<text class="y-name" transform="translate(13 {middle}) rotate(-90)">{escape(y_label)}</text>'
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers inside [low, high], about so many."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.99)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)] or [low]


def number(value: float, among: Sequence[float]) -> str:
    """12k, 3.4M, .05: short, and all ticks of an axis to the same precision."""
    top = max(abs(v) for v in among)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if top >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}" if value else "0"
    gap = min((abs(b - a) for a, b in itertools.pairwise(among)), default=top or 1)
    digits = max(0, min(8, -math.floor(math.log10(gap) + 1e-9) + (1 if f"{gap:e}".startswith("2.5") else 0)))
    return f"{value:.{digits}f}"


# --- rasters ---


def _raster(figure: RasterFigure) -> tuple[str, int]:
    plot_height = min(MAX_RASTER_HEIGHT, max(MIN_RASTER_HEIGHT, ROW_HEIGHT * len(figure.layers)))
    left, width = 92, WIDTH - 92 - RIGHT
    image = base64.b64encode(png(_pixels(figure))).decode()
    row = plot_height / len(figure.layers)
    parts = [
        f'<image x="{left}" y="{TOP}" width="{width}" height="{plot_height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{image}"/>'
    ]
    every = max(1, math.ceil(len(figure.layers) / MAX_LABELLED_ROWS))
    for index in range(0, len(figure.layers), every):
        y = TOP + (index + 0.5) * row + 3
        parts.append(f'<text class="row-name" x="{left - 5}" y="{y:.1f}">{escape(figure.layers[index])}</text>')
    for share in (0.0, 0.5, 1.0):
        step = round(figure.steps[0] + share * (figure.steps[-1] - figure.steps[0]))
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        parts.append(
            f'<text class="x-tick" style="text-anchor:{anchor}" x="{left + share * width}" '
            f'y="{TOP + plot_height + 15}">{"step " if share == 0.5 else ""}{step:,}</text>'
        )
    return "".join(parts), TOP + plot_height + 24


def _pixels(figure: RasterFigure) -> list[list[tuple[int, int, int]]]:
    """Columns at equal distances in steps, each the newest analysis of its stretch."""
    first, last = figure.steps[0], figure.steps[-1]
    num = min(400, max(1, len(figure.steps)))
    nearest, at = [], 0
    for column in range(num):
        until = first + (last - first) * (column + 1) / num
        while at + 1 < len(figure.steps) and figure.steps[at + 1] <= until:
            at += 1
        nearest.append(at)
    span = (figure.high - figure.low) or 1.0
    return [
        [colour_at((row[i] - figure.low) / span) if math.isfinite(row[i]) else (128, 128, 128) for i in nearest]
        for row in figure.values
    ]


def colour_at(share: float) -> tuple[int, int, int]:
    """viridis at [0, 1]."""
    position = min(1.0, max(0.0, share)) * (len(COLOURS) - 1)
    index = min(len(COLOURS) - 2, int(position))
    weight = position - index
    return tuple(round(a + weight * (b - a)) for a, b in zip(COLOURS[index], COLOURS[index + 1], strict=True))  # type: ignore[return-value]


def png(rows: list[list[tuple[int, int, int]]]) -> bytes:
    """An RGB image as a PNG file (ISO/IEC 15948), one pixel a cell."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
