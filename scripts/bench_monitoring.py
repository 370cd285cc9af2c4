"""What the adaptive-SVD controller costs a training run: one table, every figure from one run.

    python scripts/bench_monitoring.py --depth 4 --device cpu --steps 80
    python scripts/bench_monitoring.py --depth 12 --compile --targets all --batch 32 --seq 2048 --vocab 32768

* monitoring: blocks of steps with and without it take turns; the cost is the difference of their mean step times.
* host syncs: what torch's debug mode counts in the training thread during a step with monitoring against one without.
* switching: every watched matrix enters low-rank mode in one step (stall), is recomputed while it stays there,
  and goes back (each amortised over the steps until it can come again); and how much of it is exact decompositions.
* recompiles: graphs of the compiled model before and after at least 100 switches and rank changes.
* memory: bytes added for several r/g, by kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(parent) for parent in Path(__file__).resolve().parents[:2]]

from host_syncs import counted_syncs

from svdtrain.adaptive import controller
from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.config import OptimConfig, SVDConfig
from svdtrain.model import GPT, GPTConfig, hardware_dtype
from svdtrain.optim import MuonAdamW, build_param_groups

NUM_SWITCHES = 100
RANK_SHARES = (0.9, 0.75, 0.5, 0.25, 0.1)


class Bench:
    """A model in training under a controller, and the rows of the table."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.rows: list[dict[str, Any]] = []
        self.model = build_model(arguments, self.device)
        self.forward: Any = torch.compile(self.model, dynamic=False) if arguments.compile else self.model
        self.optimizer = MuonAdamW(build_param_groups(self.model, OptimConfig()))
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.05  # far from divergence, whatever the number of steps
        self.svd = AdaptiveSVD(self.model, self.optimizer, self.config(), log=lambda line: None)
        self.step = 0
        self.cpu_inside = 0.0
        """CPU seconds of all threads spent in the controller: on a shared machine steadier than the clock."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, arguments.vocab, (arguments.batch, arguments.seq + 1), generator=generator)
        self.inputs, self.targets = (t.contiguous().to(self.device) for t in (tokens[:, :-1], tokens[:, 1:]))

    def config(self) -> SVDConfig:
        a = self.arguments
        return SVDConfig(svd_targets=a.targets, svd_interval=a.interval, svd_monitor_every=a.monitor_every)

    def train_step(self, monitored: bool) -> float:
        """One step; returns the seconds that the host spent in the controller."""
        for _ in range(self.arguments.accumulate):
            self.forward(self.inputs, self.targets).backward()
        if monitored:
            self.svd.project_gradients()
        self.optimizer.step()
        start, start_cpu = time.perf_counter(), time.process_time()
        if monitored:
            self.step += 1
            self.svd.after_step(self.step)
        inside = time.perf_counter() - start
        self.cpu_inside += time.process_time() - start_cpu
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        return inside

    def block(self, num_steps: int, monitored: bool) -> tuple[float, list[float]]:
        """Milliseconds a step over a block, the device drained at both ends; and of each step in the controller."""
        self.synchronize()
        start = time.perf_counter()
        inside = [1e3 * self.train_step(monitored) for _ in range(num_steps)]
        self.synchronize()
        return 1e3 * (time.perf_counter() - start) / num_steps, inside

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def row(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.rows.append({"name": name, "value": value, "unit": unit, "note": note})
        print(f"{name:52s} {value:12.3f} {unit:12s} {note}", flush=True)


def build_model(arguments: argparse.Namespace, device: torch.device) -> GPT:
    config = GPTConfig.from_depth(arguments.depth, vocab_size=arguments.vocab, sequence_len=arguments.seq)
    with torch.device("meta"):
        model = GPT(config, hardware_dtype(device))
    model.to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model


@contextmanager
def decided(choose: Any) -> Iterator[None]:
    """Inside, `choose(step, lowrank, r)` -> (low-rank?, r) stands in for the policy."""
    real = controller.should_use_lowrank_training

    def decide(measured: Any, thresholds: Any, *, lowrank: bool, r: int, step: int, **_: Any) -> Any:
        return *choose(step, lowrank, r), {"reason": "bench"}

    controller.should_use_lowrank_training = decide  # type: ignore[assignment]
    try:
        yield
    finally:
        controller.should_use_lowrank_training = real


def bench_cost(bench: Bench) -> None:
    """Blocks with and without monitoring in turn; whole intervals, so that every analysis is counted."""
    with decided(lambda step, lowrank, r: (False, r)):
        bench.block(3, monitored=False)
        bench.block(bench.arguments.interval, monitored=True)  # the first exact analysis of everything
        size = bench.arguments.interval if bench.device.type == "cuda" else 1
        pairs: list[tuple[float, float, list[float]]] = []
        bench.cpu_inside, start_cpu = 0.0, time.process_time()
        for _ in range(max(1, bench.arguments.steps // size)):
            pairs.append((bench.block(size, monitored=False)[0], *bench.block(size, monitored=True)))
    cpu_steps = time.process_time() - start_cpu - bench.cpu_inside
    plain, watched = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    inside = [ms for pair in pairs for ms in pair[2]]
    base = statistics.median(plain)
    spread = (max(plain) - min(plain)) / base
    bench.row("step without monitoring, median", base, "ms", f"spread {100 * spread:.0f} %")
    bench.row("step with monitoring, median", statistics.median(watched), "ms")
    bench.row("  difference of the medians", 100 * (statistics.median(watched) / base - 1), "% of a step")
    bench.row("  difference of the means", 100 * (statistics.mean(watched) / statistics.mean(plain) - 1), "% of a step")
    what = "enqueueing; the device works beside" if bench.device.type == "cuda" else "all of it"
    bench.row("host time in the controller, median", statistics.median(inside), "ms", what)
    bench.row("host time in the controller, mean", statistics.mean(inside), "ms", f"max {max(inside):.1f}")
    if bench.device.type != "cuda":
        share = 200 * bench.cpu_inside / cpu_steps  # half of the steps are monitored
        bench.row("CPU time in the controller", share, "% of a step", "all threads, mean")
    bench.row("  of the median step", 100 * statistics.mean(inside) / base, "% of a step")


def bench_syncs(bench: Bench) -> None:
    """Synchronising calls of the training thread, over one interval each."""
    if bench.device.type != "cuda":
        return
    for monitored in (False, True):
        bench.synchronize()
        with counted_syncs() as count, decided(lambda step, lowrank, r: (False, r)):
            for _ in range(bench.arguments.interval):
                bench.train_step(monitored)
        label = "with" if monitored else "without"
        bench.row(
            f"host syncs in one interval {label} monitoring", count[0], "", "training thread; see spectral/worker"
        )


@contextmanager
def timed_decompositions(bench: Bench) -> Iterator[list[float]]:
    """Inside, each batch of exact decompositions at a decision adds its milliseconds, the device drained."""
    real, spent = controller.decompose_all, []

    def decompose(matrices: Any) -> Any:
        bench.synchronize()
        start = time.perf_counter()
        outcomes = real(matrices)
        bench.synchronize()
        spent.append(1e3 * (time.perf_counter() - start))
        return outcomes

    controller.decompose_all = decompose
    try:
        yield spent
    finally:
        controller.decompose_all = real


def bench_switching(bench: Bench) -> None:
    """All watched matrices in one step to low-rank, then recomputed as often as they are when they stay, then back."""
    interval, every, num = bench.arguments.interval, bench.svd.config.recompute_every, len(bench.svd.targets)
    dwell = max(1, bench.svd.config.svd_min_dwell)  # decisions before a matrix may switch again
    events = (
        ("all to low-rank in one step: stall", 1, dwell, lambda step, lowrank, r: (True, max(8, r * 3 // 4))),
        (f"all recomputed, once in {every} decisions: stall", every, every, lambda step, lowrank, r: (True, r)),
        ("all back to full in one step", 1, dwell, lambda step, lowrank, r: (False, r)),
    )
    for name, decisions, until_next, choose in events:
        with decided(choose), timed_decompositions(bench) as decompositions:
            times = []
            while not times or bench.step % interval or len(times) <= (decisions - 1) * interval:
                bench.synchronize()
                start = time.perf_counter()
                bench.train_step(monitored=True)
                bench.synchronize()
                times.append(1e3 * (time.perf_counter() - start))
        quiet = statistics.median(times)
        stalls = [times[-1 - i * interval] - quiet for i in range(decisions)]
        bench.row(name, sum(stalls) / 1e3, "s", f"{num} matrices, {sum(stalls) / num:.1f} ms each")
        bench.row("  of it exact decompositions", sum(decompositions), "ms")
        bench.row("  of it everything else", sum(stalls) - sum(decompositions), "ms")
        per_step = sum(stalls) / (until_next * interval)
        bench.row("  amortised until the next can come", per_step, "ms/step", f"{until_next} decisions later")


def bench_recompiles(bench: Bench) -> None:
    """Graphs that the compiled model was turned into."""
    if not bench.arguments.compile:
        return
    bench.train_step(monitored=True)  # the first graph is none too many
    counted = torch._dynamo.utils.counters["stats"]
    before, changes = counted["unique_graphs"], 0
    names = list(bench.svd.targets)
    while changes < NUM_SWITCHES:
        for name in names[:: max(1, len(names) // 20)]:
            g = min(bench.svd.targets[name].W.shape)
            bench.svd.set_mode(name, (g // 2, g // 3, None)[changes % 3])
            changes += 1
        bench.train_step(monitored=True)
    after = counted["unique_graphs"]
    bench.row("model recompiles", after - before, "", f"{changes} switches and rank changes")
    for name in names:
        bench.svd.set_mode(name, None)


def bench_memory(bench: Bench) -> None:
    """Everything the controller holds, against the watched matrices themselves, for several r/g."""
    own = sum(target.W.nbytes for target in bench.svd.targets.values())
    for share in RANK_SHARES:
        for name, target in bench.svd.targets.items():
            bench.svd.set_mode(name, max(1, round(share * min(target.W.shape))))
        for _ in range(2):  # the first one only finds the bases that the second one looks with
            bench.train_step(monitored=True)
        held = bench.svd.memory_bytes()
        parts = ", ".join(f"{kind} {size / own:.2f}" for kind, size in held.items())
        state = sum(t.nbytes for s in bench.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        note = f"{parts}; whole optimizer state {state / own:.2f} (all in units of the watched matrices)"
        bench.row(f"memory added at r/g = {share}", sum(held.values()) / 2**20, "MiB", note)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=4)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true")
    add("--targets", default="attn", help="attn, mlp, all or a regular expression")
    add("--steps", type=int, default=80, help="steps with and as many without monitoring; a multiple of the interval")
    add("--interval", type=int, default=20, help="svd_interval")
    add("--monitor-every", type=int, default=1, help="svd_monitor_every")
    add("--batch", type=int, default=1, help="sequences per pass")
    add("--accumulate", type=int, default=1, help="passes over the batch per step")
    add("--seq", type=int, default=512, help="tokens per sequence")
    add("--vocab", type=int, default=4096)
    add("--only", nargs="+", default=None, help="sections: cost syncs switching recompiles memory")
    add("--out", type=Path, help="write the rows as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # as a training run does
    bench = Bench(arguments)
    on_gpu = bench.device.type == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {machine}, depth {arguments.depth}, "
        f"{arguments.accumulate} x {arguments.batch} x {arguments.seq} tokens a step, "
        f"{len(bench.svd.targets)} matrices watched every {arguments.monitor_every} steps, "
        f"interval {arguments.interval}"
    )
    sections = {
        "cost": bench_cost, "syncs": bench_syncs, "switching": bench_switching, "recompiles": bench_recompiles,
        "memory": bench_memory,
    }  # fmt: skip
    for name, section in sections.items():
        if arguments.only is None or name in arguments.only:
            section(bench)
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine, "rows": bench.rows, "argv": sys.argv[1:]}, indent=1))


if __name__ == "__main__":
    main()
