"""Starts the tiny run on several gloo processes, as torchrun or srun would, with a hook that makes trouble.

The processes are forked from a server that has imported everything once: a start takes tenths of a second, not ten.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 120
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.dist.preload"])


@dataclass(frozen=True)
class Rank:
    """A process of a run, and the file with everything it says."""

    process: Any
    log: Path

    def wait(self, timeout_s: float) -> int | None:
        """Exit code; None if it is still running after that time."""
        self.process.join(timeout_s)
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def announced(rank: int, size: int, port: int, *, slurm: bool = False) -> dict[str, str]:
    """What a launcher puts into the environment; `slurm`: as srun says it."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if slurm:
        return where | {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    return where | {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}


def start(
    run: Path,
    settings: dict[str, Any],
    size: int,
    *flags: str,
    trouble: dict | None = None,
    own_directories: bool = False,
    slurm: bool = False,
    collective_timeout_s: float = 60,
) -> list[Rank]:
    """One process per rank of the command line; `trouble`: {"rank", "step", "what"}."""
    port = free_port()
    base = next(path for path in run.parents if path.is_dir())
    config = base / f"{run.name}.json"
    config.write_text(json.dumps(settings))
    number, ranks = len(list(base.glob("log-*"))), []
    for rank in range(size):
        directory = f"{run}-{rank}" if own_directories else str(run)
        argv = ["--config", str(config), "--run-dir", directory, *flags]
        log = base / f"log-{number}-{rank}.txt"
        environment = announced(rank, size, port, slurm=slurm)
        process = _context.Process(
            target=rank_main, args=(argv, environment, str(log), trouble or {}, collective_timeout_s), daemon=True
        )
        process.start()
        ranks.append(Rank(process, log))
    return ranks


def finish(ranks: list[Rank], timeout_s: float = TIMEOUT_S) -> list[tuple[int, str]]:
    """Exit code and output of every rank; what hangs is killed and fails the test."""
    end = time.monotonic() + timeout_s
    try:
        codes = [rank.wait(max(0.0, end - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.process.kill()
    assert None not in codes, f"hangs: {codes}\n" + "\n".join(rank.output for rank in ranks)
    return [(code, rank.output) for code, rank in zip(codes, ranks, strict=True)]


def run_ranks(run: Path, settings: dict[str, Any], size: int, *flags: str, **how: Any) -> list[tuple[int, str]]:
    return finish(start(run, settings, size, *flags, **how))


def rank_main(argv: list[str], environment: dict[str, str], log: str, trouble: dict, timeout_s: float) -> None:
    """What each process runs: the command line, with a hook in it that makes the trouble of its rank."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    import torch

    from svdtrain import build
    from svdtrain.cli import main as svdtrain_main
    from svdtrain.trainer import distributed

    torch.set_num_threads(1)
    distributed.COLLECTIVE_TIMEOUT_S = timeout_s
    build_hooks = build.build_hooks
    build.build_hooks = lambda *args: [*build_hooks(*args), make_trouble(trouble)]  # type: ignore[assignment]
    sys.exit(svdtrain_main(argv))


def make_trouble(trouble: dict) -> Any:
    from svdtrain.trainer.hooks import Hook

    class Trouble(Hook):
        name = "trouble"

        def _now(self, state: Any, what: str) -> bool:
            whose = trouble.get("rank") in (state.world.rank, "all")
            return whose and (trouble["step"], trouble["what"]) == (state.step, what)

        def on_train_start(self, state: Any) -> None:
            """A signal to the group in the middle of an evaluation, or in the first forward, which compiles."""

            def in_forward(module: Any, *_: Any) -> None:
                if self._now(state, "signal in training" if module.training else "signal in evaluation"):
                    trouble["what"] = "done"
                    os.kill(os.getpid(), signal.SIGTERM)

            state.model.register_forward_pre_hook(in_forward)

        def on_step_start(self, state: Any) -> None:
            if self._now(state, "die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if trouble.get("others") == "sleep" and state.step == trouble["step"]:
                time.sleep(1000)
            if self._now(state, "raise"):
                raise ValueError("this rank has had enough")
            if self._now(state, "disk"):
                raise OSError(28, "No space left on device", "metrics.jsonl")
            if self._now(state, "signal"):
                os.kill(os.getpid(), signal.SIGUSR2)
            if self._now(state, "hang"):
                os.kill(os.getpid(), signal.SIGSTOP)

        def on_before_optimizer_step(self, state: Any) -> None:
            if self._now(state, "veto"):
                state.control.request_skip_step("only this rank says so")

        def on_optimizer_step_end(self, state: Any, stepped: bool) -> None:
            if self._now(state, "flip"):
                next(iter(state.model.parameters())).data.view(-1)[0] += 1e-3

    return Trouble()
