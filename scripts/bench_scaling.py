#!/usr/bin/env python3
"""What several devices give, and what saving takes: the real trainer on random tokens, on one device and then on two.

    python scripts/bench_scaling.py --depth 12 --json scaling.json                        on a machine with two GPUs
    python scripts/bench_scaling.py --depth 2 --device cpu --seq 64 --micro-batch 2 --tokens-per-device 256 \\
        --vocab 512 --steps 20 --warmup 20 --switch-steps 40                              two gloo processes

* throughput: tokens a second with equal work per device; scaling = T(2) / (2 T(1)). Monitoring is on, as in a run.
* saving: the time that a window of steps with one asynchronous save takes longer than the same number of steps
  without; divided by the time of 1,000 steps.
* ranks: 100 steps in which matrices change mode every few steps, by hand and by the policy; then every rank's weights
  and optimizer state are hashed and must be the same.

Needs torch, numpy, safetensors, tiktoken and rich. Every process is started here, without torchrun.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from random_tokens import random_data, write_tokens
from rich.console import Console
from torch import Tensor

from svdtrain import build
from svdtrain.config import RunConfig, defaults_for_depth, merge_settings
from svdtrain.hooks.adaptive_svd import AdaptiveSVDHook
from svdtrain.trainer.distributed import close_world
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import TrainState

INTERVAL = 20  # svd_interval: windows are whole multiples, so that each has its share of analyses
STEPS_PER_SAVE = 1000


class Clock:
    """Milliseconds of a span of a step: between events on a GPU, so that the host may run ahead, else on the wall."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._begun: Any = None

    def begin(self) -> None:
        self._begun = self._now()

    def end(self) -> None:
        self._spans.append((self._begun, self._now()))

    def median_ms(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
            return statistics.median(a.elapsed_time(b) for a, b in self._spans)
        return statistics.median(1e3 * (b - a) for a, b in self._spans)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Bench(Hook):
    """Warm-up, timed steps, saves, switches: decided by step numbers and agreed saves alone, so equal on all ranks."""

    name = "bench"
    priority = Priority.SINK

    def __init__(
        self, options: argparse.Namespace, device: torch.device, averager: Any, keep: Callable[[dict[str, Any]], None]
    ) -> None:
        """keep: called with what is measured so far, whenever there is more."""
        self.options, self.device, self._averager_of, self._keep = options, device, averager, keep
        self.result: dict[str, Any] = {}
        self.exchange, self.optimizer = Clock(device), Clock(device)
        self._phase, self._until, self._started_at, self._started = "warmup", options.warmup, 0, 0.0
        self._saves: list[dict[str, float]] = []
        self._saved = False
        self._last = 0.0

    def on_train_start(self, state: TrainState) -> None:
        averager = self._averager_of()
        finish = averager.finish

        def timed_finish(loss: Tensor) -> None:
            self.exchange.begin()
            finish(loss)
            self.exchange.end()

        averager.finish = timed_finish

    def on_before_optimizer_step(self, state: TrainState) -> None:
        self.optimizer.begin()

    def on_optimizer_step_end(self, state: TrainState, stepped: bool) -> None:
        self.optimizer.end()

    def on_checkpoint_saved(self, state: TrainState, path: str) -> None:
        self._saved = True
        if self._phase == "saving":
            self._saves[-1]["durable_after_s"] = time.perf_counter() - self._started
            self._saves[-1]["gib"] = sum(p.stat().st_size for p in Path(path).iterdir()) / 2**30

    def on_step_end(self, state: TrainState) -> None:
        if self._phase == "saving" and state.step == self._started_at + 1:
            self._saves[-1]["first_step_s"] = time.perf_counter() - self._started
        if self._phase == "switching" and state.step % 5 == 0:
            self._switch_by_hand(state)
        whole = (state.step - self._started_at) % INTERVAL == 0
        over = whole and self._saved if self._phase == "saving" else state.step >= self._until
        if over:
            self._close_phase(state)

    def _close_phase(self, state: TrainState) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed, steps = time.perf_counter() - self._started, state.step - self._started_at
        if self._phase == "warmup":
            self.exchange, self.optimizer = Clock(self.device), Clock(self.device)
            self._open("timed", state, self.options.steps)
        elif self._phase == "timed":
            self._report_throughput(state, elapsed / steps)
            self._keep(self.result)
            if self.options.only_speed:
                state.control.request_stop("bench")
            else:
                self._open_save(state)
        elif self._phase == "saving":
            self._saves[-1] |= {"steps": steps, "lost_ms": 1e3 * (elapsed - steps * self.result["step_s"])}
            if len(self._saves) < self.options.saves:
                self._open_save(state)
            else:
                self._report_saves()
                self._keep(self.result)
                self._let_policy_switch(state)
                self._open("switching", state, self.options.switch_steps)
        else:
            state.control.request_stop("bench")

    def _open(self, phase: str, state: TrainState, steps: int = 0) -> None:
        self._phase, self._started_at, self._until = phase, state.step, state.step + steps
        self._started = time.perf_counter()

    def _open_save(self, state: TrainState) -> None:
        self._saves.append({})
        self._saved = False
        self._open("saving", state)
        state.control.request_save("bench")

    def _report_throughput(self, state: TrainState, step_s: float) -> None:
        self.result |= {
            "world_size": state.world.size,
            "step_s": step_s,
            "tokens_per_s": state.config.train.total_batch_size / step_s,
            "mfu_percent": state.metrics.get("train/mfu", 0.0),
            "exchange_ms": self.exchange.median_ms(),
            "optimizer_ms": self.optimizer.median_ms(),
        }

    def _report_saves(self) -> None:
        lost = statistics.median(save["lost_ms"] for save in self._saves)
        share = lost / (1e3 * STEPS_PER_SAVE * self.result["step_s"])
        self.result |= {"saves": self._saves, "save_lost_ms": lost, "save_cost_percent_per_1000_steps": 100 * share}

    def _let_policy_switch(self, state: TrainState) -> None:
        controller = self._svd(state).running
        controller.config = dataclasses.replace(controller.config, svd_switching=True)

    def _switch_by_hand(self, state: TrainState) -> None:
        """The next few matrices in turn: to low-rank mode, or back."""
        svd = self._svd(state)
        targets = list(svd.running.targets.values())
        turn = state.step // 5
        for target in targets[turn % 4 :: 4]:
            svd.switch(state, target.name, "full" if target.lowrank else "lowrank", reason="bench")

    def _svd(self, state: TrainState) -> AdaptiveSVDHook:
        return next(hook for hook in state.engine.hooks if isinstance(hook, AdaptiveSVDHook))


def settings(options: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """The defaults of the depth, at the same number of tokens for every device."""
    train = {
        "device_batch_size": options.micro_batch,
        "total_batch_size": options.tokens_per_device * world_size,
        "num_iterations": 100_000,  # the bench ends before
        "eval_every": 0,
        "eval_tokens": options.micro_batch * options.seq * world_size,
        "save_every": 0,
        "device": options.device,
        "check_ranks_every": INTERVAL,
    }
    over = {
        "model": {"vocab_size": options.vocab, "max_seq_len": options.seq},
        "train": train,
        "svd": {"svd_interval": INTERVAL, "svd_switching": False, "svd_rule": "original"},
    }
    # All at a small learning rate: random tokens are no reason to diverge in the middle of a measurement.
    rates = {"matrix_lr": 0.002, "embedding_lr": 0.03, "unembedding_lr": 0.0008, "scalar_lr": 0.05}
    return merge_settings(defaults_for_depth(options.depth), over | {"optim": rates})


def worker(options: argparse.Namespace) -> None:
    """One rank: the whole run, then the comparison of the ranks; rank 0 writes what was measured."""
    warnings.simplefilter("ignore")
    directory, world_size = Path(options.worker), int(os.environ.get("WORLD_SIZE", "1"))
    if options.device == "cpu":
        torch.set_num_threads(1)
    build.prepare_data = lambda config, world, console: random_data(directory, options.vocab)  # type: ignore[assignment]
    config = RunConfig.from_dict(settings(options, world_size))
    trainer = build.build_trainer(config, directory / f"run-{world_size}", Console(file=io.StringIO()))
    path = directory / f"result-{world_size}.json"

    def keep(result: dict[str, Any]) -> None:
        if trainer.state.world.is_main:
            path.write_text(json.dumps(result))

    bench = Bench(options, trainer.state.device, lambda: trainer._gradients, keep)
    trainer.engine.hooks.append(bench)
    trainer.fit()
    state = trainer.state
    digests: list[Any] = [digest(state)]
    if world_size > 1:
        digests = [None] * world_size
        dist.all_gather_object(digests, digest(state), group=state.world.control_group)
    result = bench.result | {
        "digests": digests,
        "ranks_identical": len(set(digests)) == 1 and state.stop_reason == "bench",
        "stop_reason": state.stop_reason,
        "switch_steps": options.switch_steps,
        "switches": sum(target.num_switches for target in bench._svd(state).running.targets.values()),
        "matrices": len(bench._svd(state).running.targets),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "machine": machine(state.device),
    }
    keep(result)
    close_world(state.world)


def digest(state: TrainState) -> str:
    """sha256 of every trained parameter and its optimizer state, in order."""
    total = hashlib.sha256()
    for name, parameter in sorted(state.trainable_parameters().items()):
        moments = state.optimizer.state.get(parameter, {})
        for key, tensor in [(name, parameter), *sorted(moments.items(), key=lambda item: item[0])]:
            total.update(f"{key}{tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def machine(device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread a process"
    return f"{where}, torch {torch.__version__}"


def start(world_size: int, directory: Path, argv: list[str], timeout_s: float) -> dict[str, Any]:
    """Run all ranks of one world. What takes too long is cut off, and what it had measured is returned; raises
    RuntimeError with the last words of a rank that failed."""
    result = directory / f"result-{world_size}.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    logs = [directory / f"log-{world_size}-{rank}.txt" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        env = dict(os.environ)
        if world_size > 1:
            env |= {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, *argv, "--worker", str(directory)]
        with open(log, "w") as file:
            processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
    try:
        end = time.monotonic() + timeout_s
        codes = [process.wait(max(1.0, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [] if result.exists() else [f"cut off after {timeout_s:.0f} s"] * world_size
        print(f"{world_size} device(s): cut off after {timeout_s:.0f} s", flush=True)
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        said = "\n".join(log.read_text()[-3000:] for log, code in zip(logs, codes, strict=True) if code)
        raise RuntimeError(f"{world_size} device(s): exit codes {codes}\n{said}")
    return json.loads(result.read_text())


def show(results: dict[str, Any]) -> None:
    for key in ("one", "many"):
        row = results[key]
        print(
            f"{row['world_size']} device(s): {row['tokens_per_s']:11,.0f} tokens/s  step {1e3 * row['step_s']:8.1f} ms "
            f"MFU {row['mfu_percent']:5.1f} %  exchange {row['exchange_ms']:6.2f} ms  optimizer "
            f"{row['optimizer_ms']:6.2f} ms"
        )
    many = results["many"]
    print(f"scaling {100 * results['scaling']:.2f} %")
    if "save_lost_ms" not in many or "ranks_identical" not in many:
        print("cut off before everything was measured: give it a longer --timeout-s")
        return
    print(
        f"a save loses {many['save_lost_ms']:.1f} ms = {many['save_cost_percent_per_1000_steps']:.3f} % of 1,000 steps"
    )
    print(
        f"ranks {'identical' if many['ranks_identical'] else 'DIFFER'} after {many['switch_steps']} steps with "
        f"{many['switches']} switches of {many['matrices']} matrices ({many['stop_reason']})"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=12)
    add("--devices", type=int, default=2, help="compare one device with this many")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seq", type=int, default=2048, help="tokens per sequence")
    add("--micro-batch", type=int, default=32, help="sequences per forward pass")
    add("--tokens-per-device", type=int, default=262_144, help="per step: half of the usual batch of 524,288")
    add("--vocab", type=int, default=32768)
    add("--warmup", type=int, default=40, help="steps before timing, the compiling ones included")
    add("--steps", type=int, default=60, help="timed steps; a multiple of 20")
    add("--saves", type=int, default=3)
    add("--switch-steps", type=int, default=100)
    add("--timeout-s", type=float, default=280.0, help="for each number of devices")
    add("--json", type=Path)
    add("--only-speed", action="store_true", help=argparse.SUPPRESS)
    add("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    argv = sys.argv[1:]
    options = parse(argv)
    if options.worker:
        worker(options)
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as temporary:
        directory = Path(temporary)
        write_tokens(directory, options.vocab)
        one = start(1, directory, [*argv, "--only-speed"], options.timeout_s)  # the rest is asked of all devices
        print(f"one device: {one['tokens_per_s']:,.0f} tokens/s", flush=True)
        many = start(options.devices, directory, argv, options.timeout_s)
    scaling = many["tokens_per_s"] / (options.devices * one["tokens_per_s"])
    results = {"settings": {k: str(v) for k, v in vars(options).items()}, "scaling": scaling, "one": one, "many": many}
    show(results)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if many.get("ranks_identical") else 1


if __name__ == "__main__":
    sys.exit(main())
