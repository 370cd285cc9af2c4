#!/usr/bin/env python3
"""Fault drills on a tiny run: what is survived, as a table. Exit code 0 if everything was.

    python scripts/drill.py                # 20 kills at random moments, about five minutes on one core
    python scripts/drill.py --kills 100

Every drill ends with a run that must equal an undisturbed one: each step's loss to the last bit, wherever a step was
computed more than once all its records, and the final weights at tolerance 0.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from svdtrain.trainer.checkpoint import CheckpointError, CheckpointStore
from svdtrain.trainer.loop import Trainer
from tests.main_job import records, tiny_settings, tiny_trainer, write_corpus

NUM_STEPS = 40
SAVE_EVERY = 4
STAGES = ("directory", "model", "optimizer", "state", "manifest", "aside", "rename", "latest", "prune")
Fault = Callable[[Trainer], None]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    drill: str
    faults: int
    lost_steps: int
    differing_steps: int
    unreadable: int
    undetected: int = 0
    note: str = ""

    @property
    def survived(self) -> bool:
        return not (self.lost_steps or self.differing_steps or self.unreadable or self.undetected)


class Drills:
    """An undisturbed run, and runs to disturb."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        os.environ["SVDTRAIN_CACHE"] = str(directory / "cache")
        self.settings = tiny_settings(
            write_corpus(directory / "text"),
            model={"depth": 1, "max_seq_len": 32},
            train={"num_iterations": NUM_STEPS, "save_every": SAVE_EVERY, "total_batch_size": 128},
        )
        started = time.monotonic()
        assert self.attempt("straight") == 0, "the undisturbed run failed"
        self.run_seconds = time.monotonic() - started
        self.losses = _losses(directory / "straight")
        self.weights = self._final_weights("straight")

    def attempt(self, name: str, fault: Fault = lambda trainer: None, kill_after_s: float = 0.0) -> int:
        """One process of the run `name`, resumed where there is something; its exit code, negative for a signal.

        A fork, so that nothing is imported anew: a hundred kills take minutes.
        """
        child = os.fork()
        if child == 0:
            os._exit(self._child(name, fault))
        if kill_after_s:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _child(self, name: str, fault: Fault) -> int:
        try:
            warnings.simplefilter("ignore")
            trainer = tiny_trainer(self.directory / name, self.settings)
            fault(trainer)
            trainer.fit(resume=True)
        except CheckpointError as error:
            return 3 if "cannot save" in str(error) else 4
        except BaseException:
            traceback.print_exc()
            return 5
        return 85 if trainer.state.control.ending else 0

    def judge(self, name: str, faults: int, note: str = "") -> Row:
        """Let the run finish undisturbed and compare it with the straight one."""
        code = self.attempt(name)
        seen = _losses(self.directory / name)
        lost = [step for step in self.losses if step not in seen]
        differing = [step for step, values in seen.items() if values != self.losses[step]]
        same = code == 0 and all(
            torch.equal(tensor, self.weights[key]) for key, tensor in self._final_weights(name).items()
        )
        return Row(name, faults, len(lost), len(differing) + (code == 0 and not same), int(code != 0), note=note)

    def _final_weights(self, name: str) -> dict[str, Any]:
        return load_file(self.directory / name / "checkpoints" / f"step_{NUM_STEPS:06d}" / "model.safetensors")

    # --- the drills ---

    def random_kills(self, count: int) -> Row:
        """kill -9 after a random time; a run that reached its end begins anew under the next name."""
        rows, in_save = [], 0
        while sum(row.faults for row in rows) < count:
            name, kills = f"random-kills-{len(rows)}", 0
            while sum(row.faults for row in rows) + kills < count:
                code = self.attempt(name, kill_after_s=self.random.uniform(0.05, 1.1) * self.run_seconds * 0.6)
                if code == 0:
                    break
                kills += 1
                in_save += any((self.directory / name / "checkpoints").glob("*.tmp"))
            rows.append(self.judge(name, kills))
        return Row(
            "kill -9 at random moments", count, sum(r.lost_steps for r in rows), sum(r.differing_steps for r in rows),
            sum(r.unreadable for r in rows), note=f"{in_save} inside a save, {len(rows)} runs",
        )  # fmt: skip

    def kills_in_a_save(self) -> Row:
        """kill -9 at each stage of the second save of a process."""
        for stage in STAGES:
            self.attempt("kills-in-a-save", _at_stage(stage, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        return self.judge("kills-in-a-save", len(STAGES), "each stage of a save")

    def signals(self) -> Row:
        """USR2, TERM and INT in a step, one process each."""
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            code = self.attempt("signals", _at_stage("manifest", lambda number=number: os.kill(os.getpid(), number)))
            assert code == 85, f"{signal.Signals(number).name} ended with {code}"
        repeated = [step for step, values in _all_losses(self.directory / "signals").items() if len(values) > 1]
        assert not repeated, f"steps computed twice: {repeated}"
        return self.judge("signals", 3, "USR2, TERM, INT; no step twice")

    def damage(self, flips: int) -> Row:
        """Truncate, remove, and flip single bits in every file of the newest checkpoint: all must be noticed."""
        name = "damage"
        self.attempt(name, _stop_at(2 * SAVE_EVERY + 1))
        store = CheckpointStore(self.directory / name / "checkpoints")
        step = store.newest_whole()
        faults = undetected = 0
        for path in sorted(store.directory(step).iterdir()):
            whole = path.read_bytes()
            for data in (b"", whole[: len(whole) // 2], whole[:-1], *self._flipped(whole, flips)):
                path.write_bytes(data)
                faults += 1
                undetected += store.verify(step) == ""
            path.write_bytes(whole)
        _truncate(store.directory(step) / "model.safetensors")  # and the run falls back to the one before
        row = self.judge(name, faults + 1, f"truncated, emptied, {flips} flipped bits per file; fell back")
        return Row(**{**row.__dict__, "undetected": undetected})

    def _flipped(self, whole: bytes, count: int) -> list[bytes]:
        out = []
        for _ in range(count):
            data = bytearray(whole)
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            out.append(bytes(data))
        return out

    def disk_full(self) -> Row:
        """Files may not grow beyond 40 kB: every save fails, for real, until there is room again."""

        def fill(trainer: Trainer) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
            _stop_at(2 * SAVE_EVERY + 2)(trainer)

        self.attempt("disk-full", _stop_at(SAVE_EVERY + 1))
        code = self.attempt("disk-full", fill)
        assert code == 3, f"a full disk ended with {code}"
        alerts = [r["rule"] for r in records(self.directory / "disk-full", "alert")]
        assert alerts == ["checkpoint_failed"] * len(alerts), alerts
        assert alerts
        return self.judge("disk-full", len(alerts), "alerts, then one error; older checkpoints stayed")


def _at_stage(stage: str, action: Callable[[], None]) -> Fault:
    """Do something in the first save that this process makes, or the second where there is time for two."""

    def fault(trainer: Trainer) -> None:
        trainer.store.at_stage = lambda name: action() if name == stage else None

    return fault


def _stop_at(step: int) -> Fault:
    def fault(trainer: Trainer) -> None:
        def stop(state: Any) -> None:
            if state.step == step:
                state.control.request_stop("drill")

        trainer.engine.hooks[0].on_step_end = stop  # type: ignore[method-assign]

    return fault


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _all_losses(run: Path) -> dict[int, list[float]]:
    out: dict[int, list[float]] = {}
    for record in records(run, "train"):
        out.setdefault(record["step"], []).append(record["train/loss"])
    return out


def _losses(run: Path) -> dict[int, set[float]]:
    """Every loss that was ever recorded for a step: one, if repeated steps repeat exactly."""
    return {step: set(values) for step, values in _all_losses(run).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=20, help="kills at random moments")
    parser.add_argument("--flips", type=int, default=20, help="flipped bits per file of a checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory = Path(tempfile.mkdtemp(prefix="svdtrain-drill-"))
    console = Console()
    try:
        drills = Drills(directory, options.seed)
        console.print(f"one undisturbed run: {NUM_STEPS} steps, a save every {SAVE_EVERY}, {drills.run_seconds:.1f} s")
        rows = [
            drills.random_kills(options.kills),
            drills.kills_in_a_save(),
            drills.signals(),
            drills.damage(options.flips),
            drills.disk_full(),
        ]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    columns = ("drill", "faults", "lost steps", "differing steps", "unreadable runs", "undetected", "note", "survived")
    table = Table(*columns)
    for row in rows:
        numbers = (row.faults, row.lost_steps, row.differing_steps, row.unreadable, row.undetected)
        table.add_row(row.drill, *map(str, numbers), row.note, "yes" if row.survived else "[red]NO")
    console.print(table)
    return 0 if all(row.survived for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
