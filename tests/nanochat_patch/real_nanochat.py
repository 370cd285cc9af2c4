"""Real checkouts, and runs of nanochat in processes of their own.

NANOCHAT_DIR_2026 names a checkout of commit 92d63d4, NANOCHAT_DIR_2025 one of b399e43; NANOCHAT_TEXT_DIR a directory of
parquet shards for them (default: documents made here), NANOCHAT_TEST_DEPTH the depth of the models (default: 2).
torch.compile is off in these runs (TORCHDYNAMO_DISABLE): on a CPU it takes minutes and nothing that is tested depends
on it.
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OFFLINE, WITHOUT = (Path(__file__).parent / name for name in ("offline", "without"))
VOCAB_SIZE = 512
DEPTH = int(os.environ.get("NANOCHAT_TEST_DEPTH", "2"))
TAG = f"d{DEPTH}"
"""Under which the run that switches is saved; fine-tuning of 2025 knows no other."""
SIZES = {
    "depth": DEPTH, "max-seq-len": 64, "device-batch-size": 2, "total-batch-size": 128, "eval-tokens": 256,
    "core-metric-every": -1, "sample-every": 1000, "device-type": "cpu", "matrix-lr": 2.0,
}  # fmt: skip


@dataclass(frozen=True)
class Nanochat:
    """A checkout and a base directory for it."""

    year: str
    path: Path
    base: Path

    def flags(self, **extra: object) -> list[str]:
        """Arguments of base_train in the checkout's own spelling; names with underscores."""
        settings: dict[str, object] = {**SIZES, **{name.replace("_", "-"): value for name, value in extra.items()}}
        if self.year == "2025":
            settings = {name.replace("-", "_"): value for name, value in settings.items()}
            settings["matrix_lr"] = 0.02  # not scaled down for small batches there
        else:
            settings["warmup-steps"] = 1
        return [f"--{name}={value}" for name, value in settings.items()]

    def environment(self, *search: Path) -> dict[str, str]:
        path = os.pathsep.join(map(str, search or (ROOT, OFFLINE)))
        return {
            **os.environ, "NANOCHAT_BASE_DIR": str(self.base), "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def run(self, *arguments: object) -> str:
        """`python ...` in the checkout; what it printed. Fails with its last lines."""
        return self._run(self.environment(), arguments)

    def alone(self, script: str, *arguments: object) -> str:
        """`python -m scripts.<script> ...` where our packages cannot be imported."""
        return self._run(self.environment(OFFLINE, WITHOUT), ("-m", f"scripts.{script}", *arguments))

    def patched(self, script: str, flags: list[str], *arguments: object) -> str:
        """The same through our launcher."""
        return self.run("-m", "nanochat_patch", "--nanochat", self.path, "--script", script, *flags, "--", *arguments)

    def _run(self, environment: dict[str, str], arguments: tuple[object, ...]) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    def train(self, **extra: object) -> str:
        """nanochat alone."""
        return self.alone("base_train", *self.flags(**extra))

    def train_patched(self, run_dir: Path, svd: list[str], **extra: object) -> str:
        """nanochat with this package."""
        launch = ["-m", "nanochat_patch", "--nanochat", self.path, "--run-dir", run_dir, *svd, "--"]
        return self.run(*launch, *self.flags(**extra))

    def checkpoint(self, tag: str) -> Path:
        return self.base / "base_checkpoints" / tag

    def weights(self, tag: str, step: int) -> dict[str, torch.Tensor]:
        return torch.load(self.checkpoint(tag) / f"model_{step:06d}.pt", weights_only=True)


def documents(count: int) -> list[str]:
    """Text for the tests: real documents where NANOCHAT_TEXT_DIR is set, words drawn at random otherwise."""
    directory = os.environ.get("NANOCHAT_TEXT_DIR")
    if directory:
        table = pq.ParquetFile(sorted(Path(directory).glob("*.parquet"))[0]).read_row_group(0)
        return [text[:1500] for text in table.column("text").to_pylist() if len(text) > 400][:count]
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucm", k=draw.randint(2, 9))) for _ in range(400)]
    return [" ".join(draw.choices(words, k=150)) + "." for _ in range(count)]


def write_shards(directory: Path, train: list[str], val: list[str]) -> None:
    """Two shards; the last one is validation. Both names that nanochat has used lead to them."""
    directory.mkdir(parents=True)
    for index, texts in enumerate((train, val)):
        pq.write_table(pa.table({"text": texts}), directory / f"shard_{index:05d}.parquet", row_group_size=50)
    (directory.parent / "base_data_climbmix").symlink_to(directory.name)


def real_checkout(year: str) -> Path:
    directory = os.environ.get(f"NANOCHAT_DIR_{year}")
    if not directory:
        pytest.skip(f"NANOCHAT_DIR_{year} is not set")
    return Path(directory)


def make_bundle(path: Path, texts: list[str]) -> Path:
    """One task of each kind from running text; an untrained model is right in some of them."""
    draw = random.Random(5)
    words = [text.split() for text in texts if len(text.split()) > 30]
    chosen, schema, said = [], [], []
    for some in words[:30]:
        a, b, c = (" ".join(draw.choice(words)[:4]) for _ in range(3))
        chosen.append({"query": " ".join(some[:6]), "choices": [a, b, c], "gold": draw.randrange(3)})
        schema.append({"context_options": [a, b], "continuation": " ".join(some[6:9]), "gold": draw.randrange(2)})
        said.append({"context": " ".join(some[:6]) + " ", "continuation": some[6]})
    (path / "eval_data").mkdir(parents=True)
    for name, items in (("chosen", chosen), ("schema", schema), ("said", said)):
        (path / "eval_data" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (path / "core.yaml").write_text(
        "icl_tasks:\n"
        "- {label: chosen, dataset_uri: chosen.jsonl, num_fewshot: [2], icl_task_type: multiple_choice,"
        " continuation_delimiter: '\\nAnswer: '}\n"
        "- {label: schema, dataset_uri: schema.jsonl, num_fewshot: [0], icl_task_type: schema}\n"
        "- {label: said, dataset_uri: said.jsonl, num_fewshot: [1], icl_task_type: language_modeling}\n"
    )
    (path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchosen,33.3\nschema,50\nsaid,0\n")
    return path


SWITCHING = ["--svd-rule", "original", "--svd-warmup", "3", "--svd-interval", "3"]
"""Settings under which these tiny models switch every attention matrix within SWITCHED_STEPS."""
SWITCHED_STEPS = 120
