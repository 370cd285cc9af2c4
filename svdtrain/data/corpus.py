"""Where the text comes from: `open_corpus(spec)` gives documents, split into training and validation.

stdlib                     the Python standard library's own sources; needs no network and no files
DIR                        parquet shards (column `text`); the last one by name is validation
FILE or DIR                .parquet, .jsonl (field `text`) or .txt; every 20th document is validation
hf:NAME[:CONFIG]           streamed from the Hugging Face hub, e.g. hf:HuggingFaceFW/fineweb-edu:sample-10BT
...?source=NAME            only documents whose `source` column (or field) equals NAME
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from svdtrain.data.base import Corpus, Split
from svdtrain.data.errors import DataError
from svdtrain.data.hub import HubCorpus
from svdtrain.data.local import open_local

STDLIB_VALIDATION_SHARE = 0.05
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


def open_corpus(spec: str) -> Corpus:
    """The corpus that `spec` names (see the head of this file).

    Raises:
        DataError: the path is missing or holds nothing readable, or the source does not exist.
    """
    base, source = _split_source(spec)
    if base == "stdlib":
        if source is not None:
            raise DataError("stdlib has no sources to choose from: drop ?source=...")
        return StdlibCorpus()
    if base.startswith("hf:"):
        return HubCorpus.from_spec(base, source)
    return open_local(Path(base).expanduser(), source)


def _split_source(spec: str) -> tuple[str, str | None]:
    base, question_mark, option = spec.partition("?")
    if not question_mark:
        return base, None
    key, _, value = option.partition("=")
    if key != "source" or not value:
        raise DataError(f"cannot read the option {option!r} of --data {spec}: write ?source=NAME")
    return base, value


class StdlibCorpus(Corpus):
    """The .py files of the running interpreter's standard library, one document each.

    The SHA-256 of a file's relative path decides both its split and its place in the order, so that any prefix is a
    fair sample of the library and neither depends on the file system. Left out: installed packages, the build's own
    settings (_sysconfigdata*) and files that are not UTF-8 (the test suite holds some on purpose).
    """

    name = "stdlib"

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
        if not self._files:
            raise DataError(f"no .py sources in {self.root} (a stripped Python?): give a text with --data instead")

    @cached_property
    def _files(self) -> list[tuple[str, Path]]:
        found = []
        for directory, subdirectories, names in os.walk(self.root):
            subdirectories[:] = set(subdirectories) - NOT_LIBRARY  # site-packages may be huge: do not even look
            for name in names:
                path = Path(directory, name)
                is_source = name.endswith(".py") and not name.startswith("_sysconfigdata")
                if is_source and path.is_file():  # Linux distributions link some into /etc, at times to nowhere
                    relative = path.relative_to(self.root).as_posix()
                    found.append((hashlib.sha256(relative.encode()).hexdigest(), path))
        return sorted(found)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"stdlib 1 {platform.python_version()}".encode())
        for key, path in self._files:
            digest.update(key.encode() + hashlib.sha256(_read_bytes(path)).digest())
        return digest.hexdigest()

    def documents(self, split: Split) -> Iterator[str]:
        for key, path in self._files:
            in_validation = int(key[:8], 16) < STDLIB_VALIDATION_SHARE * 2**32
            if in_validation == (split == "val"):
                text = _decode_or_none(_read_bytes(path))
                if text and not text.isspace():
                    yield text


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _decode_or_none(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None
