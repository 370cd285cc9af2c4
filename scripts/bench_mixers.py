"""Train a GPT with every mixer of ssm_blocks in turn, attention beside them, and write the table in docs/SSM.md.

    python scripts/bench_mixers.py --data DIR --parallel 8                all that have no row yet
    python scripts/bench_mixers.py --data DIR --names attention monarch   only these
    python scripts/bench_mixers.py --publish                              the table from the rows

DIR holds parquet shards with a column `text`. Every run is `svdtrain --depth 4 --device cpu --mixer NAME`, 300 steps on
2 threads; with --parallel, runs are pinned to disjoint pairs of cores. Rows are kept in docs/results/mixers.json, runs
under runs/mixers; a run that was stopped goes on, a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(parent) for parent in Path(__file__).resolve().parents[:2]]

import torch
from marked_table import put_between

from ssm_blocks import available
from svdtrain.build import build_model
from svdtrain.config import ModelConfig, RunConfig, TrainConfig
from svdtrain.model.kv_cache import KVCache
from svdtrain.runlog import read_records

THREADS = 2
SEQ_LEN = 256
FLAGS: dict[str, Any] = {
    "depth": 4,
    "device": "cpu",
    "dtype": "fp32",
    "max-seq-len": SEQ_LEN,
    "device-batch-size": 2,
    "total-batch-size": 2 * SEQ_LEN,
    "num-iterations": 300,
    "matrix-lr": 0.1,
    "embedding-lr": 1.0,
    "eval-every": 100,
    "eval-tokens": 16384,
    "svd-interval": 50,
    "max-train-tokens": 1_000_000,
    "seed": 1337,
}
WARM_SHARE = 0.1  # of the steps, left out of the speed
PAGE = ROOT / "docs" / "SSM.md"
MARKS = ("<!-- table of scripts/bench_mixers.py -->", "<!-- end of the table -->")
Row = dict[str, Any]


def main() -> int:
    arguments = parse_arguments()
    known = read_rows(arguments.out)
    if not arguments.publish:
        names = arguments.names or ["attention", *available()]
        missing = [name for name in names if name not in known]
        for row in measure_all(missing, arguments):
            known[row["mixer"]] = row
            write_rows(known, arguments.out)
            print(table_line(row), flush=True)
    publish(known)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="stdlib", help="a directory of parquet shards, or another source of svdtrain")
    add("--names", nargs="+", default=None, help="mixers; default: all, and attention")
    add("--parallel", type=int, default=1, help="runs at a time, each on a pair of cores of its own")
    add("--steps", type=int, default=FLAGS["num-iterations"])
    add("--runs", type=Path, default=ROOT / "runs" / "mixers")
    add("--out", type=Path, default=ROOT / "docs" / "results" / "mixers.json")
    add("--publish", action="store_true", help="only write the table")
    return parser.parse_args()


def measure_all(names: list[str], arguments: argparse.Namespace) -> Any:
    """Rows as they come; the text is tokenised before several runs ask for it at once."""
    if not names:
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    train("attention", arguments, arguments.runs / "prepare", steps=1, cores=None)
    pairs: SimpleQueue[list[int] | None] = SimpleQueue()
    for pair in core_pairs(arguments.parallel):
        pairs.put(pair)

    def one(name: str) -> Row:
        cores = pairs.get()
        try:
            run = arguments.runs / name
            train(name, arguments, run, steps=arguments.steps, cores=cores)
            return summarise(name, run)
        finally:
            pairs.put(cores)

    with ThreadPoolExecutor(arguments.parallel) as pool:
        for done in as_completed([pool.submit(one, name) for name in names]):
            yield done.result()


def core_pairs(count: int) -> list[list[int] | None]:
    """Disjoint pairs of the cores this process may use; without taskset, or alone, the system decides."""
    if count == 1 or shutil.which("taskset") is None:
        return [None] * count
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < THREADS * count:
        raise SystemExit(f"--parallel {count} needs {THREADS * count} cores, {len(cores)} are there")
    return [cores[THREADS * i : THREADS * (i + 1)] for i in range(count)]


def train(name: str, arguments: argparse.Namespace, run: Path, *, steps: int, cores: list[int] | None) -> None:
    """One run, unless it finished before. Raises RuntimeError with the log's name if it fails."""
    if finished(run):
        return
    flags = {**FLAGS, "num-iterations": steps, "mixer": name, "data": arguments.data, "run-dir": run, "resume": "auto"}
    command = [sys.executable, "-m", "svdtrain.cli", *(str(x) for key in flags for x in (f"--{key}", flags[key]))]
    if cores is not None:
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    log = run.with_suffix(".log")
    with open(log, "w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise RuntimeError(f"{name} ended with exit code {code}; see {log}")


def finished(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and any(r["kind"] == "end" and r["reason"] == "finished" for r in read_records(path))


def summarise(name: str, run: Path) -> Row:
    """What the table shows of one run."""
    records = list(read_records(run / "metrics.jsonl"))
    steps = max(r["step"] for r in records if r["kind"] == "train")
    speeds = [r["train/tok_per_sec"] for r in records if r["kind"] == "train" and r["step"] > WARM_SHARE * steps]
    samples = [r["text"] for r in records if r["kind"] == "sample"]
    return {
        "mixer": name,
        **sizes(name),
        "bpb": [[r["step"], r["val/bpb"]] for r in records if r["kind"] == "eval"],
        "steps": steps,
        "tokens_per_s": statistics.median(speeds),
        "sample": samples[-1] if samples else "",
        "hardware": f"{THREADS} threads of {cpu_name()}, torch {torch.__version__}",
    }


def sizes(name: str) -> Row:
    """Parameters, and the numbers the model remembers of one sequence: at 256 tokens, and at each token more."""
    shape = ModelConfig(depth=FLAGS["depth"], max_seq_len=SEQ_LEN, mixer=name)
    config = RunConfig(model=shape, train=TrainConfig(dtype=FLAGS["dtype"]))
    model = build_model(config, config.model.vocab_size, torch.device("cpu")).float()
    with torch.no_grad():
        caches = [KVCache.for_model(model, batch_size=1, max_len=length) for length in (SEQ_LEN, SEQ_LEN + 1)]
        for cache in caches:
            model(torch.zeros(1, 2, dtype=torch.long), kv_cache=cache)
    numbers = [cache.num_bytes() // 4 for cache in caches]
    counts = model.parameter_counts()
    return {
        "parameters": counts["total"],
        "without_embeddings": counts["transformer_matrices"] + counts["scalars"],
        "state": numbers[0],
        "state_per_token": numbers[1] - numbers[0],
    }


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read_rows(path: Path) -> dict[str, Row]:
    return {row["mixer"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def write_rows(rows: dict[str, Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"flags": FLAGS, "rows": list(rows.values())}, indent=1) + "\n")


HEADER = [
    "| mixer | validation bpb, first -> last | tokens/s | state | parameters (without embeddings) | sample |",
    "|---|---|---|---|---|---|",
]


def table_line(row: Row) -> str:
    growth = f" (+ {row['state_per_token']:,} a token)" if row["state_per_token"] else ""
    return (
        f"| `{row['mixer']}` | {row['bpb'][0][1]:.3f} -> {row['bpb'][-1][1]:.3f} | {row['tokens_per_s']:,.0f} | "
        f"{row['state']:,}{growth} | {row['parameters'] / 1e6:.2f} M ({row['without_embeddings'] / 1e6:.2f} M) | "
        f"{'yes' if row['sample'].strip() else 'no'} |"
    )


def publish(rows: dict[str, Row]) -> None:
    """Put the table between its marks in docs/SSM.md, best last bpb first."""
    if not rows:
        return
    missing = [name for name in ("attention", *available()) if name not in rows]
    ordered = sorted(rows.values(), key=lambda row: row["bpb"][-1][1])
    steps, hardware = sorted({row["steps"] for row in ordered}), sorted({row["hardware"] for row in ordered})
    lines = [
        f"{' and '.join(map(str, steps))} steps of {FLAGS['total-batch-size']:,} tokens of English, one seed, on",
        f"{'; '.join(hardware)}. State: numbers that the whole model remembers of one",
        f"sequence of {SEQ_LEN} tokens. One short run each: it shows that every mixer trains, not which is best.",
        "",
        *HEADER,
        *map(table_line, ordered),
        "",
        *([f"Not run yet: {', '.join(missing)}.", ""] if missing else []),
        "`python scripts/bench_mixers.py --data DIR --parallel 8`",
    ]
    put_between(PAGE, MARKS, lines)
    print(f"wrote the table of {len(rows)} mixers into {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
