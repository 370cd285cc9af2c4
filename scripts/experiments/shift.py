"""A planned shift from text A to text B with known onset, in both orders: what keeps A, and what saw the harm coming.

    python scripts/experiments/shift.py --data DIR --device cuda --parallel 4 --out docs/results/shift.json

DIR: parquet shards with a column `source`. Each seed trains once on A; every arm goes on from that checkpoint, so arms
differ from the onset on only. Arms: plain training at several learning rates (the frontier), each action of an alarm,
constant replay. Forgetting is quoted at equal loss on B against the frontier: learning B more slowly also forgets less.
`--smoke` shrinks all of it to a minute or two on a CPU and shows nothing but that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import ROOT, Places, hardware, write_rows
from shift_job import TRUTH_ROWS, Job, prepare_text
from shift_summary import against_frontier, arm_row, detection, table
from svdtrain.config import RunConfig, defaults_for_depth, merge_settings

SOURCES = {"kernel": "linux-doc-6.1", "java": "openjdk-17-doc"}
ORDERS = (("kernel", "java"), ("java", "kernel"))
NEVER = 1_000_000  # an interval that no run reaches: the policy decides nothing, the alarm alone acts


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How training goes on after the onset."""

    name: str
    svd: dict[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0
    replay_share: float = 0.0


def all_arms() -> list[Arm]:
    plain = [Arm(name=f"plain lr x{factor:g}", lr_factor=factor) for factor in (0.25, 0.5, 0.7, 1.5)]
    watch = Arm(name="plain lr x1", svd={"svd_interval": 10, "svd_switching": False})
    actions = [
        Arm(name=f"alarm {actions}", svd={"svd_on_alarm": actions})
        for actions in ("lowrank", "protect", "replay", "lr", "protect,replay")
    ]
    five = {"svd_on_alarm": "replay", "svd_replay_share": 0.05}
    replay = [Arm(name=f"replay {share:.0%}", replay_share=share) for share in (0.02, 0.05)]
    return [watch, *plain, *actions, Arm(name="alarm replay 5%", svd=five), *replay]


def main() -> None:
    options = parse()
    arms = [arm for arm in all_arms() if not options.arms or any(text in arm.name for text in options.arms.split(";"))]
    options.runs.mkdir(parents=True, exist_ok=True)
    pairs = [(order, options.seed + i) for i in range(options.seeds) for order in ORDERS[: options.orders]]
    for source in SOURCES.values():  # once, before the processes would wait for each other
        prepare_text(RunConfig.from_dict(settings(options, source, options.seed, {})), spec(options, source))
    places = Places(options.parallel)
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda pair: run_base(options, places, *pair), pairs))
        work = [(order, seed, arm) for order, seed in pairs for arm in arms]
        rows = list(pool.map(lambda one: run_arm(options, places, *one), work))
    for order, seed in pairs:
        against_frontier([r for r in rows if r["order"] == "-".join(order) and r["seed"] == seed])
    for row in rows:
        if row["arm"] == "plain lr x1":
            run = directory(options, tuple(row["order"].split("-")), row["seed"], row["arm"])
            row["detection"] = detection(run, options.before)
    table(rows)
    write_rows(rows, options.out, "python scripts/experiments/shift.py " + shown_flags(options))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens a step")
    parser.add_argument("--micro-batch", type=int, default=32, help="rows of 512 tokens")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--before", type=int, default=350, help="steps on A")
    parser.add_argument("--after", type=int, default=120, help="steps on B")
    parser.add_argument("--ramp", type=int, default=20, help="steps over which B replaces A")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", type=int, default=2, choices=(1, 2))
    parser.add_argument("--arms", default="", help="parts of arm names, separated by ';'; default: all arms")
    parser.add_argument("--compile", default="off", help="pays only for long runs")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/shift"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/shift.json"))
    options = parser.parse_args(argv)
    options.runs = options.runs.resolve()
    options.data = str(Path(options.data).resolve())
    if options.smoke:
        smaller = {"depth": 2, "tokens": 512, "micro_batch": 2, "vocab": 512, "before": 90, "after": 30, "ramp": 5}
        vars(options).update(smaller, seeds=1, orders=1)
    return options


