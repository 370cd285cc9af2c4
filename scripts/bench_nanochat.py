"""The real nanochat with and without monitoring, in one run, and through switches of every attention matrix.

    python scripts/bench_nanochat.py --nanochat DIR                                            one GPU
    torchrun --standalone --nproc_per_node=2 scripts/bench_nanochat.py --nanochat DIR          several GPUs

nanochat's own script trains; between steps this one turns the monitoring of every step on and off in turn, block by
block, so that one process measures both: a watched block lies between two that are not, and the mean and the median of
its steps are divided by those of all such blocks. Then every watched matrix goes to low-rank mode, changes its rank a
few times and comes back. Needs no network: documents and a tokenizer are made up. Packages that nanochat imports and
this run does not use are replaced by empty ones where they are missing.

Without GPUs, to see that it works and that ranks agree (over gloo; TORCHDYNAMO_DISABLE=1 saves minutes of compiling):
    --device-type cpu --depth 2 --max-seq-len 64 --device-batch-size 2 --total-batch-size 256 --vocab-size 512
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(parent) for parent in Path(__file__).resolve().parents[:2]]

from offline_nanochat import fill_gaps, make_base

NEVER = 10_000_000


class Done(Exception):
    """Everything is measured; nothing needs saving."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Some steps in a row with one setting."""

    name: str
    num_steps: int
    watching: bool = False
    """Whether every matrix is looked at in every step."""
    action: str = ""
    """What is done to every matrix before the first step: lowrank, rank, full."""


