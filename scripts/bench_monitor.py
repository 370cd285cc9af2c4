"""Measure svd-monitor on a large synthetic log: opening, drawing, memory, and the share of a core that following takes.

python scripts/bench_monitor.py                    # 21,400 steps of a depth-20 run, 120 matrices
python scripts/bench_monitor.py --steps 2000 --keep /tmp/log   # write the log there and keep it
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MATRICES = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
METRICS = {
    "principal_alignment": 0.2, "minor_alignment": 0.8, "subspace_angle": 0.05, "concentration": 0.5,
    "reconstruction_error": 0.004, "minor_energy": 0.4, "update_size": 0.01, "update_alignment": 0.2,
    "gradient_lift": 1.2, "gradient_z": 1.0, "update_lift": 1.1, "update_z": 1.0, "rotation_ratio": 0.9,
    "stable_rank": 30.0, "entropy_rank": 400.0,
}  # fmt: skip


def layers(depth: int) -> list[str]:
    """Names as in a GPT of this depth."""
    return [f"h.{block}.{matrix}" for block in range(depth) for matrix in MATRICES]


def analysis(step: int, when: float, names: list[str], random_: random.Random, *, steps: int) -> dict:
    """One svd record with slow trends, so that there is something to see."""
    record = {"kind": "svd", "step": step, "time": round(when, 3), "restart": 0}
    for index, name in enumerate(names):
        depth_share = index / len(names)
        wave = 1 + 0.3 * math.sin(6 * depth_share + 4 * step / steps)
        for metric, level in METRICS.items():
            record[f"svd/{name}/{metric}"] = level * wave * random_.uniform(0.93, 1.07)
        record[f"svd/{name}/r"] = float(1270 - int(600 * step / steps))
        record[f"svd/{name}/mode"] = float(step > steps * (0.4 + 0.5 * depth_share))
    return record


def write_log(run: Path, *, steps: int, depth: int, interval: int = 20, seconds_per_step: float = 3.24) -> Path:
    """A whole run of `steps` steps, its last record written just now."""
    run.mkdir(parents=True, exist_ok=True)
    svd = {"svd_preset": "fast", "svd_rule": "calibrated", "svd_interval": interval, "svd_warmup": 10}
    config = {"model": {"depth": depth}, "train": {"num_iterations": steps + 600}, "svd": svd}
    (run / "config.json").write_text(json.dumps(config))
    random_, names = random.Random(0), layers(depth)
    began = time.time() - steps * seconds_per_step
    path = run / "metrics.jsonl"
    with open(path, "w") as file:
        start = {"num_iterations": steps + 600, "total_batch_size": 524288, "world_size": 8, "device": "cuda:0"}
        file.write(json.dumps({"kind": "start", "step": 0, "time": began, "restart": 0, **start}) + "\n")
        for step in range(1, steps + 1):
            when = began + step * seconds_per_step
            if step % interval == 0:
                file.write(json.dumps(analysis(step, when, names, random_, steps=steps)) + "\n")
            file.write(json.dumps(train_record(step, when, random_)) + "\n")
            if step % 250 == 0:
                bpb = 0.8 + 2.5 * step**-0.35
                evaluation = {"kind": "eval", "step": step, "time": when, "restart": 0, "val/bpb": bpb}
                file.write(json.dumps(evaluation) + "\n")
    return path


def train_record(step: int, when: float, random_: random.Random) -> dict:
    """One train record."""
    loss = 2.3 + 8 * step**-0.35 + random_.gauss(0, 0.03)
    return {
        "kind": "train", "step": step, "time": round(when, 3), "restart": 0, "train/loss": loss,
        "train/loss_ema": loss, "train/grad_norm": random_.uniform(0.8, 1.2), "train/lrm": 1.0, "train/dt": 3.24,
        "train/tok_per_sec": random_.uniform(160e3, 163e3), "train/tokens": float(step * 524288), "train/mfu": 53.0,
    }  # fmt: skip


def run_command(arguments: list[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak memory in MiB of one svd-monitor process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    command = [sys.executable, "-m", "svdtrain.monitor.cli", *arguments]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu, after.ru_maxrss / 1024


def follow(path: Path, *, steps: int, depth: int, seconds: float, interval: int) -> float:
    """Processor share of a monitor that draws on a terminal while records keep coming, its start left out."""
    import os
    import pty
    import threading

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "svdtrain.monitor.cli", str(path.parent)]
    environment = {**os.environ, "COLUMNS": "200", "LINES": "50", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env=environment)
    threading.Thread(target=_drain, args=(leader,), daemon=True).start()
    names, random_ = layers(depth), random.Random(1)
    time.sleep(8)
    began, used = time.monotonic(), _cpu_seconds(process.pid)
    step = steps
    with open(path, "a") as file:
        while time.monotonic() - began < seconds:
            step += 1
            if step % interval == 0:
                file.write(json.dumps(analysis(step, time.time(), names, random_, steps=steps)) + "\n")
            file.write(json.dumps(train_record(step, time.time(), random_)) + "\n")
            file.flush()
            time.sleep(1.0)
    share = (_cpu_seconds(process.pid) - used) / (time.monotonic() - began)
    os.write(leader, b"q")
    process.wait(timeout=10)
    return share


def _drain(descriptor: int) -> None:
    import os

    while True:
        try:
            if not os.read(descriptor, 65536):
                return
        except OSError:
            return


def _cpu_seconds(pid: int) -> float:
    import os

    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=21_400)
    parser.add_argument("--depth", type=int, default=20, help="6 matrices a block")
    parser.add_argument("--interval", type=int, default=20, help="steps between analyses")
    parser.add_argument("--follow-seconds", type=float, default=60)
    parser.add_argument("--keep", help="directory for the synthetic run; it stays there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(arguments.keep or temporary)
        path = write_log(run, steps=arguments.steps, depth=arguments.depth, interval=arguments.interval)
        print(f"log: {path.stat().st_size / 2**20:.0f} MiB, {arguments.steps} steps, {6 * arguments.depth} matrices")
        for name, flags in (("--help", ["--help"]), ("--once", [str(run), "--once"])):
            runs = [run_command(flags) for _ in range(3)]
            wall, cpu = min(r[0] for r in runs), min(r[1] for r in runs)
            print(f"{name:8} wall {wall:.2f} s, processor {cpu:.2f} s, peak memory {runs[-1][2]:.0f} MiB (best of 3)")
        share = follow(
            path,
            steps=arguments.steps,
            depth=arguments.depth,
            seconds=arguments.follow_seconds,
            interval=arguments.interval,
        )
        print(f"following at one step a second, 200x50: {100 * share:.1f} % of one core")


if __name__ == "__main__":
    main()
