"""What looking costs, as tables for docs/RESULTS.md, from the rows of the benchmarks."""

from __future__ import annotations

from typing import Any

from svdtrain.spectral.settings import TrackerSettings

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
        "mean of 40 steps, nothing of it beside other work. full analysis: both lanes for all matrices at once, until",
        "every number is on the host. d20: a step of 524,288 tokens at depth 20,",
        f"{content['step_ms'] / 1e3:.2f} s on this GPU. `check` is against exact results of the same run.",
        _exact_share(content["rows"], content["step_ms"]),
        "S: error of the singular values over the largest one. rho: the rotation ratio, mean over the matrices. share",
        "and PR: largest error of a principal share and of a participation ratio. angle: of the tracked subspace.",
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


def _exact_share(rows: list[dict[str, Any]], step_ms: float) -> str:
    """What the engine's rows leave out: exact decompositions come once in so many analyses, all of a group together."""
    settings = TrackerSettings()
    steps = settings.interval * settings.exact_every
    ms = next(row["ms"] for row in rows if row["variant"] == "ours decompose_many") / steps
    return (
        f"Exact decompositions are due every {steps} steps, none of them in those 40: {ms:.1f} ms a step more,\n"
        f"{100 * ms / step_ms:.2f} % of d20, for all attention."
    )


def monitoring(content: dict[str, Any]) -> str:
    """The same on two cores, in the loop."""
    return _in_the_loop(
        content,
        "On a laptop's cores",
        "Depth 4, all 16 attention matrices watched at every step and analysed every 20; steps with and without",
        "monitoring take turns.",
    )


def switching(content: dict[str, Any]) -> str:
    """What moving matrices between modes costs on a GPU."""
    return _in_the_loop(
        content,
        "Switching",
        "All 80 attention matrices of depth 20 in one step, moments mapped, the step's own time taken off.",
    )


def memory(content: dict[str, Any]) -> str:
    """What is held beside the weights."""
    return _in_the_loop(
        content,
        "Memory",
        "What the method holds beside the model, all 16 attention matrices of depth 4 in low-rank mode at one r/g",
        "after the other; principal, bases, spectra, references and scratch are the tracked engine's, there in full",
        "mode, too. lowrank is W_p, B and A. On a GPU scratch is two bf16 copies while a look is under way.",
        "Re-registered, as here, the optimizer's state shrinks with r; shadow adds its own for B and A, of their size,",
        "and keeps the host's. Measuring forgetting holds W and a gradient in bf16 besides, 1.5 in the same units.",
    )


def _in_the_loop(content: dict[str, Any], title: str, *text: str) -> str:
    """A section about rows of bench_monitoring.py."""
    return "\n".join([f"### {title}", "", *text, "", *_measured_in_the_loop(content)]) + "\n"


def _measured_in_the_loop(content: dict[str, Any]) -> list[str]:
    """The rows of bench_monitoring.py and the command that made them."""
    flags = " ".join(part for part in content["argv"] if not part.endswith(".json") and part != "--out")
    return [
        "| | value | | note |",
        "|---|---|---|---|",
        *(
            f"| {row['name'].strip()} | {row['value']:,.2f} | {row['unit']} | {row['note']} |"
            for row in content["rows"]
        ),
        "",
        f"`python scripts/bench_monitoring.py {flags}`, on {content['machine']}.",
    ]


def nanochat(content: dict[str, Any]) -> str:
    """In the real nanochat: blocks of steps with and without monitoring."""
    gpus = content["ranks"]
    which = " of November 2025" if content.get("num_optimizers") == 2 else ""
    explained = [
        "Depth 12, steps of 524,288 tokens, 48 attention matrices; blocks of 20 steps take turns, each unwatched one",
        "before a watched one leaves its bases 20 steps old. Speed as a share of that of unwatched steps (of unwatched",
        "low-rank steps for `low-rank, watched`), in brackets the slowest and the fastest block. These are the first",
        "170 steps of a training, in which ranks fall fastest.",
        "",
    ]
    lines = [
        f"### In nanochat{which}, {'one GPU' if gpus == 1 else f'{gpus} GPUs'}",
        "",
        *(explained if gpus == 1 and not which else []),
        "| block | steps | tokens/s | by the mean step | by the median step |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["blocks"].items():
        if row["relative_mean"] is not None and row["steps"] >= 20:
            shares = (_share(row["relative_mean"], row["relative_mean_of_blocks"]),
                      _share(row["relative_median"], row["relative_median_of_blocks"]))  # fmt: skip
            lines.append(f"| {name} | {row['steps']} | {row['tokens_per_second']:,.0f} | {' | '.join(shares)} |")
    torn = len(content["tensors_that_differ_between_ranks"])
    ended = "" if "to full" in content["blocks"] else ", ended by `--max-seconds` before the last blocks"
    lines += [
        "",
        f"{content['num_changes']} changes of mode and rank by hand in {content['num_steps']} steps,",
        f"{content['recompiles']} recompiled graphs"
        + ("." if gpus == 1 else f"; {torn} tensors differ between ranks."),
        "",
        f"`{'' if gpus == 1 else f'torchrun --standalone --nproc_per_node={gpus} '}"
        f"{'python ' if gpus == 1 else ''}scripts/bench_nanochat.py --nanochat DIR`, on H200{ended}.",
    ]
    return "\n".join(lines) + "\n"


def _share(value: float, blocks: list[float]) -> str:
    return f"{value:.4f} ({min(blocks):.4f} to {max(blocks):.4f})"


def scaling(content: dict[str, Any]) -> str:
    """Two GPUs against one, and what a save costs."""
    one, many, settings = content["one"], content["many"], content["settings"]
    gpus, save = many["world_size"], many["saves"][-1]
    same = "are the same on all ranks" if many["ranks_identical"] else "DIFFER between ranks"
    lines = [
        f"### Our trainer on {gpus} GPUs",
        "",
        f"Depth {settings['depth']}, {int(settings['tokens_per_device']):,} tokens a step and GPU, monitoring on.",
        "",
        "| GPUs | tokens/s | step ms | waiting for the exchange, ms | optimizer, ms |",
        "|---|---|---|---|---|",
        *(
            f"| {row['world_size']} | {row['tokens_per_s']:,.0f} | {1e3 * row['step_s']:.1f} | "
            f"{row['exchange_ms']:.2f} | {row['optimizer_ms']:.2f} |"
            for row in (one, many)
        ),
        "",
        f"Scaling {100 * content['scaling']:.1f} %. One asynchronous save of {save['gib']:.2f} GiB, durable after",
        f"{save['durable_after_s']:.0f} s, loses {many['save_lost_ms'] / 1e3:.1f} s:"
        f" {many['save_cost_percent_per_1000_steps']:.2f} % of 1,000 steps.",
        f"After {many['switch_steps']} steps with {many['switches']} switches of {many['matrices']} matrices, all",
        f"weights and optimizer state {same}.",
        "",
        f"`python scripts/bench_scaling.py --depth {settings['depth']} --warmup {settings['warmup']} --steps"
        f" {settings['steps']} --saves {settings['saves']}`, on {gpus} x {many['machine']}.",
    ]
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
