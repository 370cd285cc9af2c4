"""The real nanochat with and without monitoring, in one run, and through switches of every attention matrix.

    python scripts/bench_nanochat.py --nanochat DIR                                            one GPU
    torchrun --standalone --nproc_per_node=2 scripts/bench_nanochat.py --nanochat DIR          several GPUs

nanochat's own script trains; between steps this one turns the monitoring of every step on and off in turn, block by
block, so that one process measures both. Then every watched matrix goes to low-rank mode, changes its rank a few
times and comes back. Needs no network: documents and a tokenizer are made up. Packages that nanochat
imports and this run does not use are replaced by empty ones where they are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OPTIONAL = ("wandb", "requests", "yaml", "filelock", "jinja2", "tokenizers", "rustbpe")
VOCAB_SIZE = 32768
NEVER = 10_000_000


class Placeholder:
    """Stands for any name of a missing package; may be made, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class EmptyModule(ModuleType):
    """Stands for a missing package."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder


def fill_gaps() -> list[str]:
    """Put empty modules in the place of missing optional packages; returns their names."""
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    for name in missing:
        sys.modules[name] = EmptyModule(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    return missing


def make_base(path: Path) -> None:
    """Random documents and a tokenizer of byte pairs, once; other ranks wait for it."""
    ready = path / "ready"
    if int(os.environ.get("RANK", "0")) == 0 and not ready.exists():
        _write_base(path)
        ready.touch()
    while not ready.exists():
        time.sleep(0.2)
    os.environ["NANOCHAT_BASE_DIR"] = str(path)


def _write_base(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nanochat_patch.weights import write_nanochat_tokenizer
    from svdtrain.data.tokenizer import SPECIAL_TOKENS, Tokenizer

    printable = [*range(32, 127)]
    order = [*printable, *(byte for byte in range(256) if byte not in printable)]
    pairs = islice((bytes(pair) for pair in product(order, repeat=2)), VOCAB_SIZE - 256 - len(SPECIAL_TOKENS))
    write_nanochat_tokenizer(Tokenizer([*(bytes([b]) for b in range(256)), *pairs]), path / "tokenizer")
    shards = path / "base_data"
    shards.mkdir(parents=True)
    draw = random.Random(0)
    for index in range(3):
        texts = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz      ,.\n", k=9000)) for _ in range(2000)]
        pq.write_table(pa.table({"text": texts}), shards / f"shard_{index:05d}.parquet", row_group_size=500)
    (path / "base_data_climbmix").symlink_to(shards.name)


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


def plan(arguments: argparse.Namespace) -> list[Block]:
    """Warm-up, the measured blocks in turn, then the switches."""
    steps = arguments.block_steps
    blocks = [Block(name="warm-up", num_steps=arguments.warmup_steps, watching=True)]
    for _ in range(arguments.repeats):
        blocks.append(Block(name="off", num_steps=steps))
        blocks.append(Block(name="watched", num_steps=steps, watching=True))
    blocks.append(Block(name="to low-rank", num_steps=2, action="lowrank"))
    blocks.append(Block(name="low-rank, off", num_steps=steps))
    blocks.append(Block(name="low-rank, watched", num_steps=steps, watching=True))
    blocks += [Block(name="new rank", num_steps=2, action="rank") for _ in range(arguments.rank_changes)]
    blocks.append(Block(name="to full", num_steps=2, action="full"))
    blocks.append(Block(name="off", num_steps=steps))
    return blocks


class Bench:
    """Sits on the optimizer's hooks behind the session's own and follows the plan."""

    def __init__(self, session: Any, blocks: list[Block]) -> None:
        self.session = session
        self.schedule: Iterator[tuple[Block, bool]] = iter([(b, i == 0) for b in blocks for i in range(b.num_steps)])
        self.block = blocks[0]
        self.seconds: dict[str, list[tuple[float, bool]]] = {}
        self.num_changes = 0
        self.acting_seconds: list[float] = []
        self.graphs: list[int] = []
        self._was: tuple[str, bool] | None = None
        self._not_its_own = 0.0  # seconds of the last step that belong to a change made in it

    def attach(self, optimizer: Any) -> None:
        """After the session has attached."""
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)
        self.prepare_next()

    def before_step(self, *_: Any) -> None:
        """nanochat has timed the step before this one."""
        if self._was is not None:
            name, analysed = self._was
            seconds = float(vars(sys.modules["__main__"])["dt"]) - self._not_its_own
            self.seconds.setdefault(name, []).append((seconds, analysed))
            self._not_its_own = 0.0

    def after_step(self, *_: Any) -> None:
        """Remember what this step was, and set up the next."""
        svd = self.session.svd
        self._was = (self.block.name, self.block.watching and (svd.step - 1) % svd.config.svd_interval == 0)
        if self.block.name != "warm-up":
            self.graphs.append(compiled_graphs())
        self.prepare_next()

    def prepare_next(self) -> None:
        """Settings of the coming step."""
        following = next(self.schedule, None)
        if following is None:
            raise Done
        self.block, first = following
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


def figures(bench: Bench, arguments: argparse.Namespace, torn: list[str]) -> dict[str, Any]:
    """Tokens per second by block, relative to the blocks without analyses."""
    rows = {}
    for name, times in bench.seconds.items():
        seconds = [s for s, _ in times]
        analysed = [s for s, was in times if was]
        rows[name] = {
            "steps": len(seconds),
            "tokens_per_second": arguments.total_batch_size / statistics.fmean(seconds),
            "median_step_ms": 1000 * statistics.median(seconds),
            "median_analysis_step_ms": 1000 * statistics.median(analysed) if analysed else None,
        }
    base = rows["off"]["tokens_per_second"]
    for row in rows.values():
        row["relative"] = row["tokens_per_second"] / base
    return {
        "blocks": rows,
        "num_targets": len(bench.session.svd.targets),
        "num_changes": bench.num_changes,
        "ms_per_change": 1000 * sum(bench.acting_seconds) / bench.num_changes,
        "recompiles": bench.graphs[-1] - bench.graphs[0],
        "tensors_that_differ_between_ranks": torn,
        "peak_memory_gib": peak_memory_gib(),
    }


def peak_memory_gib() -> float:
    """On the GPU, of this process."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def show(result: dict[str, Any]) -> None:
    """One table."""
    print(f"\n{'block':<22}{'steps':>6}{'tok/s':>12}{'of off':>9}{'step ms':>10}{'analysis ms':>13}")
    for name, row in result["blocks"].items():
        analysis = row["median_analysis_step_ms"]
        shown = f"{analysis:>13.1f}" if analysis is not None else " " * 13
        print(
            f"{name:<22}{row['steps']:>6}{row['tokens_per_second']:>12,.0f}{row['relative']:>9.4f}"
            f"{row['median_step_ms']:>10.1f}{shown}"
        )
    for key, value in result.items():
        if key != "blocks":
            print(f"{key}: {value}")


