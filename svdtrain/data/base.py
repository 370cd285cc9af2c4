"""What every corpus is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

Split = Literal["train", "val"]


class Corpus(ABC):
    """Documents in a fixed order, split once and for all into training and validation."""

    name: str

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides the documents; never of times or absolute paths. Keys the cache."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, always in the same order, none of them empty. Raises DataError."""

    def unfiltered(self) -> Corpus:
        """The corpus without its source filter: the tokenizer is trained on this, so that all sources share one."""
        return self
