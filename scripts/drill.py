#!/usr/bin/env python3
"""Fault drills on a tiny run: what is survived, as a table. Exit code 0 if everything was.

    python scripts/drill.py                                     # 20 kills, about two minutes on one core
    python scripts/drill.py --kills 100 --json docs/results/drill.json --docs docs/CLUSTER.md

Every drill ends with a run that must equal an undisturbed one: no step lost, none counted twice, each step's loss to
the last bit, also where it was computed more than once, and the final weights at tolerance 0. (With another number of
ranks in between: losses within 1e-4.) After every single fault the run directory must be readable and must still hold
each checkpoint that was announced as durable.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

from scripts.drill_runs import (
    CANNOT_SAVE,
    DISK_FULL,
    LOSS_TOLERANCE,
    NOTHING_WHOLE,
    NUM_STEPS,
    SAVE_EVERY,
    STAGES,
    Runs,
    Verdict,
    kill_in_stage,
    stop_at,
    wait,
)
from svdtrain.trainer.checkpoint import CheckpointStore
from svdtrain.trainer.loop import Trainer
from tests.main_job import records

COLUMNS = (
    "drill", "faults", "lost steps", "repeated steps", "differing steps", "unreadable directories", "undetected",
    "note",
)  # fmt: skip
BEGIN, END = "<!-- drill table: made by scripts/drill.py -->", "<!-- end of the drill table -->"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    drill: str
    faults: int
    verdict: Verdict
    undetected: int = 0
    note: str = ""

    @property
    def survived(self) -> bool:
        return not (self.undetected or any(vars(self.verdict).values()))

    def cells(self) -> list[str]:
        numbers = (self.faults, *vars(self.verdict).values(), self.undetected)
        return [self.drill, *map(str, numbers), self.note]


def until_disturbed(runs: Runs, name: str, count: int, disturb: Callable[[str, int], bool]) -> tuple[Verdict, int]:
    """Call `disturb(run, number)` until `count` faults took effect; a run that reached its end before is judged, and
    the next one begins. The sum of all verdicts, and the number of runs."""
    total, faults, number = Verdict(), 0, 0
    while faults < count:
        run = f"{name}-{number}"
        while faults < count and disturb(run, faults):
            faults += 1
            total += runs.check_directory(run)
        total += runs.judge(run)
        shutil.rmtree(runs.path(run))
        number += 1
    return total, number


def random_kills(runs: Runs, count: int) -> Row:
    """kill -9 after a random time, and a random moment after a random stage of a save has begun, in turn."""
    where: Counter[str] = Counter()

    def disturb(run: str, number: int) -> bool:
        draw = runs.random
        if number % 2:
            fault = kill_in_stage(draw.choice(STAGES), draw.randint(1, 3), draw.choice([0.0, draw.uniform(0, 0.01)]))
            code = runs.attempt(run, fault)
        else:
            code = runs.attempt(run, after_s=draw.uniform(0.05, 0.8) * runs.run_seconds)
        where[runs.stage()] += code == -signal.SIGKILL
        return code == -signal.SIGKILL

    verdict, num_runs = until_disturbed(runs, "kills", count, disturb)
    inside = ", ".join(f"{stage} {where[stage]}" for stage in STAGES)
    note = f"{count - where['']} inside a save ({inside}); {num_runs} runs"
    return Row(drill="kill -9 at random moments", faults=count, verdict=verdict, note=note)


def random_signals(runs: Runs, count: int) -> Row:
    """USR2, TERM and Ctrl-C at random moments: saved, exit code 85, and no step computed twice."""
    wrong: list[int] = []

    def disturb(run: str, number: int) -> bool:
        name = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)[number % 3]
        code = runs.attempt(run, after_s=runs.random.uniform(0.15, 0.5) * runs.run_seconds, number=name)
        if code not in (0, 85):
            wrong.append(code)
        twice = (
            Counter(r["step"] for r in runs.train_records(run)) if (runs.path(run) / "metrics.jsonl").exists() else {}
        )
        wrong.extend(step for step, times in twice.items() if times > 1)
        return code != 0

    verdict, num_runs = until_disturbed(runs, "signals", count, disturb)
    note = f"USR2, TERM, INT: saved and resumed, no step computed twice; {num_runs} runs"
    return Row(drill="signals at random moments", faults=count, verdict=verdict, undetected=len(wrong), note=note)


def damage(runs: Runs, flips: int) -> Row:
    """Truncate, empty, remove, and flip single bits of every file of the newest checkpoint: all must be noticed."""
    runs.attempt("damage", stop_at(2 * SAVE_EVERY + 1))
    store = CheckpointStore(runs.path("damage") / "checkpoints")
    step = store.newest_whole()
    faults = undetected = 0
    for path in sorted(store.directory(step).iterdir()):
        whole = path.read_bytes()
        for data in (None, b"", whole[: len(whole) // 2], whole[:-1], *_flipped(runs, whole, flips)):
            path.unlink() if data is None else path.write_bytes(data)
            faults += 1
            undetected += store.verify(step) == ""
        path.write_bytes(whole)
    assert store.verify(step) == ""
    (store.directory(step) / "model.safetensors").write_bytes(b"")  # and the run falls back to the one before
    verdict = runs.judge("damage")
    resumed = records(runs.path("damage"), "resume")[0]["step"]
    undetected += resumed >= step
    note = f"missing, empty, cut, {flips} flipped bits in each file; fell back from step {step} to {resumed}"
    return Row(drill="damaged checkpoint", faults=faults + 1, verdict=verdict, undetected=undetected, note=note)


def _flipped(runs: Runs, whole: bytes, count: int) -> Iterator[bytes]:
    for _ in range(count):
        data = bytearray(whole)
        data[runs.random.randrange(len(data))] ^= 1 << runs.random.randrange(8)
        yield bytes(data)


def nothing_whole(runs: Runs) -> Row:
    """Every checkpoint damaged: an error, never a start from step 0."""
    runs.attempt("all-damaged", stop_at(2 * SAVE_EVERY + 1))
    files = sorted((runs.path("all-damaged") / "checkpoints").glob("step_*/model.safetensors"))
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(whole[path][:-1])
    refused = runs.attempt("all-damaged") == NOTHING_WHOLE
    for path, data in whole.items():
        path.write_bytes(data)
    note = "refused with an error; restored, it went on"
    return Row(
        drill="all checkpoints damaged", faults=len(files), verdict=runs.judge("all-damaged"),
        undetected=int(not refused), note=note,
    )  # fmt: skip


def file_limit(runs: Runs) -> Row:
    """Files may not grow beyond 40 kB: every save fails, until there is room again."""

    def limit(trainer: Trainer) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        stop_at(3 * SAVE_EVERY + 2)(trainer)

    runs.attempt("file-limit", stop_at(SAVE_EVERY + 1))
    code = runs.attempt("file-limit", limit)
    verdict = runs.check_directory("file-limit")
    alerts = [r for r in records(runs.path("file-limit"), "alert") if r["rule"] == "checkpoint_failed"]
    note = f"{len(alerts)} failed saves: alerts, then one error; older checkpoints stayed"
    return Row(
        drill="saves without room (RLIMIT_FSIZE)", faults=len(alerts), verdict=verdict + runs.judge("file-limit"),
        undetected=int(code != CANNOT_SAVE), note=note,
    )  # fmt: skip


def full_disk(runs: Runs, count: int) -> Row | None:
    """A real full disk, a tmpfs that a ballast file fills at a random moment: not even a record can be written."""
    mount, wrong = runs.path("disk"), 0
    if not can_mount(mount):
        return None

    def disturb(run: str, number: int) -> bool:
        nonlocal wrong
        child = runs.start(run)
        time.sleep(runs.random.uniform(0.1, 0.5) * runs.run_seconds)
        fill(mount / "ballast")
        code = wait(child)
        (mount / "ballast").unlink()
        wrong += code not in (0, DISK_FULL, CANNOT_SAVE)
        return code != 0

    with tmpfs(mount, "16m"):
        verdict, num_runs = until_disturbed(runs, "disk/run", count, disturb)
    note = f"tmpfs filled at a random moment: ended with one error; with room again it went on; {num_runs} runs"
    return Row(drill="disk full", faults=count, verdict=verdict, undetected=wrong, note=note)


def fill(path: Path) -> None:
    """Write until nothing more fits, down to the last byte."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            with suppress(OSError):
                while file.write(b"0" * size):
                    pass


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def can_mount(path: Path) -> bool:
    try:
        with tmpfs(path, "1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def lost_ranks(runs: Runs) -> Row:
    """Two processes of which one is killed, then one, two again ...: the other ends in time, the run goes on."""
    wrong, slowest, verdict = 0, 0.0, Verdict()
    plan = [(2, 1), (1, 0), (2, 0), (1, 0), (2, 1)]
    for count, victim in plan:
        started, after_s = time.monotonic(), runs.random.uniform(0.1, 0.2) * runs.run_seconds
        codes = runs.ranks("ranks", count, kill=victim, after_s=after_s)
        slowest = max(slowest, time.monotonic() - started - after_s)
        wrong += 0 in codes
        verdict += runs.check_directory("ranks")
    verdict += runs.judge("ranks", tolerance=LOSS_TOLERANCE)
    worlds = "-".join(str(count) for count, _ in plan)
    note = f"kill -9 of one rank, world size {worlds}-1 over the resumes; the others left within {slowest:.0f} s"
    return Row(drill="a lost rank, another world size", faults=len(plan), verdict=verdict, undetected=wrong, note=note)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for docs, from the rows of the JSON file."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(['---', *['---:'] * (len(COLUMNS) - 2), '---'])}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row['cells'])} |" for row in rows)])


