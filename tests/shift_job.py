"""A tiny run whose text changes at a known step: the alarm must notice."""

from __future__ import annotations

import io
import json
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from svdtrain.build import build_trainer
from svdtrain.config import RunConfig, merge_settings
from svdtrain.data.shift import ShiftStream
from svdtrain.data.stream import TokenStream, prepare
from svdtrain.trainer.hooks import Hook
from svdtrain.trainer.loop import Trainer
from tests.main_job import MODULES, tiny_settings

ONSET, STEPS = 24, 40


def write_two_texts(directory: Path) -> Path:
    """One file: the source `code` is Python, the source `digits` is numbers."""
    path = directory / "two.jsonl"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        stdlib, generator = Path(sysconfig.get_paths()["stdlib"]), random.Random(0)
        code = [piece for name in MODULES for piece in (stdlib / f"{name}.py").read_text().split("\n\n\n")]
        digits = ["; ".join(str(generator.randrange(10_000)) for _ in range(200)) for _ in range(300)]
        rows = [{"text": t, "source": "code"} for t in code] + [{"text": t, "source": "digits"} for t in digits]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shift_settings(texts: Path, **svd: Any) -> dict[str, Any]:
    """Constant learning rate, every matrix watched, decisions left to the alarm."""
    alone = {"svd_interval": 10_000, "svd_targets": "all", "svd_interference_every": 5, "svd_alarm_nats": 0.1}
    alone["svd_probe_rows"] = 8
    return merge_settings(
        tiny_settings(texts),
        {
            "data": {"data": f"{texts}?source=code"},
            "train": {"num_iterations": STEPS},
            "optim": {"warmdown_ratio": 0.0, "scalar_lr": 0.05},
            "svd": {**alone, **svd},
        },
    )


def shift_trainer(run: Path, settings: dict[str, Any], *, extra_hooks: Sequence[Hook] = ()) -> Trainer:
    """A trainer on those settings that sees numbers from step ONSET on."""
    config = RunConfig.from_dict(settings)
    spec = config.data.data.replace("code", "digits")
    digits = prepare(spec, vocab_size=config.model.vocab_size, max_train_tokens=config.data.max_train_tokens)

    def wrap(stream: TokenStream) -> ShiftStream:
        after = TokenStream(digits.train, batch_size=stream.batch_size, seq_len=stream.seq_len, seed=stream.seed)
        return ShiftStream(stream, after, onset=ONSET)

    console = Console(file=io.StringIO(), width=120)
    return build_trainer(config, run, console, extra_hooks=extra_hooks, wrap_stream=wrap)