def settings(options: argparse.Namespace, source: str, seed: int, svd: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration: constant learning rate, every matrix watched, no decisions but the alarm's."""
    watched = {"svd_targets": "all", "svd_interval": NEVER, "svd_interference_every": 10, "svd_on_alarm": "none"}
    watched |= {"svd_probe_rows": TRUTH_ROWS}  # so that no alarm replays the rows that it is judged by
    changes = {
        "model": {"depth": options.depth, "max_seq_len": 64 if options.smoke else 512, "vocab_size": options.vocab},
        "data": {
            "data": spec(options, source),
            "cache_dir": str(options.runs / "cache"),
            "max_train_tokens": 200_000 if options.smoke else 100_000_000,
        },
        "optim": {"warmdown_ratio": 0.0},
        "train": {
            "num_iterations": options.before + options.after,
            "device_batch_size": options.micro_batch,
            "total_batch_size": options.tokens,
            "device": options.device,
            "compile": options.compile,
            "seed": seed,
            "eval_every": 0,
            "save_every": 0,
        },
        "svd": {**watched, **svd},
    }
    return merge_settings(defaults_for_depth(options.depth), changes)


def spec(options: argparse.Namespace, source: str) -> str:
    return f"{options.data}?source={source}"


def directory(options: argparse.Namespace, order: Sequence[str], seed: int, arm: str) -> Path:
    name = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in arm)
    return options.runs / f"{'-'.join(order)}-seed{seed}" / name


def run_base(options: argparse.Namespace, places: Places, order: Sequence[str], seed: int) -> None:
    """Training on A up to the onset, with the shares analysed every ten steps."""
    arm = Arm(name="base", svd={"svd_interval": 10, "svd_switching": False})
    if not (directory(options, order, seed, arm.name) / "done").exists():
        run_process(options, places, order, seed, arm, stop_at_onset=True)


def run_arm(options: argparse.Namespace, places: Places, order: Sequence[str], seed: int, arm: Arm) -> dict[str, Any]:
    """One arm from the base's checkpoint (or read, where it finished before)."""
    run = directory(options, order, seed, arm.name)
    if not (run / "done").exists():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(directory(options, order, seed, "base"), run, ignore=shutil.ignore_patterns("done"))
        run_process(options, places, order, seed, arm, resume=True)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    row = {"order": "-".join(order), "seed": seed, "arm": arm.name, "hardware": hardware()}
    return {**row, "settings": dataclasses.asdict(arm), **arm_row(run, options.before)}


def run_process(
    options: argparse.Namespace, places: Places, order: Sequence[str], seed: int, arm: Arm, **how: bool
) -> None:
    run = directory(options, order, seed, arm.name)
    run.mkdir(parents=True, exist_ok=True)
    job = Job(
        run=str(run),
        config=settings(options, SOURCES[order[0]], seed, arm.svd),
        after=spec(options, SOURCES[order[1]]),
        onset=options.before,
        ramp_steps=options.ramp,
        lr_factor=arm.lr_factor,
        replay_share=arm.replay_share,
        **how,
    )
    (run / "job.json").write_text(json.dumps(dataclasses.asdict(job), indent=1))
    command = [sys.executable, str(Path(__file__).with_name("shift_job.py")), str(run / "job.json")]
    with places.taken() as environment, open(run / "output.log", "w") as log:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{run} ended with exit code {code}; see {log.name}")
    (run / "done").touch()


def shown_flags(options: argparse.Namespace) -> str:
    """The command line for the results page: what was asked for, without paths."""
    hidden = {"data", "runs", "out", "parallel", "smoke"}
    usual = vars(parse(["--data", "DIR"]))
    flags = {k: v for k, v in vars(options).items() if k not in hidden and (options.smoke or v != usual[k])}
    return shlex.join(["--data", "DIR", *(p for k, v in flags.items() for p in (f"--{k.replace('_', '-')}", str(v)))])


if __name__ == "__main__":
    main()
