"""Plots made of characters: braille curves, sparklines, a heatmap. Pure functions; ASCII where asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Dots of a braille cell by [row][column]; a cell is 2 wide and 4 high.
BRAILLE_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
SPARKS = "▁▂▃▄▅▆▇█"
ASCII_SPARKS = "_.-=+*#%"
SHADES = " ·░▒▓█"
ASCII_SHADES = " .:-=+*#%@"

# Eight steps from dark to bright that also read in order without colour vision (perceptually even, blue to yellow).
HEAT_COLOURS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A drawn curve: rows of equal width, and what its axes say."""

    rows: list[str]
    low: float
    high: float
    first_step: int
    last_step: int


def curve(steps: Sequence[int], values: Sequence[float], *, width: int, height: int, ascii_only: bool) -> Curve | None:
    """Draw values over steps in `width` x `height` characters; None with nothing finite to draw.

    The vertical range leaves out the highest 2 % of the values, so that the start of training does not flatten the
    rest; they are drawn at the upper edge.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if not points or width < 1 or height < 1:
        return None
    low, high = _range([v for _, v in points])
    across, down = (1, 1) if ascii_only else (2, 4)
    levels = _levels(points, num=width * across)
    cells = [[0] * width for _ in range(height)]
    previous = None
    for x, value in enumerate(levels):
        if value is None:
            continue
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        y = round((1 - share) * (height * down - 1))
        for dot in _between(previous, y):
            cells[dot // down][x // across] |= BRAILLE_DOTS[dot % down][x % across] if not ascii_only else 1
        previous = y
    draw = (lambda cell: "*" if cell else " ") if ascii_only else (lambda cell: chr(0x2800 + cell) if cell else " ")
    rows = ["".join(draw(cell) for cell in row) for row in cells]
    return Curve(rows=rows, low=low, high=high, first_step=points[0][0], last_step=points[-1][0])


def _range(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    low, high = ordered[0], ordered[max(0, math.ceil(0.98 * len(ordered)) - 1)]
    if high <= low:
        pad = abs(low) * 0.01 or 1.0
        return low - pad, high + pad
    return low, high


def _levels(points: Sequence[tuple[int, float]], *, num: int) -> list[float | None]:
    """Mean of the values in each of `num` equal stretches of steps; a straight line across stretches without one."""
    first, last = points[0][0], points[-1][0]
    span = max(1, last - first)
    sums, counts = [0.0] * num, [0] * num
    for step, value in points:
        column = min(num - 1, (step - first) * num // span)
        sums[column] += value
        counts[column] += 1
    levels: list[float | None] = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    known = [index for index, count in enumerate(counts) if count]
    for left, right in itertools.pairwise(known):
        for column in range(left + 1, right):
            share = (column - left) / (right - left)
            levels[column] = sums[left] / counts[left] * (1 - share) + sums[right] / counts[right] * share
    return levels


def _between(previous: int | None, y: int) -> range:
    """Rows to fill so that the curve is connected."""
    if previous is None or previous == y:
        return range(y, y + 1)
    return range(previous + 1, y + 1) if y > previous else range(y, previous)


def sparkline(values: Sequence[float], *, width: int, ascii_only: bool) -> str:
    """The values as one row, from zero to their maximum."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite or width < 1:
        return ""
    levels = [v for v in _levels(list(enumerate(finite)), num=min(width, len(finite))) if v is not None]
    marks = ASCII_SPARKS if ascii_only else SPARKS
    top = max(levels)
    if top <= 0:
        return marks[0] * len(levels)
    return "".join(marks[min(len(marks) - 1, int(max(0.0, v) / top * (len(marks) - 1) + 0.5))] for v in levels)


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """Rows of cells in [0, 1], nan where nothing is known; equal numbers of cells."""

    labels: list[str]
    cells: list[list[float]]
    low: float
    high: float


def heatmap(
    steps: Sequence[int], columns: Sequence[Mapping[str, float]], rows: Mapping[str, Sequence[str]], *, width: int
) -> Heatmap | None:
    """Layers x time. `columns[i]` holds layer -> value at `steps[i]`; `rows` maps a label to the layers it stands for.

    A cell shows the largest value among the row's layers at the newest analysis of its stretch of steps. The range
    runs from the 2nd to the 98th percentile of what is shown.
    """
    if not steps or width < 1:
        return None
    width = min(width, len(steps))
    chosen = _columns_of(steps, width)
    cells = [
        [max((v for name in layers if _finite(v := columns[i].get(name, math.nan))), default=math.nan) for i in chosen]
        for layers in rows.values()
    ]
    values = sorted(v for row in cells for v in row if _finite(v))
    if not values:
        return None
    low, high = values[int(0.02 * (len(values) - 1))], values[math.ceil(0.98 * (len(values) - 1))]
    span = high - low
    scaled = [
        [min(1.0, max(0.0, (v - low) / span if span > 0 else 0.5)) if _finite(v) else v for v in row] for row in cells
    ]
    return Heatmap(labels=list(rows), cells=scaled, low=low, high=high)


def _finite(value: float) -> bool:
    return value - value == 0


def _columns_of(steps: Sequence[int], width: int) -> list[int]:
    """Index of the newest analysis in each of `width` equal stretches of steps; a stretch without one repeats."""
    first, span = steps[0], max(1, steps[-1] - steps[0])
    newest: list[int | None] = [None] * width
    for index, step in enumerate(steps):
        newest[min(width - 1, (step - first) * width // span)] = index
    chosen, last = [], 0
    for index in newest:
        last = last if index is None else index
        chosen.append(last)
    return chosen


def group_layers(layers: Sequence[str], max_rows: int) -> dict[str, list[str]]:
    """Row label -> layers: one each if they fit, else one a block (h.0, h.1 ...), else neighbouring blocks together."""
    if len(layers) <= max_rows:
        return {short_name(name): [name] for name in layers}
    blocks: dict[str, list[str]] = {}
    for name in layers:
        blocks.setdefault(block_of(name), []).append(name)
    if len(blocks) <= max_rows:
        return blocks
    names = list(blocks)
    per_row = math.ceil(len(names) / max(1, max_rows))
    grouped = {}
    for begin in range(0, len(names), per_row):
        part = names[begin : begin + per_row]
        label = part[0] if len(part) == 1 else f"{part[0]}-{part[-1].rpartition('.')[2]}"
        grouped[label] = [layer for block in part for layer in blocks[block]]
    return grouped


def block_of(layer: str) -> str:
    """`transformer.h.3.attn.c_q` -> `h.3`; the whole name where there is no number in it."""
    parts = layer.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return layer if index is None else ".".join(parts[max(0, index - 1) : index + 1])


def short_name(layer: str) -> str:
    """Without a leading `transformer.` or `model.`."""
    for prefix in ("transformer.", "model."):
        layer = layer.removeprefix(prefix)
    return layer
