"""What looking costs, as tables for docs/RESULTS.md, from the rows of the benchmarks."""

from __future__ import annotations

from typing import Any

SHOWN_COSTS = ("exact", "full analysis", "fast lane / step", "engine / step, attention", "engine / step, MLP",
               "engine / step, all")  # fmt: skip


def spectral(content: dict[str, Any]) -> str:
    """What decomposing and looking cost on a GPU."""
    num, size = content["num"], content["size"]
    ks = sorted({row["k"] for row in content["rows"] if row["section"] == "full analysis"})
    lines = [
        "## What looking costs",
        "",
        f"{num} matrices of {size} x {size} in float32 (all attention of depth 20), ms for all of them unless the row",
        "says otherwise. engine: what an ordinary step pays, every matrix looked at and one in twenty analysed, the",
        "mean of 40 steps. d20: a step of 524,288 tokens at depth 20, 3.24 s on this GPU. `check` is against exact",
        "results of the same run.",
        "",
        "| what | variant | k | ms | check | note |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        if row["section"] in SHOWN_COSTS:
            k = row["k"] if row["k"] is not None else "-"
            cells = (row["section"], row["variant"], k, f"{row['ms']:,.2f}", row["check"], row["note"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    command = f"python scripts/bench_spectral.py --num {num} --size {size} --device cuda --ks {' '.join(map(str, ks))}"
    lines += ["", f"`{command}`, on {content['device']}, torch {content['torch']}."]
    return "\n".join(lines) + "\n"


def monitoring(content: dict[str, Any]) -> str:
    """The same on two cores, in the loop."""
    lines = [
        "### On a laptop's cores",
        "",
        "Depth 4, all 16 attention matrices watched at every step and analysed every 20; steps with and without",
        "monitoring take turns.",
        "",
        "| | value | | note |",
        "|---|---|---|---|",
        *(
            f"| {row['name'].strip()} | {row['value']:,.2f} | {row['unit']} | {row['note']} |"
            for row in content["rows"]
        ),
    ]
    flags = " ".join(part for part in content["argv"] if not part.endswith(".json") and part != "--out")
    lines += ["", f"`python scripts/bench_monitoring.py {flags}`, on {content['machine']}."]
    return "\n".join(lines) + "\n"


def sinks(content: dict[str, Any]) -> str:
    """Of writing everything down, in a real run."""
    spent = ", ".join(f"{name} {ms:.2f}" for name, ms in content["ms_per_step"].items())
    lines = [
        "### Writing it down",
        "",
        f"The log, the console and wandb (offline), over {content['steps']} steps of {content['mean_step_ms']:.0f} ms,",
        f"in ms a step: {spent}; together {100 * content['share']:.2f} %",
        "of the training time. wandb's own process takes",
        f"{100 * content['other_processes_cpu_share']:.2f} % of a core beside it.",
        "",
        f"`python scripts/bench_sinks.py -- {' '.join(content['flags'])}`, on two CPU cores.",
    ]
    return "\n".join(lines) + "\n"
