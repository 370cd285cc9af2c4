"""What base_train of nanochat needs and a machine without a network lacks: text, a tokenizer, packages unused there."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import random
import sys
import time
from itertools import islice, product
from pathlib import Path
from types import ModuleType
from typing import Any

OPTIONAL = ("wandb", "requests", "yaml", "filelock", "jinja2", "tokenizers", "rustbpe")


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


def make_base(path: Path, vocab_size: int) -> None:
    """Random documents and a tokenizer of byte pairs, once; other ranks wait for it."""
    ready = path / "ready"
    if int(os.environ.get("RANK", "0")) == 0 and not ready.exists():
        _write_base(path, vocab_size)
        ready.touch()
    while not ready.exists():
        time.sleep(0.2)
    os.environ["NANOCHAT_BASE_DIR"] = str(path)


def _write_base(path: Path, vocab_size: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nanochat_patch.weights import write_nanochat_tokenizer
    from svdtrain.data.tokenizer import SPECIAL_TOKENS, Tokenizer

    printable = [*range(32, 127)]
    order = [*printable, *(byte for byte in range(256) if byte not in printable)]
    pairs = islice((bytes(pair) for pair in product(order, repeat=2)), vocab_size - 256 - len(SPECIAL_TOKENS))
    write_nanochat_tokenizer(Tokenizer([*(bytes([b]) for b in range(256)), *pairs]), path / "tokenizer")
    shards = path / "base_data"
    shards.mkdir(parents=True)
    draw = random.Random(0)
    alphabet = b"abcdefghijklmnopqrstuvwxyz      ,.\n"
    letters = bytes(alphabet[byte % len(alphabet)] for byte in range(256))
    for index in range(3):
        texts = [draw.randbytes(9000).translate(letters).decode() for _ in range(2000)]
        pq.write_table(pa.table({"text": texts}), shards / f"shard_{index:05d}.parquet", row_group_size=500)
    (path / "base_data_climbmix").symlink_to(shards.name)
