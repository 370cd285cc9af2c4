"""Turn the rows of the experiments into docs/RESULTS.md and its figures. No number on that page is written by hand.

python scripts/experiments/publish.py
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cost_tables
import shift_page
from runs import by_arm

ROOT = Path(__file__).resolve().parents[2]
RESULTS, FIGURES, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "figures", ROOT / "docs" / "RESULTS.md"

Row = dict[str, Any]
NUM_MATRICES = 16  # attention matrices at depth 4

INTRODUCTION = """# Results

Made by `python scripts/experiments/publish.py` from the rows in docs/results; the command that made the rows stands
under each table (the benchmarks' rows are kept with `--out` or `--json docs/results/NAME.json` behind it). bpb:
validation bits per byte. A spread is the standard deviation over seeds. All arms of a seed start from the same weights
and see the same batches. Text: technical English documents (parquet shards), the last shard is validation.
"""


def main() -> int:
    FIGURES.mkdir(parents=True, exist_ok=True)
    sections = [INTRODUCTION]
    for name, write in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            sections.append(write(content["rows"], content.get("command", "")))
            if "note" in content:  # what the rows themselves cannot say
                sections.append(content["note"] + "\n")
    for name, describe in COSTS.items():
        if (RESULTS / f"{name}.json").exists():
            sections.append(describe(json.loads((RESULTS / f"{name}.json").read_text())))
    PAGE.write_text("\n".join(sections))
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def phase1(rows: list[Row], command: str) -> str:
    """One matrix, 2,000 steps: when it switches, what it sees afterwards."""
    lines = [
        "## Phase 1: one matrix",
        "",
        "Depth 4, the first layer's c_q alone, 2,000 steps of 512 tokens, analysed every 20 steps. The first line is",
        "the first implementation of this method, as it was reported; its text was another one, so its bpb is no",
        "comparison.",
        "",
        "| run | first switch | r then | analyses after it | bpb | training minutes |",
        "|---|---|---|---|---|---|",
        "| first implementation | 280 | 196 of 256 | 15 of 100 in all | 3.43 -> 1.93 | 82 |",
    ]
    for row in rows:
        first = _switches(row)[0] if _switches(row) else None
        series = next(iter(row["layers"].values()))["r"]
        after = sum(step > first["step"] for step, _ in series) if first else 0
        bpb = f"{row['bpb'][0][1]:.3f} -> {row['bpb'][-1][1]:.3f}"
        switch = f"{first['step']} | {first['r_new']} of 256" if first else "none | -"
        lines.append(f"| {row['arm']} | {switch} | {after} | {bpb} | {row['train_s'] / 60:.1f} |")
    lines += [
        "",
        _hardware(rows, command),
        "",
        _figure("phase1", "Metrics of the matrix over training", rows, draw_phase1),
    ]
    return "\n".join(lines) + "\n"


def phase2(rows: list[Row], command: str) -> str:
    """All attention, several seeds, against full training."""
    arms = by_arm(rows)
    full = {row["seed"]: row["bpb"][-1][1] for row in arms["full"]}
    lines = [
        "## Phase 2: all attention",
        "",
        f"Depth 4, all 16 attention matrices, 2,000 steps of 512 tokens, {len(full)} seeds, against full training.",
        "Low-rank: of all matrices and steps, how many were in low-rank mode. Time is that of several small runs",
        "sharing one machine. calibrated-rule computes the split of a low-rank matrix anew at each decision,",
        "calibrated-rule-half at each second one: what training does unless told otherwise. In calibrated-rule-replay",
        "an alarm replays first-seen text and leaves the matrices alone, so only the policy switches.",
        "",
        "| arm | final bpb | against full, same seed | switches | first switch | low-rank | lowest r of 256 | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    full_seconds = statistics.mean(row["train_s"] for row in arms["full"])
    lines += [_phase2_line(name, group, full, full_seconds) for name, group in arms.items()]
    lines += ["", _hardware(rows, command), "", _clobbering(arms), "", _samples(arms), ""]
    lines.append(_figure("phase2_bpb", "Validation bpb over training, all seeds", rows, draw_bpb))
    lines.append(_figure("phase2_ranks", "Rank r of every matrix over training, one seed", rows, draw_ranks))
    return "\n".join(lines) + "\n"


def shift(rows: list[Row], command: str) -> str:
    """The planned shift, and its figure."""
    figure = _figure("shift", "Forgetting of A against the loss on B, every arm", rows, shift_page.draw_shift)
    return f"{shift_page.shift(rows, command)}\n{figure}"


def _phase2_line(name: str, group: list[Row], full: dict[int, float], full_seconds: float) -> str:
    final = [row["bpb"][-1][1] for row in group]
    ratios = [100 * (row["bpb"][-1][1] / full[row["seed"]] - 1) for row in group]
    switches = [_switches(row) for row in group]
    against = "-" if name == "full" else f"{_mean(ratios):+.2f} % ({min(ratios):+.2f} to {max(ratios):+.2f})"
    first = ", ".join(str(s[0]["step"]) if s else "none" for s in switches)
    ranks = [change["r_new"] for row in group for change in row["switches"]]
    return (
        f"| {name} | {_mean(final):.4f} ± {_spread(final):.4f} | {against} | "
        f"{', '.join(str(len(s)) for s in switches)} | {first} | {_mean([_lowrank_share(row) for row in group]):.0%} | "
        f"{min(ranks) if ranks else '-'} | "
        f"x {statistics.mean(row['train_s'] for row in group) / full_seconds:.2f} |"
    )


def _lowrank_share(row: Row) -> float:
    """Share of matrix-steps in low-rank mode, from the switches."""
    end, since, total = row["bpb"][-1][0], {}, 0
    for change in _switches(row):
        if change["change"] == "to_lowrank":
            since[change["layer"]] = change["step"]
        else:
            total += change["step"] - since.pop(change["layer"])
    total += sum(end - step for step in since.values())
    return total / (NUM_MATRICES * end)


def _clobbering(arms: dict[str, list[Row]]) -> str:
    """The strongest event of either kind under the calibrated rule, with its numbers."""
    rows = arms.get("calibrated-rule", [])
    return f"Under the calibrated rule, in {len(rows)} runs:\n\n* {_rotations(rows)}\n* {_alarms(rows)}"


def _rotations(rows: list[Row]) -> str:
    events = [
        (change["diagnostics"]["rotation_ratio"], row, change)
        for row in rows
        for change in _switches(row)
        if change["reason"] == "gradient_clobbering_risk"
    ]
    if not events:
        return "no matrix was switched by its spectrum."
    rotation, row, change = max(events, key=lambda event: event[0])
    numbers = change["diagnostics"]
    return (
        f"{len(events)} switches because a spectrum showed clobbering. The strongest: {change['layer']} at step "
        f"{change['step']} (seed {row['seed']}): the principal subspace turned {rotation:.1f} times what the size of "
        f"the update explains, the update lay {numbers['update_lift']:.2f} times chance in the principal directions "
        f"(z {numbers['update_z']:.1f}); switched to r = {change['r_new']}."
    )


def _alarms(rows: list[Row]) -> str:
    events = [(alarm["harm"], row, alarm) for row in rows for alarm in row["alarms"]]
    if not events:
        return "no alarm was raised."
    harm, row, alarm = max(events, key=lambda event: event[0])
    worst = alarm["matrices"][0] if alarm["matrices"] else None
    through = (
        f", most of it through {worst['name']}: {worst['nats']:+.4f} nats in twenty steps or less, "
        f"{worst['left_principal'] / worst['nats']:.0%} of that by its principal left directions (a quarter of all), "
        f"{worst['input_principal'] / worst['nats']:.0%} by the principal inputs"
        if worst and "left_principal" in worst and "input_principal" in worst
        else ""
    )
    return (
        f"{len(events)} alarms: first-seen text was being lost. The strongest: step {alarm['step']} (seed "
        f"{row['seed']}), {harm:.3f} nats a token{through}; found by {alarm['trigger']}."
    )


def _samples(arms: dict[str, list[Row]]) -> str:
    lines = ["Samples at the end (first seed):", ""]
    for name, group in arms.items():
        sample = group[0]["samples"][-1]
        text = " ".join((sample["prompt"] + sample["text"]).split()).replace("|", "\\|")
        lines.append(f"* {name}: `{text.replace('`', chr(39))}`")
    return "\n".join(lines)


def draw_phase1(rows: list[Row], axes: Any) -> None:
    for row in rows:
        series = next(iter(row["layers"].values()))
        for metric in ("principal_alignment", "update_lift"):
            if metric in series:
                steps, values = zip(*series[metric], strict=True)
                axes.plot(steps, values, label=f"{row['arm']}: {metric}", linewidth=1)
        for change in _switches(row):
            axes.axvline(change["step"], color="grey", linewidth=0.4)
    axes.set_xlabel("step")
    axes.legend(fontsize=7)


def draw_bpb(rows: list[Row], axes: Any) -> None:
    colours = {}
    for row in rows:
        steps, values = zip(*row["bpb"], strict=True)
        known = row["arm"] in colours
        (line,) = axes.plot(
            steps[1:], values[1:], color=colours.get(row["arm"]), linewidth=1, label=None if known else row["arm"]
        )
        colours[row["arm"]] = line.get_color()
    axes.set_xlabel("step")
    axes.set_ylabel("validation bits per byte")
    axes.legend()


def draw_ranks(rows: list[Row], axes: Any) -> None:
    row = next(r for r in rows if r["arm"] == "calibrated-rule" and r.get("layers"))
    for layer, series in row["layers"].items():
        modes = dict(map(tuple, series["mode"]))
        steps, ranks = zip(*series["r"], strict=True)
        lowrank = [r if modes.get(step) else float("nan") for step, r in series["r"]]
        (line,) = axes.plot(steps, ranks, linewidth=0.6, alpha=0.6, label=layer)
        axes.plot(steps, lowrank, linewidth=3, color=line.get_color())
    axes.set_xlabel("step")
    axes.set_ylabel("r (thick: in low-rank mode)")
    axes.legend(fontsize=6, ncols=2)


def _figure(name: str, title: str, rows: list[Row], draw: Callable[[list[Row], Any], None]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    draw(rows, axes)
    axes.set_title(title, fontsize=10)
    figure.savefig(FIGURES / f"{name}.png", dpi=110)
    plt.close(figure)
    return f"![{title}](figures/{name}.png)\n"


def _switches(row: Row) -> list[Row]:
    return [change for change in row["switches"] if change["change"] != "rank"]


def _hardware(rows: list[Row], command: str) -> str:
    return f"`{command}`, on {rows[0]['hardware']}."


def _mean(values: list[float]) -> float:
    return statistics.mean(values)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


SECTIONS = {"phase1": phase1, "phase2": phase2, "shift": shift}
COSTS = {
    "spectral": cost_tables.spectral,
    "switching": cost_tables.switching,
    "memory": cost_tables.memory,
    "nanochat": cost_tables.nanochat,
    "nanochat_2025": cost_tables.nanochat,
    "nanochat_two_gpus": cost_tables.nanochat,
    "monitoring_cpu": cost_tables.monitoring,
    "sinks": cost_tables.sinks,
    "scaling": cost_tables.scaling,
}

if __name__ == "__main__":
    sys.exit(main())
