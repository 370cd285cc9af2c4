"""Starts the tiny run on several gloo processes, as torchrun or srun would, with a hook that makes trouble."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int, *, slurm: bool = False, collective_timeout_s: float = 60) -> dict:
    """What a launcher announces; `slurm`: as srun says it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONWARNINGS": "default"}
    env["SVDTRAIN_COLLECTIVE_TIMEOUT_S"] = str(collective_timeout_s)
    if slurm:
        return env | {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    return env | {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}


def start(
    run: Path,
    settings: dict[str, Any],
    size: int,
    *flags: str,
    trouble: dict | None = None,
    own_directories: bool = False,
    **announced: Any,
) -> list[subprocess.Popen]:
    """One process per rank of `python -m tests.dist.ranks`; `trouble`: {"rank", "step", "what"}."""
    port = free_port()
    run.parent.mkdir(parents=True, exist_ok=True)
    config = run.parent / f"{run.name}.json"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "tests.dist.ranks", json.dumps(trouble or {}), "--config", str(config)]
    command += ["--run-dir", str(run), *flags]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(
            [
                token.replace(str(run), f"{run}-{rank}") if own_directories and token == str(run) else token
                for token in command
            ],
            env=environment(rank, size, port, **announced),
            **pipes,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen], timeout_s: float = TIMEOUT_S) -> list[tuple[int, str]]:
    """Exit code and output of every rank; what hangs is killed and fails the test."""
    results = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout_s)
            results.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
    return results


def run_ranks(run: Path, settings: dict[str, Any], size: int, *flags: str, **how: Any) -> list[tuple[int, str]]:
    return finish(start(run, settings, size, *flags, **how))


def main() -> int:
    """What each process runs: the command line, with a hook in it that makes the trouble of its rank."""
    import svdtrain.build as build
    from svdtrain.cli import main as svdtrain_main
    from svdtrain.trainer.hooks import Hook

    trouble = json.loads(sys.argv[1])

    class Trouble(Hook):
        name = "trouble"

        def _now(self, state: Any, what: str) -> bool:
            where = (trouble.get("rank"), trouble.get("step"), trouble.get("what"))
            return where == (state.world.rank, state.step, what)

        def on_step_start(self, state: Any) -> None:
            if self._now(state, "die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self._now(state, "raise"):
                raise ValueError("this rank has had enough")
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

    build_hooks = build.build_hooks
    build.build_hooks = lambda *args: [*build_hooks(*args), Trouble()]  # type: ignore[assignment]
    return svdtrain_main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
