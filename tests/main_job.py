"""A run small enough for tests: real text, a real model, every part of the product in place."""

from __future__ import annotations

import io
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from svdtrain.build import build_trainer
from svdtrain.config import RunConfig, merge_settings
from svdtrain.runlog import read_records
from svdtrain.trainer.hooks import Hook
from svdtrain.trainer.loop import Trainer

MODULES = ("argparse", "ast", "calendar", "inspect", "tarfile", "textwrap")


def write_corpus(directory: Path) -> Path:
    """A few modules of the standard library as one JSON-lines file."""
    import json

    path = directory / "text.jsonl"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        pieces = [p for name in MODULES for p in (stdlib / f"{name}.py").read_text().split("\n\n\n")]
        path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return path


def tiny_settings(corpus: Path, **overrides: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run that takes a few seconds on one core."""
    base = {
        "model": {"depth": 2, "max_seq_len": 64, "vocab_size": 512},
        "data": {"data": str(corpus)},
        "train": {
            "num_iterations": 40,
            "device_batch_size": 2,
            "total_batch_size": 256,
            "device": "cpu",
            "dtype": "fp32",
            "eval_every": 0,
            "eval_tokens": 1024,
        },
        "optim": {"matrix_lr": 0.5, "embedding_lr": 5.0, "unembedding_lr": 0.2, "warmup_steps": 5},
        "svd": {"svd_interval": 5, "svd_warmup": 5, "svd_preset": "fast"},
    }
    return merge_settings(base, overrides)


def tiny_trainer(run: Path, settings: dict[str, Any], *, extra_hooks: Sequence[Hook] = ()) -> Trainer:
    """A trainer on those settings, its output caught."""
    console = Console(file=io.StringIO(), width=120)
    return build_trainer(RunConfig.from_dict(settings), run, console, extra_hooks=extra_hooks)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind of a run."""
    return [record for record in read_records(run / "metrics.jsonl") if record["kind"] == kind]
