"""The section of docs/RESULTS.md about the planned shift, from the rows of shift.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from runs import by_arm
from shift_summary import HARM_NATS, HARM_WINDOW, LATE_NATS

Row = dict[str, Any]
Detection = dict[str, Any]
WATCHED = "plain lr x1"


def shift(rows: list[Row], command: str) -> str:
    """What each arm kept of the first text at equal loss on the second, and what saw the harm coming."""
    pairs = sorted({(row["order"], row["seed"]) for row in rows})
    orders = dict.fromkeys(row["order"] for row in rows)
    lines = [
        "## A planned shift: from one text to another",
        "",
        f"The model trains on text A, then B replaces A within a few steps; {len(pairs)} pairs of an order and a seed,",
        "every arm of a pair from the same checkpoint at the onset. A and B are the documents of two sources of the",
        f"shards (column `source`), in the orders {' and '.join(orders)}. Forgetting: rise of the loss on A since the",
        "onset, in nats a token. Learning B more slowly forgets less by itself, so an arm is also held against plain",
        "training at the learning rate that ends with the same loss on B (interpolated between the plain arms, and",
        "only for pairs inside of what these reach): below zero it forgets less than that. plain: no action, at a",
        "factor on the learning rate; alarm: these actions while the alarm is up; replay: at this share from the onset",
        "on, whatever the alarm says. Means over pairs, in brackets the smallest and the largest.",
        "",
        "| arm | loss on B | forgetting of A | against plain at equal loss on B | pairs inside | steps under alarm |",
        "|---|---|---|---|---|---|",
        *(_arm_line(name, group) for name, group in by_arm(rows).items()),
        "",
        f"`{command}`, on {rows[0]['hardware']}.",
        "",
    ]
    watched = [row["detection"] for row in rows if row["arm"] == WATCHED and "detection" in row]
    return "\n".join(lines + (_detection(watched) if watched else [])) + "\n"


def _arm_line(name: str, group: list[Row]) -> str:
    against = [100 * row["against_frontier"] for row in group if row["against_frontier"] is not None]
    plain = name.startswith("plain")
    cells = (
        name,
        _spread([row["loss_b"] for row in group], ".3f"),
        _spread([row["forgetting"] for row in group], ".3f"),
        "the frontier" if plain else f"{_spread(against, '+.1f')} %" if against else "outside of it",
        "" if plain else f"{len(against)} of {len(group)}",
        _spread([row["steps_under_alarm"] for row in group], ".0f"),
    )
    return f"| {' | '.join(cells)} |"


def _detection(found: list[Detection]) -> list[str]:
    quiet, harmful = (sum(d[key] for d in found) for key in ("quiet_steps", "harmful_steps"))
    alarms = [d["alarm"] for d in found]
    leads = [alarm["lead"] for alarm in alarms if alarm["lead"] is not None]
    lines = [
        "### What saw it coming",
        "",
        f"In the {len(found)} runs that only watch (`{WATCHED}`). A step is harmful when the loss on first-seen text",
        f"rises by more than {HARM_NATS} nats within {HARM_WINDOW} steps ({harmful} steps), quiet before the onset",
        f"({quiet} steps). Lead: steps between the first word after the onset and the step at which {LATE_NATS} nats",
        "are lost, at the threshold that no quiet step of the same run passes; the alarm has its own threshold.",
        f"AUROC: of the first {HARM_WINDOW} steps of the shift, and of all harmful steps, each against the quiet ones.",
        "Below .5 a statistic falls; what falls or rises all through training, as update_size does, tells nothing by",
        "that.",
        "",
        "`_z`: against its own last values, as the triggers look at it. turn: one minus the cosine of gradient and",
        "momentum. probe_rise, harm, interference: of the last measurement of forgetting. alarm_up: whether the alarm",
        "was up when the step's record was written, just before the alarm judges it. update_size: ||dW|| / ||W|| of",
        "one step. `_lift`: means over the matrices. What each is: [METHOD.md](METHOD.md).",
        "",
        "| statistic | AUROC, first steps | AUROC, harmful steps | lead in steps | spoke in |",
        "|---|---|---|---|---|",
        f"| **the alarm** | | | {_spread(leads, '.0f')} | {len(leads)} of {len(found)} |",
    ]
    names = {name for d in found for name in d["statistics"]}
    judged = {name: [d["statistics"][name] for d in found if name in d["statistics"]] for name in names}
    lines += [
        f"| {name} | {_spread(_known(judged[name], 'auroc_first_steps'), '.2f')} | "
        f"{_spread(_known(judged[name], 'auroc'), '.2f')} | {_spread(_known(judged[name], 'lead'), '.0f')} | "
        f"{len(_known(judged[name], 'lead'))} of {len(found)} |"
        for name in sorted(names, key=lambda n: -statistics.mean(_known(judged[n], "auroc_first_steps") or [-1]))
    ]
    false, asked = (statistics.mean(alarm[key] for alarm in alarms) for key in ("false_per_1000", "asked_per_1000"))
    return [
        *lines,
        "",
        f"In 1,000 quiet steps the alarm was raised {false:.1f} times; triggers asked for {asked:.0f} measurements.",
    ]


def _known(judged: list[dict[str, Any]], key: str) -> list[float]:
    return [one[key] for one in judged if one[key] is not None]


def _spread(values: Sequence[float], format: str) -> str:
    """Mean, and where they differ the smallest and the largest."""
    if not values:
        return "-"
    # round and + 0.0: otherwise a mean of -.2 steps would read -0
    mean, low, high = (
        f"{(round(v) if '.0f' in format else v) + 0.0:{format}}"
        for v in (statistics.mean(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def draw_shift(rows: list[Row], axes: Any) -> None:
    """Forgetting of A over the loss on B, each pair centred on its plain run. Plain training at several learning rates
    is a grey line for each pair; an arm has its colour, an order of the texts its marker."""
    base = {(row["order"], row["seed"]): row for row in rows if row["arm"] == WATCHED}
    orders = sorted({row["order"] for row in rows})
    names = [name for name in by_arm(rows) if not name.startswith("plain")]
    for place, (pair, origin) in enumerate(base.items()):
        plain, others = [], []
        for row in (row for row in rows if (row["order"], row["seed"]) == pair):
            point = (row["loss_b"] - origin["loss_b"], row["forgetting"] - origin["forgetting"])
            (plain if row["arm"].startswith("plain") else others).append((row["arm"], *point))
        line = [point[1:] for point in sorted(plain, key=lambda point: point[1])]
        label = None if place else "plain, five learning rates"
        axes.plot(*zip(*line, strict=True), "-x", color="grey", markersize=4, linewidth=0.8, label=label)
        for name, x, y in others:
            label = None if place else name
            axes.plot(x, y, "os"[orders.index(pair[0]) % 2], color=f"C{names.index(name)}", markersize=5, label=label)
    axes.set_xlabel(f"loss on B, minus that of plain training (circles: {orders[0]}, squares: {orders[-1]})")
    axes.set_ylabel("forgetting of A, likewise")
    axes.legend(fontsize=6)