def put_table(path: Path, table: str) -> None:
    """Replace what stands between the marks in a document."""
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def run_drills(options: argparse.Namespace, directory: Path, say: Callable[[str], None]) -> list[Row]:
    runs = Runs(directory, options.seed)
    say(f"one undisturbed run: {NUM_STEPS} steps, a save every {SAVE_EVERY}, {runs.run_seconds:.1f} s")
    drills: dict[str, Callable[[], Row | None]] = {
        "kills": lambda: random_kills(runs, options.kills),
        "signals": lambda: random_signals(runs, max(3, options.kills // 4)),
        "damage": lambda: damage(runs, options.flips),
        "nothing": lambda: nothing_whole(runs),
        "limit": lambda: file_limit(runs),
        "disk": lambda: full_disk(runs, max(3, options.kills // 10)),
        "ranks": lambda: lost_ranks(runs),
    }
    rows = []
    for name, drill in drills.items():
        if options.only and name not in options.only:
            continue
        started = time.monotonic()
        row = drill()
        if row is not None:
            rows.append(row)
            say(f"{row.drill}: {'survived' if row.survived else 'NOT SURVIVED'} ({time.monotonic() - started:.0f} s)")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills at random moments; a quarter as many signals")
    parser.add_argument("--flips", type=int, default=20, help="flipped bits per file of a checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="kills signals damage nothing limit disk ranks")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--docs", type=Path, help="put the table between the marks of this document")
    parser.add_argument("--rows-from", type=Path, help="no drill: the rows of an earlier --json, for --docs")
    options = parser.parse_args()
    if options.rows_from:
        put_table(options.docs, markdown(json.loads(options.rows_from.read_text())["rows"]))
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    directory = Path(tempfile.mkdtemp(prefix="svdtrain-drill-"))
    console = Console(width=200)
    started = time.monotonic()
    try:
        rows = run_drills(options, directory, lambda line: console.print(line, markup=False))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    table = Table(*COLUMNS, "survived")
    for row in rows:
        table.add_row(*row.cells(), "yes" if row.survived else "[red]NO")
    console.print(table)
    plain = [{**asdict(row), "cells": row.cells(), "survived": row.survived} for row in rows]
    if options.json:
        about = {"torch": torch.__version__, "python": platform.python_version(), "seed": options.seed}
        report = {**about, "minutes": round((time.monotonic() - started) / 60, 1), "rows": plain}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.docs:
        put_table(options.docs, markdown(plain))
    return 0 if all(row.survived for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
