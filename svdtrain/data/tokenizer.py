"""Byte-pair encoding: trained by rustbpe, run by tiktoken, kept as JSON.

Ids have nanochat's layout: 256 bytes, then merges in the order they were learned, then its nine special tokens.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken
import torch

from svdtrain.data.errors import DataError
from svdtrain.data.files import write_atomic

FORMAT = "svdtrain-tokenizer-1"
BOS = "<|bos|>"
CHAT_ROLES = ("user", "assistant", "python", "output")
SPECIAL_TOKENS = (BOS, *(f"<|{role}_{edge}|>" for role in CHAT_ROLES for edge in ("start", "end")))

# GPT-4's way of cutting text into words (tiktoken's cl100k_base) with numbers cut every 2 digits instead of 3.
SPLIT_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word with the space or mark before it
        r"\p{N}{1,2}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # punctuation with the line end after it
        r"\s*[\r\n]",
        r"\s+(?!\S)",  # leaves one space to the word that follows
        r"\s+",
    )
)

# tiktoken's regular expression overflows its stack on some 10^6 characters of white space, and panics.
MAX_PIECE_CHARACTERS = 200_000


class Tokenizer:
    """Text to ids and back. `ranks[i]` are the bytes of token i; the special tokens follow them."""

    def __init__(
        self, ranks: list[bytes], *, pattern: str = SPLIT_PATTERN, special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    ) -> None:
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.special_ids = {name: len(ranks) + offset for offset, name in enumerate(special_tokens)}
        self.vocab_size = len(ranks) + len(special_tokens)
        self.bos_id = self.special_ids[BOS]
        self._encoding = tiktoken.Encoding(
            name="svdtrain",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=self.special_ids,
        )

    @classmethod
    def byte_level(cls) -> Tokenizer:
        """One token per byte, and the special tokens: works on any text without training."""
        return cls([bytes([value]) for value in range(256)])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn byte pairs until the vocabulary, special tokens included, has `vocab_size` entries.

        Warns and returns a smaller vocabulary when the text has too few pairs; bytes when rustbpe is missing.
        Raises ValueError when `vocab_size` leaves no room for the 256 bytes.
        """
        num_ranks = vocab_size - len(SPECIAL_TOKENS)
        if num_ranks < 256:
            raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)}, got {vocab_size}")
        try:
            import rustbpe
        except ImportError:
            warnings.warn("rustbpe is not installed: every byte is a token (pip install rustbpe)", stacklevel=2)
            return cls.byte_level()
        trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue], a native module without stubs
        trainer.train_from_iterator(
            (piece for text in texts for piece in _pieces(text)), num_ranks, pattern=SPLIT_PATTERN
        )
        ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
        if len(ranks) < num_ranks:
            actual = len(ranks) + len(SPECIAL_TOKENS)
            warnings.warn(f"the text is too small for {vocab_size} tokens: the vocabulary has {actual}", stacklevel=2)
        return cls(ranks)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS. The names of special tokens in the text are ordinary characters."""
        return [token for piece in _pieces(text) for token in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of every text, in threads (tiktoken works outside the interpreter lock)."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = [piece for some in pieces for piece in some]
        encoded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=num_threads))
        return [[token for _ in some for token in next(encoded)] for some in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, special tokens their names."""
        return self._encoding.decode(list(ids))

    def token_bytes(self) -> torch.Tensor:
        """Bytes of every token, int32 [vocab_size]; 0 for special tokens. Turns a loss into bits per byte."""
        lengths = [len(token) for token in self.ranks] + [0] * len(self.special_tokens)
        return torch.tensor(lengths, dtype=torch.int32)

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "pattern": self.pattern,
            "special_tokens": list(self.special_tokens),
            "ranks": [base64.b64encode(token).decode("ascii") for token in self.ranks],
        }

    def save(self, path: Path | str) -> None:
        """Write JSON, atomically."""
        content = {**self._content(), "fingerprint": self.fingerprint()}
        write_atomic(Path(path), json.dumps(content, indent=0).encode())

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Inverse of `save`. Raises DataError if the file is missing, damaged or of another kind."""
        try:
            content = json.loads(Path(path).read_bytes())
            ranks = [base64.b64decode(token, validate=True) for token in content["ranks"]]
            tokenizer = cls(ranks, pattern=content["pattern"], special_tokens=tuple(content["special_tokens"]))
            intact = content["format"] == FORMAT and content["fingerprint"] == tokenizer.fingerprint()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise _damaged(path) from error
        if not intact:
            raise _damaged(path)
        return tokenizer


def _damaged(path: Path | str) -> DataError:
    return DataError(f"{path} is not an intact tokenizer file: delete it, and it is trained again")


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), MAX_PIECE_CHARACTERS):
        yield text[start : start + MAX_PIECE_CHARACTERS]