def main() -> None:
    """Entry point."""
    arguments = parse()
    missing = fill_gaps()
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 and missing:
        print(f"not installed, empty here: {', '.join(missing)}")
    base = Path(arguments.work or Path(tempfile.gettempdir(), f"bench-nanochat-{os.getppid()}")).resolve()
    make_base(base)
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

    from nanochat_patch import launch, options, ranks
    from svdtrain.config import SVDConfig

    where = options.Launch(nanochat=arguments.nanochat, run_dir=str(base / "run"))
    svd = SVDConfig(svd_targets=arguments.targets, svd_interval=arguments.interval, svd_switching=False)
    arguments.json = str(Path(arguments.json).resolve()) if arguments.json else ""
    mixer = options.MixerConfig(mixer=arguments.mixer, mixer_pattern=arguments.mixer_pattern)
    session = launch.prepare(options.Options(launch=where, svd=svd, mixer=mixer))
    bench = Bench(session, plan(arguments))
    built = session.optimizer_built
    models = []

    def optimizer_built(model: Any, setup_name: str, result: Any) -> None:
        built(model, setup_name, result)
        bench.attach(result[-1] if isinstance(result, (list, tuple)) else result)
        models.append(model)

    session.optimizer_built = optimizer_built  # type: ignore[method-assign]
    from nanochat.gpt import GPT  # type: ignore[import-not-found]

    flags = train_flags(arguments, hasattr(GPT, "setup_optimizer"))
    session.options = dataclasses.replace(session.options, base_train=tuple(flags))
    with contextlib.suppress(Done):
        launch.run_script(session)
    result = figures(bench, arguments, ranks.differing(dict(models[0].named_parameters())))
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()
