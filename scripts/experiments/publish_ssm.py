"""Turn the rows of the state-space experiments into docs/RESULTS_SSM.md and its figures. No number is written by hand.

python scripts/experiments/publish_ssm.py        from docs/results/ssm/NAME.jsonl, as `ssm_blocks.experiments` makes it
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ssm_blocks.experiments import catalogue
from ssm_blocks.experiments.experiment import Column, Criterion, Experiment, Row, settings_hash, spread
from ssm_blocks.experiments.store import Store

ENOUGH_RUNS = 3
PANELS_IN_A_ROW = 2

INTRODUCTION = """# Results of the state-space experiments

Made by `python scripts/experiments/publish_ssm.py` from the rows in docs/results/ssm; the commands that made the rows
stand under each experiment (scifar takes `--data DIR` besides; `--out docs/results/ssm` keeps the rows there). Numbers
are the median over seeds, in brackets the smallest and the largest. Sequences are made while training; a hash splits
them into halves, and accuracy is that on the half that training never draws. *final* is the accuracy of the last
answer, *token* that of all, *sequence* the share of sequences without a mistake. *chance* is the best guess that does
not look at the sequence. A criterion that was not met stays, with the reason where it was found.
"""


def main(argv: list[str] | None = None) -> int:
    """Write the page; exit code 1 if there are no rows at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="directory with results/ssm (docs)")
    docs = parser.parse_args(argv).docs
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    sections, judged = [], {}
    for name in sorted(catalogue.NAMES, key=lambda name: catalogue.experiment(name).proposal):
        rows = current(catalogue.experiment(name), Store(docs / "results" / "ssm" / f"{name}.jsonl").rows())
        if rows:
            sections.append(section(catalogue.experiment(name), rows, docs / "figures"))
            judged[name] = catalogue.experiment(name).judged(rows)
    timed = docs / "results" / "monarch.json"
    if timed.exists():
        sections.append(kernel(json.loads(timed.read_text())))
    if not sections:
        print(f"error: no rows in {docs / 'results' / 'ssm'}", file=sys.stderr)
        return 1
    page = docs / "RESULTS_SSM.md"
    page.write_text("\n".join([INTRODUCTION, overview(judged), *sections]))
    print(f"wrote {page.name}: {len(judged)} experiments")
    return 0


def overview(judged: dict[str, list[Criterion]]) -> str:
    """How many criteria of each experiment are met, and which are not."""
    lines = ["| experiment | question | criteria met | not met |", "|---|---|---|---|"]
    for name, found in judged.items():
        experiment = catalogue.experiment(name)
        link = f"[{experiment.proposal}: {name}](#{experiment.proposal}-{name})"
        missed = "; ".join(c.name for c in found if not c.passed)
        lines.append(f"| {link} | {experiment.question} | {sum(c.passed for c in found)} of {len(found)} | {missed} |")
    return "\n".join(lines) + "\n"


def kernel(content: dict[str, Any]) -> str:
    """The Monarch recurrence in Triton against the scans in torch."""
    worst = max(max(check["ratios"]["triton"].values()) for check in content["checks"])
    arguments = content["arguments"]
    lines = [
        "## The Monarch kernel",
        "",
        f"One walk through time in Triton against the scans in torch, {arguments['dtype']}, milliseconds (median).",
        f"States and gradients of {len(content['checks'])} cases differ from float64 by {worst:.1e} at most (RMS).",
        "",
        "| batch x tokens x width | heads | form | layer, forward | layer, both ways | recurrence, forward "
        "| recurrence, both ways | GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        times = (
            [f"{ms:.2f}" for ms in (*row["layer"], *row["recurrence"])] if row["layer"] else [row["error"], "", "", ""]
        )
        memory = f"{row['memory_gb']:.2f}" if row["layer"] else ""
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"| {shape} | {row['heads']} | {row['form']} | {' | '.join(times)} | {memory} |")
    lines += ["", f"`python scripts/bench_monarch.py`, on {content['device']}, torch {content['torch']}.", ""]
    return "\n".join(lines)


