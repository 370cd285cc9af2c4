"""A run's data made of random token ids, for benchmarks that need no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdtrain.data.prepare import PreparedData
from svdtrain.data.token_files import TokenFiles

NUM_TOKENS = {"train": 20_000_000, "val": 1_000_000}


class RandomTokenizer:
    """As much of a tokenizer as a run on random tokens needs."""

    bos_id = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [1 + ord(character) % 200 for character in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def token_bytes(self) -> Tensor:
        return torch.ones(self.vocab_size, dtype=torch.int32)


def write_tokens(directory: Path, vocab_size: int) -> None:
    """Tokens with the frequencies of a language (Zipf), the same every time."""
    generator = np.random.default_rng(0)
    for split, count in NUM_TOKENS.items():
        ids = generator.zipf(1.2, size=count) % (vocab_size - 1) + 1
        (directory / f"{split}_00000.bin").write_bytes(ids.astype(np.uint16).tobytes())


def random_data(directory: Path, vocab_size: int) -> PreparedData:
    def files(split: str) -> TokenFiles:
        count = NUM_TOKENS[split]
        return TokenFiles(
            directory=directory, split=split, num_tokens=count, num_documents=1, num_bytes=count, bos_id=0,
            shard_tokens=count,
        )  # fmt: skip

    tokenizer: Any = RandomTokenizer(vocab_size)
    return PreparedData(name="random", fingerprint="", tokenizer=tokenizer, train=files("train"), val=files("val"))
