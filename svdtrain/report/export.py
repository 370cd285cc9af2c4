"""Figures as files: CSV, and PNG for papers and slides (drawn by matplotlib from the same numbers)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from svdtrain.report.figures import Figure, LineFigure, RasterFigure
from svdtrain.report.svg import colour_at


def write_csv(parts: Sequence[tuple[str, str, Sequence[Figure]]], directory: Path) -> int:
    """One file a figure; returns their number."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [(f"{prefix}-{figure.key}.csv", figure) for prefix, _, figures in parts for figure in figures]
    for name, figure in files:
        (directory / name).write_text(figure.to_csv())
    return len(files)


def write_png(parts: Sequence[tuple[str, str, Sequence[Figure]]], directory: Path) -> int:
    """One file a figure, 200 dots an inch; returns their number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    count = 0
    for prefix, heading, figures in parts:
        for figure in figures:
            height = 3.4 if isinstance(figure, LineFigure) else min(9.0, max(2.6, 0.11 * len(figure.layers)))
            canvas, axes = pyplot.subplots(figsize=(6, height), layout="constrained")
            if isinstance(figure, LineFigure):
                _draw_lines(axes, figure)
            else:
                _draw_raster(canvas, axes, figure)
            axes.set_title(f"{figure.title} ({heading})", fontsize=10)
            canvas.savefig(directory / f"{prefix}-{figure.key}.png", dpi=200)
            pyplot.close(canvas)
            count += 1
    return count


def _draw_lines(axes, figure: LineFigure) -> None:
    for line in figure.lines:
        if line.rank is not None:
            colour = tuple(value / 255 for value in colour_at(0.28 + 0.54 * line.rank))
            axes.plot(line.x, line.y, color=colour, linewidth=0.8)
            continue
        (drawn,) = axes.plot(line.x, line.y, label=line.name, linestyle="--" if line.dashed else "-")
        if line.band:
            low, high = zip(*line.band, strict=True)
            axes.fill_between(line.x, low, high, alpha=0.2, color=drawn.get_color(), linewidth=0)
    for name, value in figure.levels:
        axes.axhline(value, linestyle=":", color="gray", label=f"{name} {value:.3g}")
    for x in figure.events:
        axes.axvline(x, color="crimson", alpha=0.25, linewidth=0.8)
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _draw_raster(canvas, axes, figure: RasterFigure) -> None:
    edges = [*figure.steps, figure.steps[-1] + (figure.steps[-1] - figure.steps[-2] if len(figure.steps) > 1 else 1)]
    image = axes.pcolormesh(
        edges, range(len(figure.layers) + 1), figure.values, vmin=figure.low, vmax=figure.high, cmap="viridis"
    )
    axes.invert_yaxis()
    every = max(1, len(figure.layers) // 24)
    axes.set_yticks([i + 0.5 for i in range(0, len(figure.layers), every)], figure.layers[::every], fontsize=6)
    axes.set_xlabel("step")
    canvas.colorbar(image, ax=axes)