def current(experiment: Experiment, rows: list[Row]) -> list[Row]:
    """The rows of full runs with today's settings; others would mix two experiments in one number."""
    settings = experiment.complete_settings(quick=False)
    hashes = {arm.name: settings_hash(arm, settings) for arm in experiment.arms()}
    kept = [row for row in rows if hashes.get(row["arm"]) == row["settings_hash"]]
    if len(kept) < len(rows):
        print(f"{experiment.name}: {len(rows) - len(kept)} rows of other settings (or quick ones) left out")
    return kept


def section(experiment: Experiment, rows: list[Row], figures: Path) -> str:
    """Criteria, tables, the command, and the figure of one experiment."""
    lines = [f"## {experiment.proposal}: {experiment.name}", "", experiment.question, "", *criteria(experiment, rows)]
    order = {arm.name: arm.group for arm in experiment.arms()}
    for group in dict.fromkeys(order.values()):
        arms = [name for name in order if order[name] == group and any(row["arm"] == name for row in rows)]
        if arms:
            lines += ["", *table(experiment, group, arms, rows)]
    if experiment.notes:
        lines += ["", *(f"* {note}" for note in experiment.notes)]
    lines += ["", "Made by", "", *commands(rows)]
    if any(_curve(experiment, row) for row in rows):
        lines += ["", *[draw(experiment, rows, order, figures)]]
    return "\n".join(lines) + "\n"


def criteria(experiment: Experiment, rows: list[Row]) -> list[str]:
    """What was asked, what came out."""
    lines = ["| criterion | target | measured | runs | |", "|---|---|---|---|---|"]
    judged = experiment.judged(rows)
    lines += [f"| {c.name} | {c.target} | {c.measured} | {c.runs} | {verdict(c)} |" for c in judged]
    missed: dict[str, list[str]] = {}
    for c in judged:
        if c.runs and not c.passed and c.reason:
            missed.setdefault(c.reason, []).append(c.name)
    reasons = [f"* Not met, {'; '.join(names)}: {reason}" for reason, names in missed.items()]
    return lines + (["", *reasons] if reasons else [])


def verdict(judged: Criterion) -> str:
    """In words; a criterion needs three runs to be met or missed for good."""
    if not judged.runs:
        return "not run yet"
    so_far = "" if judged.runs >= ENOUGH_RUNS else " so far"
    return f"met{so_far}" if judged.passed else f"**not met**{so_far}"


def table(experiment: Experiment, group: str, arms: list[str], rows: list[Row]) -> list[str]:
    """One line per arm; columns that no arm of the group fills are left out."""
    members = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    columns = [c for c in experiment.columns if any(c.value(row) is not None for m in members.values() for row in m)]
    lines = [f"### {group}", ""] if group else []
    lines += [f"| arm | seeds | {' | '.join(c.title for c in columns)} |", "|---" * (len(columns) + 2) + "|"]
    for arm, found in members.items():
        lines.append(f"| {arm} | {len(found)} | {' | '.join(cell(column, found) for column in columns)} |")
    chance = _chance(columns, [row for found in members.values() for row in found])
    return lines + ([chance] if chance else [])


def cell(column: Column, rows: list[Row]) -> str:
    """Median and spread; one number where all seeds agree. Words as they are."""
    values = [value for row in rows if (value := column.value(row)) is not None]
    if any(isinstance(value, str) for value in values):
        return "; ".join(dict.fromkeys(map(str, values)))
    numbers = [float(value) for value in values]
    if numbers and min(numbers) == max(numbers):
        numbers = numbers[:1]
    return spread(numbers, column.format)


def _chance(columns: list[Column], rows: list[Row]) -> str:
    """The line of chance levels, from what the rows recorded."""
    cells = []
    for column in columns:
        known = next((chance for row in rows if (chance := column.chance(row)) is not None), None)
        cells.append("" if known is None else f"{known:.3f}")
    return f"| *chance* | | {' | '.join(cells)} |" if any(cells) else ""


