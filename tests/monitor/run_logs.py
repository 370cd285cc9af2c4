"""Small logs written by hand, for the monitor's and the report's tests."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from svdtrain.monitor.view import RunView
from svdtrain.runlog import encode_record

CONFIG = {
    "model": {"depth": 2},
    "train": {"num_iterations": 1000, "total_batch_size": 512},
    "svd": {"svd_preset": "fast", "svd_interval": 10, "svd_warmup": 10},
}
LAYERS = ("h.0.attn.c_q", "h.1.attn.c_q")


def record(kind: str, step: int, *, restart: int = 0, when: float | None = None, **fields: Any) -> dict[str, Any]:
    """A record as the trainer writes it; one step takes a second unless `when` says otherwise."""
    return {"kind": kind, "step": step, "time": 1e9 + step if when is None else when, "restart": restart, **fields}


def train(step: int, loss: float = 2.0, **fields: Any) -> dict[str, Any]:
    """A train record; extra metrics as `grad_norm=1.0`."""
    header = {name: fields.pop(name) for name in ("restart", "when") if name in fields}
    metrics = {"tok_per_sec": 1000.0, "grad_norm": 1.0, "dt": 1.0, **fields}
    return record("train", step, **header, **{"train/loss": loss, **{f"train/{k}": v for k, v in metrics.items()}})


def analysis(step: int, values: dict[str, dict[str, float]], **header: Any) -> dict[str, Any]:
    """An svd record of layer -> metric -> value."""
    flat = {f"svd/{layer}/{metric}": v for layer, metrics in values.items() for metric, v in metrics.items()}
    return record("svd", step, **header, **flat)


def switch(
    step: int, layer: str, change: str = "to_lowrank", reason: str = "gradient_clobbering_risk"
) -> dict[str, Any]:
    """A switch record."""
    return record("switch", step, layer=layer, change=change, reason=reason, r_old=128, r_new=118, diagnostics={})


def view_of(*records: dict[str, Any], config: dict[str, Any] | None = None) -> RunView:
    """A view fed with these records."""
    view = RunView(CONFIG if config is None else config)
    for item in records:
        view.feed(item)
    return view


def write_run(path: Path, records: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Path:
    """A run directory with these records."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (path / "metrics.jsonl").write_text("".join(encode_record(r) + "\n" for r in records))
    return path


def healthy_run(path: Path, steps: int = 200, *, end: str = "finished", now: bool = True) -> Path:
    """A run without any alert, with analyses, evaluations, one switch and a checkpoint."""
    offset = time.time() - steps if now else 1e9
    records = [record("start", 0, num_iterations=1000, total_batch_size=512, world_size=1, device="cpu")]
    for step in range(1, steps + 1):
        if step % 10 == 0:
            mode = float(step > 100)
            quiet = {"principal_alignment": 0.1, "reconstruction_error": 0.001, "stable_rank": 9.0, "r": 60.0}
            records.append(analysis(step, {layer: {**quiet, "mode": mode} for layer in LAYERS}))
        if step == 110:
            records += [switch(step, layer, reason="optimal_lowrank_conditions") for layer in LAYERS]
        records.append(train(step, 3.0 - step / 500, loss_ema=3.0 - step / 500))
        if step % 50 == 0:
            records.append(record("eval", step, **{"val/bpb": 2.0 - step / 1000}))
    records.append(record("checkpoint", steps, path="checkpoints/step"))
    if end:
        records.append(record("end", steps, reason=end, run_seconds=float(steps)))
    for item in records:
        item["time"] = offset + item["step"]
    return write_run(path, records)
