"""Runs what is not in the store yet: (experiment, arm, seed), several at once as separate processes."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from ssm_blocks.experiments.catalogue import experiment
from ssm_blocks.experiments.experiment import Arm, Row, settings_hash
from ssm_blocks.experiments.store import Store, key_of


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm with one seed."""

    experiment: str
    arm: Arm
    seed: int
    settings: dict[str, Any]
    device: str
    command: str
    processes: int  # that share the machine

    @property
    def title(self) -> str:
        """For progress lines."""
        return f"{self.experiment} {self.arm.name} seed {self.seed}"


def plan(
    names: Iterable[str],
    *,
    seeds: int,
    quick: bool,
    device: str,
    out: Path,
    command: str,
    parallel: int,
    arms: set[str],
) -> tuple[list[Job], int]:
    """(jobs to run, number of finished ones that are skipped). arms: only these; empty means all.

    Raises ValueError for arms that none of the experiments has.
    """
    jobs, skipped, known = [], 0, set()
    for name in names:
        found = experiment(name)
        settings = found.complete_settings(quick)
        done = {key_of(row) for row in Store(out / f"{name}.jsonl").rows()}
        known |= {arm.name for arm in found.arms()}
        for arm in found.arms():
            for seed in range(seeds):
                if arms and arm.name not in arms:
                    continue
                if (arm.name, seed, settings_hash(arm, settings)) in done:
                    skipped += 1
                    continue
                processes = 1 if arm.exclusive else parallel
                jobs.append(
                    Job(
                        experiment=name, arm=arm, seed=seed, settings=settings, device=device, command=command,
                        processes=processes,
                    )
                )  # fmt: skip
    if arms - known:
        raise ValueError(f"no arm {', '.join(sorted(arms - known))}; there are {', '.join(sorted(known))}")
    return jobs, skipped


def run_job(job: Job) -> Row:
    """The row of one run. Called in the process that trains."""
    device = torch.device(job.device)
    began = time.perf_counter()
    with _threads(1 if job.settings["quick"] else torch.get_num_threads()):
        measured = experiment(job.experiment).run(job.arm, job.seed, job.settings, device)
    return {
        "experiment": job.experiment,
        "arm": job.arm.name,
        "group": job.arm.group,
        "seed": job.seed,
        "settings_hash": settings_hash(job.arm, job.settings),
        **measured,
        "seconds": time.perf_counter() - began,
        "hardware": hardware(device),
        "processes": job.processes,
        "torch": torch.__version__,
        "command": job.command,
        "config": job.arm.config,
        "settings": job.settings,
    }


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Quick runs are so small that several threads only wait for each other: three times as long on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_all(jobs: list[Job], parallel: int, out: Path, report: Callable[[str], None]) -> int:
    """Run the jobs, store each row as it comes, and return how many failed. Those that measure time run last, alone."""
    together = sorted((job for job in jobs if not job.arm.exclusive), key=lambda job: -job.arm.weight)
    alone = [job for job in jobs if job.arm.exclusive]
    failed = 0
    for number, (job, row) in enumerate(_finished(together, alone, parallel), 1):
        if isinstance(row, str):
            failed += 1
            report(f"[{number}/{len(jobs)}] {job.title} FAILED: {row}")
            continue
        Store(out / f"{job.experiment}.jsonl").append(row)
        report(f"[{number}/{len(jobs)}] {job.title}: {_summary(row)}")
    return failed


def _finished(together: list[Job], alone: list[Job], parallel: int) -> Iterator[tuple[Job, Row | str]]:
    """(job, row, or what went wrong), as they finish."""
    if parallel == 1:
        yield from ((job, _guarded(job)) for job in together)
    elif together:
        threads = max(1, min(2, (os.cpu_count() or 1) // parallel))
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the children as they start
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        with ProcessPoolExecutor(parallel, context, _start, (threads, context.Value("i", 0))) as pool:
            futures = {pool.submit(_guarded, job): job for job in together}
            for future in as_completed(futures):
                error = future.exception()  # a process that died takes the whole pool with it
                yield futures[future], future.result() if error is None else f"the process died ({error})"
    yield from ((job, _guarded(job)) for job in alone)


def _start(threads: int, processes: Synchronized[int]) -> None:
    """First thing in each process: its share of the cores, and of the GPUs where `cuda` does not say which."""
    torch.set_num_threads(threads)
    with processes.get_lock():
        number, processes.value = processes.value, processes.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _guarded(job: Job) -> Row | str:
    """A failure of one run must not end the others; its traceback goes to stderr."""
    try:
        return run_job(job)
    except Exception as error:
        print(f"{job.title}:\n{traceback.format_exc()}", file=sys.stderr)
        return f"{type(error).__name__}: {error}"


def _summary(row: Row) -> str:
    parts = [
        f"{length}: {scores['final']:.3f}" for length, scores in row.get("by_length", {}).items() if "final" in scores
    ]
    ended = f", {row['ended']} after {row['steps']} steps" if "ended" in row else ""
    return f"{' '.join(parts)}{ended} ({row['seconds']:.0f} s)".strip()


def hardware(device: torch.device) -> str:
    """What ran it: the GPU's name, or the CPU's kind and number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
