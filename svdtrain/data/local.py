"""Text in local files: parquet shards, JSON lines, plain text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from svdtrain.data.base import Corpus, Split
from svdtrain.data.errors import DataError
from svdtrain.data.readers import READERS, list_sources

HOLD_OUT_EVERY = 20  # documents 0, 20, 40 ... are validation, so two documents are enough for both splits
FULL_HASH_BYTES = 2 << 30  # above this total, files are hashed by samples
HASH_BLOCK_BYTES = 1 << 20
HASH_SAMPLES = 4


def open_local(path: Path, source: str | None = None) -> LocalCorpus:
    """A file or a directory as a corpus. In a directory .parquet goes before .jsonl before .txt; not recursive.

    Raises:
        DataError: missing path, unknown kind, empty directory, unknown source (the existing ones are listed).
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: --data takes stdlib, hf:NAME, or a path to text files")
    corpus = LocalCorpus(path, _files_in(path) if path.is_dir() else [_known_file(path)], source)
    if source is not None:
        _check_source(corpus, source)
    return corpus


def _files_in(directory: Path) -> list[Path]:
    try:
        files = sorted(p for p in directory.iterdir() if p.is_file() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list {directory}: {error.strerror}") from error
    if not files:
        raise DataError(f"{directory} is empty: put .parquet, .jsonl or .txt files there")
    for suffix in READERS:
        chosen = [p for p in files if p.suffix == suffix]
        if chosen:
            return chosen
    raise DataError(f"{directory} holds no .parquet, .jsonl or .txt file (first file there: {files[0].name})")


def _known_file(path: Path) -> Path:
    if path.suffix not in READERS:
        raise DataError(f"cannot read {path}: the name must end in .parquet, .jsonl or .txt")
    return path


def _check_source(corpus: LocalCorpus, source: str) -> None:
    existing = sorted(set().union(*(list_sources(path) for path in corpus.files)))
    if source not in existing:
        shown = ", ".join(existing[:40]) + (", ..." if len(existing) > 40 else "")
        raise DataError(f"no document of {corpus.path} has the source {source!r}; existing sources: {shown}")


class LocalCorpus(Corpus):
    """Files of one kind, in the order of their names.

    Two or more parquet shards: the last one is validation (nanochat's layout). Anything else: every 20th document.
    """

    def __init__(self, path: Path, files: list[Path], source: str | None = None) -> None:
        self.path, self.files, self.source = path, files, source
        self.name = path.resolve().name + (f"?source={source}" if source else "")
        self._last_is_validation = files[0].suffix == ".parquet" and len(files) > 1

    def unfiltered(self) -> LocalCorpus:
        return self if self.source is None else self._unfiltered

    @cached_property
    def _unfiltered(self) -> LocalCorpus:
        return LocalCorpus(self.path, self.files)

    @cached_property
    def _fingerprint(self) -> str:
        if self.source is not None:
            return hashlib.sha256(f"{self._unfiltered.fingerprint()} {self.source!r}".encode()).hexdigest()
        total_bytes = sum(path.stat().st_size for path in self.files)
        digest = hashlib.sha256(b"local 1")
        for path in self.files:
            digest.update(f"{path.name!r} {path.stat().st_size} ".encode())
            digest.update(_hash_file(path, whole=total_bytes <= FULL_HASH_BYTES))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Hash of names, sizes and contents. Above 2 GiB in all, 4 blocks of 1 MiB per file stand for its content:
        a change elsewhere that keeps the size goes unnoticed."""
        try:
            return self._fingerprint
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    def documents(self, split: Split) -> Iterator[str]:
        if self._last_is_validation:
            for path in self.files[-1:] if split == "val" else self.files[:-1]:
                yield from self._read(path)
            return
        everything = (text for path in self.files for text in self._read(path))
        for number, text in enumerate(everything):
            if (number % HOLD_OUT_EVERY == 0) == (split == "val"):
                yield text

    def _read(self, path: Path) -> Iterator[str]:
        texts = READERS[path.suffix](path, self.source)
        return (text for text in texts if text and not text.isspace())


def _hash_file(path: Path, *, whole: bool) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if whole:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
            return digest.digest()
        last_offset = max(0, path.stat().st_size - HASH_BLOCK_BYTES)
        for sample in range(HASH_SAMPLES):
            file.seek(last_offset * sample // (HASH_SAMPLES - 1))
            digest.update(file.read(HASH_BLOCK_BYTES))
    return digest.digest()