@dataclasses.dataclass(kw_only=True)
class Measured:
    """Times of one block."""

    name: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of each step; the last one of a run is not timed."""
    analysis_seconds: list[float] = dataclasses.field(default_factory=list)
    """Of the steps with a decision."""


def plan(arguments: argparse.Namespace) -> list[Block]:
    """Warm-up, the measured blocks in turn, then the switches."""
    off, watched = (
        Block(name=name, num_steps=arguments.block_steps, watching=name == "watched") for name in ("off", "watched")
    )
    return [
        Block(name="warm-up", num_steps=arguments.warmup_steps, watching=True),
        *[off, watched] * arguments.repeats,
        off,
        Block(name="to low-rank", num_steps=2, action="lowrank"),
        *[Block(name="new rank", num_steps=2, action="rank")] * arguments.rank_changes,
        dataclasses.replace(watched, name="low-rank, watched"),
        dataclasses.replace(off, name="low-rank, off"),
        Block(name="to full", num_steps=2, action="full"),
    ]


class Bench:
    """Sits on the optimizer's hooks behind the session's own and follows the plan."""

    def __init__(self, session: Any, blocks: list[Block], max_seconds: float) -> None:
        self.session = session
        self.schedule: Iterator[tuple[Block, bool]] = iter([(b, i == 0) for b in blocks for i in range(b.num_steps)])
        self.deadline = time.monotonic() + max_seconds if max_seconds else math.inf
        self.block = blocks[0]
        self.measured: list[Measured] = []
        self.num_changes = 0
        self.acting_seconds: list[float] = []
        self.graphs: list[int] = []
        self._was: tuple[Measured, bool] | None = None
        self._not_its_own = 0.0  # seconds of the last step that belong to a change made in it

    def attach(self, optimizer: Any) -> None:
        """After the session has attached."""
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)
        self.prepare_next()

    def before_step(self, *_: Any) -> None:
        """nanochat has timed the step before this one."""
        if self._was is not None:
            block, analysed = self._was
            seconds = float(vars(sys.modules["__main__"])["dt"]) - self._not_its_own
            block.seconds.append(seconds)
            if analysed:
                block.analysis_seconds.append(seconds)
            self._not_its_own = 0.0

    def after_step(self, *_: Any) -> None:
        """Remember what this step was, and set up the next."""
        svd = self.session.svd
        self._was = (self.measured[-1], self.block.watching and (svd.step - 1) % svd.config.svd_interval == 0)
        if self.block.name != "warm-up":
            self.graphs.append(compiled_graphs())
        self.prepare_next()

    def prepare_next(self) -> None:
        """Settings of the coming step."""
        following = next(self.schedule, None)
        if following is None or (following[1] and out_of_time(self.deadline)):
            raise Done
        self.block, first = following
        if first:
            self.measured.append(Measured(name=self.block.name))
        self.session.svd.watching = self.block.watching
        if first and self.block.action:
            started = now()
            self.act(self.block.action)
            self._not_its_own = now() - started
            self.acting_seconds.append(self._not_its_own)

    def act(self, action: str) -> None:
        """Move every watched matrix."""
        svd = self.session.svd
        for name, target in svd.targets.items():
            g = min(target.W.shape)
            before = target.num_free_directions
            r = {"lowrank": g // 2, "rank": max(8, before - g // 16), "full": None}[action]
            svd.set_mode(name, r)
            self.num_changes += 1


def out_of_time(deadline: float) -> bool:
    """Whether it has passed for any rank."""
    import torch
    import torch.distributed as dist

    late = time.monotonic() > deadline
    if math.isinf(deadline) or not dist.is_initialized():
        return late
    device = "cuda" if torch.cuda.is_available() else "cpu"
    anywhere = torch.tensor(int(late), device=device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return bool(anywhere)


def now() -> float:
    """Seconds, once the device has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compiled_graphs() -> int:
    """Graphs that dynamo has compiled so far, the optimizer's included."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanochat", required=True, help="checkout")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--device-batch-size", type=int, default=32)
    parser.add_argument("--total-batch-size", type=int, default=524288, help="tokens per step")
    parser.add_argument("--interval", type=int, default=20, help="svd_interval: steps between decisions")
    parser.add_argument("--block-steps", type=int, default=20, help="a multiple of the interval")
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rank-changes", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--max-seconds", type=float, default=0, help="begin no block later than this; 0: no limit")
    parser.add_argument("--targets", default="attn")
    parser.add_argument("--mixer", default="attention", help="state-space mixer in attention's place")
    parser.add_argument("--mixer-pattern", default="M", help="layers with the mixer (M) and with attention (A)")
    parser.add_argument("--device-type", default="", help="cpu, cuda; default: what nanochat finds")
    parser.add_argument("--work", default="", help="directory for the made-up data, kept; default: a temporary one")
    parser.add_argument("--json", default="", help="write the figures to this file")
    return parser.parse_args()


def train_flags(arguments: argparse.Namespace, one_optimizer: bool) -> list[str]:
    """Flags of base_train: no evaluation, no saving, full attention windows (others need kernels from the network)."""
    settings: dict[str, object] = {
        "depth": arguments.depth,
        "max-seq-len": arguments.max_seq_len,
        "device-batch-size": arguments.device_batch_size,
        "total-batch-size": arguments.total_batch_size,
        "num-iterations": NEVER,
        "core-metric-every": -1,
        "eval-tokens": arguments.device_batch_size * arguments.max_seq_len * int(os.environ.get("WORLD_SIZE", "1")),
    }
    if arguments.device_type:
        settings["device-type"] = arguments.device_type
    if one_optimizer:
        settings |= {"eval-every": -1, "sample-every": -1, "window-pattern": "L"}
        return [f"--{name}={value}" for name, value in settings.items()]
    settings |= {"eval-every": NEVER, "sample-every": NEVER}
    return [f"--{name.replace('-', '_')}={value}" for name, value in settings.items()]


BASES = {"off": "off", "watched": "off", "low-rank, off": "off", "low-rank, watched": "low-rank, off"}
"""A kind of block: the kind whose steps it is measured against (itself: its blocks one by one show the noise)."""


def figures(bench: Bench, arguments: argparse.Namespace, torn: list[str]) -> dict[str, Any]:
    """Times by kind of block and block by block, what switching cost, and whether the ranks agree."""
    measured = [block for block in bench.measured if block.seconds]
    names = list(dict.fromkeys(block.name for block in measured))
    kinds = {name: [block for block in measured if block.name == name] for name in names}
    return {
        "blocks": {name: row(blocks, kinds.get(BASES.get(name, ""), []), arguments) for name, blocks in kinds.items()},
        "each_block": [(b.name, statistics.fmean(b.seconds), statistics.median(b.seconds)) for b in measured],
        "num_steps": sum(len(block.seconds) for block in measured) + 1,
        "num_targets": len(bench.session.svd.targets),
        "num_changes": bench.num_changes,
        "ms_per_change": 1000 * sum(bench.acting_seconds) / max(1, bench.num_changes),
        # none at all where compiling is off
        "recompiles": bench.graphs[-1] - bench.graphs[0] if bench.graphs and bench.graphs[-1] else None,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "tensors_that_differ_between_ranks": torn,
        "steps_at_which_ranks_differed": steps_with_torn_ranks(bench.session.records.path),
        "peak_memory_gib": peak_memory_gib(),
    }


def row(blocks: list[Measured], base: list[Measured], arguments: argparse.Namespace) -> dict[str, Any]:
    """Of one kind. Relative figures are speeds: 0.99 is 1 % slower than all steps of the base's blocks together. Of the
    blocks one by one the slowest and the fastest are given, so that one noisy block can be seen."""
    seconds, own = [[s for block in some for s in block.seconds] for some in (base, blocks)]
    analyses = [s for block in blocks for s in block.analysis_seconds]
    result: dict[str, Any] = {
        "num_blocks": len(blocks),
        "steps": len(own),
        "tokens_per_second": arguments.total_batch_size / statistics.fmean(own),
        "mean_step_ms": 1000 * statistics.fmean(own),
        "median_step_ms": 1000 * statistics.median(own),
        "median_analysis_step_ms": 1000 * statistics.median(analyses) if analyses else None,
    }
    for name, middle in (("mean", statistics.fmean), ("median", statistics.median)):
        each = [middle(seconds) / middle(block.seconds) for block in blocks] if seconds else []
        result[f"relative_{name}"] = middle(seconds) / middle(own) if seconds else None
        result[f"relative_{name}_of_blocks"] = [min(each), max(each)] if each else None
    return result


def steps_with_torn_ranks(run_dir: Path) -> list[int]:
    """What the check at each analysis has found; rank 0 writes it down."""
    from svdtrain.runlog import read_records

    records = read_records(run_dir / "metrics.jsonl") if int(os.environ.get("RANK", "0")) == 0 else []
    return [record["step"] for record in records if record.get("rule") == "ranks_differ"]


def peak_memory_gib() -> float:
    """On the GPU, of this process."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def show(result: dict[str, Any]) -> None:
    """A table, then the rest."""
    columns = f"{'tok/s':>10}{'mean ms':>9}{'median':>9}{'analysis':>9}"
    print(f"\n{'block':<18}{'steps':>6}{columns}  {'speed by means (blocks)':<25}{'by medians (blocks)':<25}of")
    for name, row in result["blocks"].items():
        analysis = row["median_analysis_step_ms"]
        print(
            f"{name:<18}{row['steps']:>6}{row['tokens_per_second']:>10,.0f}{row['mean_step_ms']:>9.1f}"
            f"{row['median_step_ms']:>9.1f}" + (f"{analysis:>9.1f}" if analysis is not None else " " * 9) + "  "
            f"{spread(row, 'mean'):<25}{spread(row, 'median'):<25}{BASES.get(name, '')}"
        )
    for key, value in result.items():
        if key != "each_block" and key != "blocks":
            print(f"{key}: {value}")