def commands(rows: list[Row]) -> list[str]:
    """Every command that made rows, with what it ran on."""
    found = {}
    for row in rows:
        where = f"{row['hardware']}, torch {row['torch']}"
        key = (row["command"], where)
        runs, seconds, processes = found.get(key, (0, 0.0, 1))
        found[key] = runs + 1, seconds + row["seconds"], max(processes, row["processes"])
    return [
        f"* `{command}`: {runs} {'run' if runs == 1 else 'runs'}, {duration(seconds)} of processes, "
        f"{processes} at a time, on {where}."
        for (command, where), (runs, seconds, processes) in found.items()
    ]


def duration(seconds: float) -> str:
    """In the unit that has digits before the point."""
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"


def draw(experiment: Experiment, rows: list[Row], order: dict[str, str], figures: Path) -> str:
    """Curves by length, one panel per group; the shade reaches from the worst to the best seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {row["arm"] for row in rows if _curve(experiment, row)}
    groups = list(dict.fromkeys(group for arm, group in order.items() if arm in drawn))
    wide = min(PANELS_IN_A_ROW, len(groups))
    high = -(-len(groups) // wide)
    figure, panels = plt.subplots(high, wide, figsize=(7 * wide, 3.6 * high), layout="constrained", squeeze=False)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    for group, axes in zip(groups, panels.flat, strict=False):
        axes.set_prop_cycle(color=[plt.get_cmap("tab20")(i) for i in (*range(0, 20, 2), *range(1, 20, 2))])
        for arm in (name for name in order if order[name] == group and name in drawn):
            _draw_arm(axes, arm, [_curve(experiment, row) for row in rows if row["arm"] == arm])
        _finish_panel(axes, experiment, group, [row for row in rows if order.get(row["arm"]) == group])
    name = f"ssm_{experiment.name}.png"
    figure.savefig(figures / name, dpi=110)
    plt.close(figure)
    return f"![{experiment.name}: {experiment.curve_label} by length](figures/{name})"


def _curve(experiment: Experiment, row: Row) -> dict[int, float]:
    """Length to value; empty where there is but one point, which is no curve."""
    by_length = row.get("by_length", {})
    points = {int(length): at[experiment.curve] for length, at in by_length.items() if experiment.curve in at}
    return points if len(points) > 1 else {}


def _draw_arm(axes: Any, arm: str, curves: list[dict[int, float]]) -> None:
    lengths = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[length] for curve in curves] for length in lengths]
    (line,) = axes.plot(lengths, [statistics.median(c) for c in columns], marker=".", linewidth=1, label=arm)
    axes.fill_between(lengths, [min(c) for c in columns], [max(c) for c in columns], alpha=0.12, color=line.get_color())


def _finish_panel(axes: Any, experiment: Experiment, group: str, rows: list[Row]) -> None:
    chances = {int(n): at["chance"] for row in rows for n, at in row.get("by_length", {}).items() if "chance" in at}
    if chances:
        axes.plot(*zip(*sorted(chances.items()), strict=True), color="grey", linestyle=":", label="chance")
    for trained in sorted({length for row in rows if _curve(experiment, row) and (length := trained_length(row))}):
        axes.axvline(trained, color="grey", linewidth=0.8, linestyle="--", label=f"trained up to {trained}")
    lengths = sorted({length for row in rows for length in _curve(experiment, row)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    if experiment.curve_is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("length")
    axes.set_ylabel(experiment.curve_label)
    axes.set_title(group or experiment.name, fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def trained_length(row: Row) -> int | None:
    """The last length of the curriculum."""
    training = {**row.get("settings", {}).get("training", {}), **row.get("config", {}).get("training", {})}
    return max(training.get("lengths", []), default=None)


if __name__ == "__main__":
    sys.exit(main())
