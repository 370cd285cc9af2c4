"""Token ids on disk: uint16 shards of a fixed length, memory-mapped, and the rows that batches are made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svdtrain.data.files import sync_directory

SHARD_TOKENS = 1 << 26  # 128 MiB a shard
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """The documents of one split, one after the other, each with BOS before it.

    Rows. Row k of T tokens has the targets tokens[kT+1 : kT+T+1]; its inputs are BOS and the targets but the last. So
    documents fill rows in order without padding, one that does not fit goes on in the next row after a BOS of its
    own, and in one epoch every token is a target exactly once, except the very first BOS and the fewer than T tokens
    at the end that fill no row. Where a row begins just before a document, its first target is that document's BOS.
    """

    directory: Path
    split: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text."""
    bos_id: int
    shard_tokens: int

    def num_rows(self, seq_len: int) -> int:
        """Whole rows of `seq_len` targets."""
        return max(0, self.num_tokens - 1) // seq_len

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids at positions start to stop, uint16 [stop - start]."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        first, last = start // self.shard_tokens, max(start, stop - 1) // self.shard_tokens
        parts = []
        for number in range(first, last + 1):
            offset = number * self.shard_tokens
            parts.append(self._shards[number][max(start - offset, 0) : stop - offset])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rows(self, indices: Sequence[int] | np.ndarray, seq_len: int) -> Batch:
        """Inputs and targets of the rows `indices`, int64 [len(indices), seq_len] each, on the CPU."""
        inputs = np.empty((len(indices), seq_len), dtype=np.int64)
        targets = np.empty_like(inputs)
        for slot, row in enumerate(indices):
            start = int(row) * seq_len + 1
            targets[slot] = self.tokens(start, start + seq_len)
        inputs[:, 0] = self.bos_id
        inputs[:, 1:] = targets[:, :-1]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def document_starts(self) -> np.ndarray:
        """Positions of every document's BOS, int64 [num_documents]. Reads all tokens."""
        found = [np.flatnonzero(shard == self.bos_id) + n * self.shard_tokens for n, shard in enumerate(self._shards)]
        return np.concatenate(found)

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        return [np.memmap(path, dtype=np.uint16, mode="r") for path in self.shard_paths()]

    def shard_paths(self) -> list[Path]:
        num_shards = -(-self.num_tokens // self.shard_tokens)
        return [self.directory / f"{self.split}_{number:05d}.bin" for number in range(num_shards)]

    def is_intact(self) -> bool:
        """Whether every shard is there with its full length."""
        remaining = self.num_tokens
        for path in self.shard_paths():
            if not path.is_file() or path.stat().st_size != 2 * min(remaining, self.shard_tokens):
                return False
            remaining -= self.shard_tokens
        return True

    def to_index(self) -> dict[str, Any]:
        """What `from_index` needs, for JSON."""
        fields = ("num_tokens", "num_documents", "num_bytes", "bos_id", "shard_tokens")
        return {name: getattr(self, name) for name in fields}

    @classmethod
    def from_index(cls, directory: Path, split: str, index: dict[str, Any]) -> TokenFiles:
        """Inverse of `to_index`. Raises TypeError on unknown or missing entries."""
        return cls(directory=directory, split=split, **index)


class TokenWriter:
    """Appends documents of one split to shards; `close` makes them durable and says what was written."""

    def __init__(self, directory: Path, split: str, *, bos_id: int, token_bytes: np.ndarray) -> None:
        self.directory, self.split, self.bos_id = directory, split, bos_id
        self.num_tokens = self.num_documents = self.num_bytes = 0
        self._token_bytes, self._shard_tokens = token_bytes, SHARD_TOKENS
        self._file: Any = None

    def add(self, ids: list[int], max_tokens: int) -> None:
        """Append BOS and `ids`, cut at `max_tokens` tokens in all."""
        document = np.array([self.bos_id, *ids], dtype=np.uint16)[: max(0, max_tokens - self.num_tokens)]
        if len(document) == 0:
            return
        self.num_documents += 1
        self.num_bytes += int(self._token_bytes[document].sum())
        while len(document) > 0:
            room = self._shard_tokens - self.num_tokens % self._shard_tokens
            if room == self._shard_tokens:
                self._open_next_shard()
            self._file.write(document[:room].tobytes())
            self.num_tokens += len(document[:room])
            document = document[room:]

    def _open_next_shard(self) -> None:
        self._close_shard()
        number = self.num_tokens // self._shard_tokens
        self._file = open(self.directory / f"{self.split}_{number:05d}.bin", "wb")  # noqa: SIM115, closed below

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def abandon(self) -> None:
        """Close without making anything durable; for a write that failed."""
        if self._file is not None:
            self._file.close()

    def close(self) -> TokenFiles:
        self._close_shard()
        sync_directory(self.directory)
        return TokenFiles(
            directory=self.directory,
            split=self.split,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
            bos_id=self.bos_id,
            shard_tokens=self._shard_tokens,
        )
