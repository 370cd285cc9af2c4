"""Runs for the fault drills: forked from one process that has imported everything, judged against an undisturbed one.

A fork starts in milliseconds where a new Python takes ten seconds for its imports, so that a hundred kills take
minutes. What a child is doing when it is killed is in a few bytes of memory shared with the parent.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it when the first optimizer is built: four seconds in every child
from safetensors.torch import load_file
from torch import Tensor

from svdtrain.interrupts import PREEMPTED, nothing_to_save_yet
from svdtrain.runlog import decode_record, read_records, surviving_records
from svdtrain.trainer import distributed
from svdtrain.trainer.checkpoint import CheckpointError, CheckpointStore
from svdtrain.trainer.errors import RankLostError
from svdtrain.trainer.loop import Trainer
from tests.main_job import tiny_settings, tiny_trainer, write_corpus

NUM_STEPS = 40
SAVE_EVERY = 4
STAGES = ("directory", "model", "optimizer", "state", "manifest", "aside", "rename", "latest", "prune")
CANNOT_SAVE, NOTHING_WHOLE, DISK_FULL, FAILED = 3, 4, 5, 6
"""Exit codes of a child, beside 0 (finished) and 85 (preempted)."""
LOSS_TOLERANCE = 1e-4
"""With another number of ranks gradients are summed in another order."""
Fault = Callable[[Trainer], None]


def no_fault(trainer: Trainer) -> None:
    """An undisturbed run."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a disturbed run lost."""

    lost_steps: int = 0
    repeated_steps: int = 0
    differing_steps: int = 0
    unreadable: int = 0

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class Runs:
    """An undisturbed run, and runs to disturb."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        self._stage = mmap.mmap(-1, 1)  # 0: not inside a save; else 1 + index of the stage
        os.environ["SVDTRAIN_CACHE"] = str(directory / "cache")
        self.settings = tiny_settings(
            write_corpus(directory / "text"),
            model={"depth": 1, "max_seq_len": 32},
            train={
                "num_iterations": NUM_STEPS, "save_every": SAVE_EVERY, "total_batch_size": 128, "eval_every": 10,
                "device_batch_size": 1, "check_ranks_every": 5,
            },
        )  # fmt: skip
        self.attempt("warm-up")  # tokenises
        started = time.monotonic()
        assert self.attempt("straight") == 0, "the undisturbed run failed"
        self.run_seconds = time.monotonic() - started
        self.losses = {record["step"]: record["train/loss"] for record in self.train_records("straight")}
        self.weights = self._final_weights("straight")

    def path(self, name: str) -> Path:
        return self.directory / name

    def _log(self, name: str) -> Path:
        return self.directory / f"{name.replace('/', '-')}.log"

    # --- starting and disturbing ---

    def start(self, name: str, fault: Fault = no_fault, **rank: str) -> int:
        """Fork one process of the run `name`, resumed where there is something; its pid. `rank`: RANK and so on."""
        self._stage[0] = 0
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.environ.update(rank)
            os._exit(self._child(name, fault))
        return child

    def attempt(self, name: str, fault: Fault = no_fault, after_s: float = 0.0, number: int = signal.SIGKILL) -> int:
        """One process, with a signal after a while if asked; its exit code, negative for the signal that ended it."""
        child = self.start(name, fault)
        if after_s:
            time.sleep(after_s)
            os.kill(child, number)
        return wait(child)

    def ranks(self, name: str, count: int, kill: int = -1, after_s: float = 0.0) -> list[int]:
        """As many processes at once; rank `kill` is killed after a while. Exit codes in order of rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children = [self.start(name, no_fault, **world, RANK=str(r), LOCAL_RANK=str(r)) for r in range(count)]
        if kill >= 0:
            time.sleep(after_s)
            os.kill(children[kill], signal.SIGKILL)
        return [wait(child) for child in children]

    def stage(self) -> str:
        """Where in a save the last child was; empty outside of one."""
        return STAGES[self._stage[0] - 1] if self._stage[0] else ""

    def _child(self, name: str, fault: Fault) -> int:
        log = os.open(self._log(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        distributed.COLLECTIVE_TIMEOUT_S = 60.0
        try:
            with nothing_to_save_yet():
                trainer = tiny_trainer(self.path(name), self.settings)
                self._follow_saves(trainer.store)
                fault(trainer)
                trainer.fit(resume=True)
            distributed.close_world(trainer.state.world)
        except CheckpointError as error:
            print(error, file=sys.stderr)
            return CANNOT_SAVE if "cannot save" in str(error) else NOTHING_WHOLE
        except RankLostError:
            return 3
        except OSError as error:
            print(error, file=sys.stderr)
            return DISK_FULL
        except BaseException:
            traceback.print_exc()
            return FAILED
        return PREEMPTED if trainer.state.control.ending and trainer.saved else 0

    def _follow_saves(self, store: CheckpointStore) -> None:
        def follow(name: str) -> None:
            self._stage[0] = 1 + STAGES.index(name)

        save = store.save

        def save_and_forget(*args: Any, **kwargs: Any) -> Path:
            path = save(*args, **kwargs)
            self._stage[0] = 0
            return path

        store.at_stage = follow
        store.save = save_and_forget  # type: ignore[method-assign]

    # --- judging ---

    def check_directory(self, name: str) -> Verdict:
        """After a fault: every whole line is a record, and no checkpoint that was announced as durable is lost."""
        path = self.path(name)
        if not (path / "metrics.jsonl").exists():
            return Verdict()
        lines = (path / "metrics.jsonl").read_text().split("\n")
        torn = [line for line in lines[:-1] if line and decode_record(line) is None]
        announced = [r["path"] for r in read_records(path / "metrics.jsonl") if r["kind"] == "checkpoint"]
        promised = int(announced[-1].rpartition("_")[2]) if announced else -1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                newest = CheckpointStore(path / "checkpoints").newest_whole()
            except CheckpointError:
                newest = -2
        # A line that was cut by a kill is ended by the next process, and read as the torn line that it is.
        restarts = sum(r["kind"] in ("start", "resume") for r in read_records(path / "metrics.jsonl"))
        if newest >= promised and len(torn) <= restarts:
            return Verdict()
        print(f"{name}: newest {newest}, promised {promised}, torn {torn}, {restarts} starts", file=sys.stderr)
        return Verdict(unreadable=1)

    def judge(self, name: str, *, tolerance: float = 0.0) -> Verdict:
        """Let the run finish undisturbed and compare every step and the final weights with the straight one."""
        code = self.attempt(name)
        if code != 0:
            said = self._log(name).read_text()[-2000:]
            print(f"{name}: exit code {code} without a fault\n{said}", file=sys.stderr)
            return Verdict(unreadable=1)
        counted = [r["step"] for r in surviving_records(self.path(name) / "metrics.jsonl") if r["kind"] == "train"]
        computed = self.train_records(name)  # also what was computed again after a resume
        differing = {r["step"] for r in computed if abs(r["train/loss"] - self.losses[r["step"]]) > tolerance}
        final = self._final_weights(name)
        if tolerance == 0 and not all(torch.equal(final[key], tensor) for key, tensor in self.weights.items()):
            differing.add(NUM_STEPS + 1)
        return Verdict(
            lost_steps=len(set(self.losses) - set(counted)),
            repeated_steps=len(counted) - len(set(counted)),
            differing_steps=len(differing),
        )

    def train_records(self, name: str) -> list[dict[str, Any]]:
        """Of every step that was ever computed, in order."""
        path = self.path(name) / "metrics.jsonl"
        return [r for r in read_records(path) if r["kind"] == "train"] if path.exists() else []

    def _final_weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path(name) / "checkpoints" / f"step_{NUM_STEPS:06d}" / "model.safetensors")


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- faults that a child does to itself ---


def kill_in_stage(stage: str, which: int, delay_s: float) -> Fault:
    """kill -9 a moment after a stage of the save number `which` of this process has begun."""

    def fault(trainer: Trainer) -> None:
        follow, seen = trainer.store.at_stage, [0]

        def at_stage(name: str) -> None:
            follow(name)
            seen[0] += name == stage
            if name == stage and seen[0] == which:
                timer = threading.Timer(delay_s, lambda: os.kill(os.getpid(), signal.SIGKILL))
                timer.start() if delay_s else os.kill(os.getpid(), signal.SIGKILL)

        trainer.store.at_stage = at_stage

    return fault


def stop_at(step: int) -> Fault:
    """End in order behind a step."""

    def fault(trainer: Trainer) -> None:
        on_step_end = trainer.engine.hooks[0].on_step_end

        def stop(state: Any) -> None:
            on_step_end(state)
            if state.step == step:
                state.control.request_stop("drill")

        trainer.engine.hooks[0].on_step_end = stop  # type: ignore[method-assign]

    return fault