def spread(row: dict[str, Any], kind: str) -> str:
    """0.9950 (0.9931-0.9969)."""
    if row[f"relative_{kind}"] is None:
        return "-"
    low, high = row[f"relative_{kind}_of_blocks"]
    return f"{row[f'relative_{kind}']:.4f} ({low:.4f}-{high:.4f})"


def main() -> None:
    """Entry point."""
    arguments = parse()
    missing = fill_gaps()
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 and missing:
        print(f"not installed, empty here: {', '.join(missing)}")
    base = Path(arguments.work or Path(tempfile.gettempdir(), f"bench-nanochat-{os.getppid()}")).resolve()
    make_base(base, arguments.vocab_size)
    try:
        result = measure(arguments, base)
    finally:
        if not arguments.work and rank == 0:
            shutil.rmtree(base, ignore_errors=True)
    if rank == 0:
        show(result)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


def measure(arguments: argparse.Namespace, base: Path) -> dict[str, Any]:
    """Run nanochat's script through the plan."""
    import torch.distributed as dist

    from nanochat_patch import gloo, launch, options, ranks
    from svdtrain.config import SVDConfig

    where = options.Launch(nanochat=arguments.nanochat, run_dir=str(base / "run"))
    svd = SVDConfig(svd_targets=arguments.targets, svd_interval=arguments.interval, svd_switching=False)
    arguments.json = str(Path(arguments.json).resolve()) if arguments.json else ""
    mixer = options.MixerConfig(mixer=arguments.mixer, mixer_pattern=arguments.mixer_pattern)
    session = launch.prepare(options.Options(launch=where, svd=svd, mixer=mixer))
    if arguments.device_type == "cpu" and "WORLD_SIZE" in os.environ:
        gloo.start()  # nanochat does it on GPUs only
    bench = Bench(session, plan(arguments), arguments.max_seconds)
    built = session.optimizer_built
    models = []

    def optimizer_built(model: Any, setup_name: str, result: Any) -> None:
        built(model, setup_name, result)
        bench.attach(result[-1] if isinstance(result, (list, tuple)) else result)
        models.append(model)

    session.optimizer_built = optimizer_built  # type: ignore[method-assign]
    from nanochat.gpt import GPT  # type: ignore[import-not-found]

    one_optimizer = hasattr(GPT, "setup_optimizer")
    flags = train_flags(arguments, one_optimizer)
    session.options = dataclasses.replace(session.options, base_train=tuple(flags))
    with contextlib.suppress(Done):
        launch.run_script(session)
    result = figures(bench, arguments, ranks.differing(dict(models[0].named_parameters())))
    result["num_optimizers"] = 1 if one_optimizer else 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()
