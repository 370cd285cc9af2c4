"""Small corpora of every kind, generated."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from svdtrain.data.token_files import TokenFiles

SOURCES = ("linux-kernel", "rust-doc", "git-doc")


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Short documents of made-up words, some of them not ASCII."""
    chooser = random.Random(seed)
    words = ["alpha", "beta", "naïve", "tensor", "Ωμέγα", "12345", "the", "of", "rank", "🙂", "matrix", "spectral"]
    return [" ".join(chooser.choices(words, k=chooser.randrange(5, 120))) + f" #{n}\n" for n in range(count)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four parquet shards with the columns text and source; the last one is validation."""
    directory = tmp_path / "shards"
    directory.mkdir()
    for number in range(4):
        texts = make_documents(40, seed=number)
        sources = [SOURCES[row % len(SOURCES)] for row in range(len(texts))]
        table = pa.table({"text": texts, "source": sources})
        pq.write_table(table, directory / f"shard_{number:05d}.parquet", row_group_size=16)
    return directory


@pytest.fixture
def make_token_files(tmp_path: Path) -> Callable[..., TokenFiles]:
    """Token files with given document lengths (BOS included): BOS is 0, the text counts 1, 2, 3 ... without repeats."""

    number_of_call = itertools.count()

    def make(lengths: list[int], *, shard_tokens: int = 1 << 20, split: str = "train") -> TokenFiles:
        tokens: list[int] = []
        for length in lengths:
            tokens += [0, *range(len(tokens) + 1, len(tokens) + length)]
        files = TokenFiles(
            directory=tmp_path / f"tokens_{next(number_of_call)}",
            split=split,
            num_tokens=len(tokens),
            num_documents=len(lengths),
            num_bytes=len(tokens) - len(lengths),
            bos_id=0,
            shard_tokens=shard_tokens,
        )
        files.directory.mkdir()
        for number, path in enumerate(files.shard_paths()):
            part = tokens[number * shard_tokens : (number + 1) * shard_tokens]
            np.array(part, dtype=np.uint16).tofile(path)
        return files

    return make
