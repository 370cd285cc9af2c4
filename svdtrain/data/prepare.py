"""Text to tokens on disk, once: `prepare` trains the tokenizer, tokenises, and finds both again the next time.

    CACHE/tokenizers/CORPUS-VOCAB.json       by corpus fingerprint and vocabulary size
    CACHE/tokens/KEY/{train,val}_NNNNN.bin   by corpus, tokenizer and limits
    CACHE/tokens/KEY/index.json              written last
    CACHE/locks/CORPUS.lock

A cache entry is made in a directory of its own and renamed into place when complete, so a kill leaves nothing that is
believed, and two processes at once (even where file locks do not work) end with one whole entry. The lock only saves
the second one the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from svdtrain.data.base import Corpus, Split
from svdtrain.data.corpus import open_corpus
from svdtrain.data.errors import DataError
from svdtrain.data.files import exclusive, write_atomic
from svdtrain.data.token_files import TokenFiles, TokenWriter
from svdtrain.data.tokenizer import Tokenizer

FORMAT = "svdtrain-tokens-1"
TOKENIZER_SAMPLE_CHARACTERS = 8_000_000  # 30 MB instead of 8 gains 0.5 % compression on the standard library
TOKENIZER_DOCUMENT_CHARACTERS = 20_000  # no single document shapes the vocabulary
ENCODE_BATCH_CHARACTERS = 4_000_000
ABANDONED_AFTER_S = 24 * 3600
MAX_THREADS = 16

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A tokenizer and the two splits tokenised with it."""

    name: str
    fingerprint: str
    """Hash of corpus, tokenizer and limits: the same value means the same tokens."""
    tokenizer: Tokenizer
    train: TokenFiles
    val: TokenFiles


@dataclass(frozen=True, kw_only=True)
class _Request:
    corpus: Corpus
    vocab_size: int
    cache: Path
    max_tokens: dict[Split, int]
    given_tokenizer: Tokenizer | None

    @property
    def tokenizer_path(self) -> Path:
        sample = f"{FORMAT} {TOKENIZER_SAMPLE_CHARACTERS} {TOKENIZER_DOCUMENT_CHARACTERS} "
        key = hashlib.sha256((sample + self.corpus.unfiltered().fingerprint()).encode()).hexdigest()[:24]
        return self.cache / "tokenizers" / f"{key}-{self.vocab_size}.json"

    def key(self, tokenizer: Tokenizer) -> str:
        parts = [FORMAT, self.corpus.fingerprint(), tokenizer.fingerprint(), json.dumps(self.max_tokens)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def directory(self, tokenizer: Tokenizer) -> Path:
        return self.cache / "tokens" / self.key(tokenizer)


def default_cache_dir() -> Path:
    """$SVDTRAIN_CACHE, or ~/.cache/svdtrain."""
    return Path(os.environ.get("SVDTRAIN_CACHE") or "~/.cache/svdtrain").expanduser()


def prepare(
    spec: str,
    *,
    vocab_size: int,
    cache_dir: Path | str | None = None,
    max_train_tokens: int,
    max_val_tokens: int = 4_000_000,
    on_progress: Progress | None = None,
    tokenizer: Tokenizer | None = None,
) -> PreparedData:
    """Tokenised text of the corpus `spec`, from the cache if it is there.

    Args:
        spec: see svdtrain.data.corpus. A source filter does not change the tokenizer, so all sources of a corpus
            share its ids.
        vocab_size: special tokens included; 0: bytes.
        max_train_tokens, max_val_tokens: the splits are cut there.
        on_progress: gets a line of text now and then, when there is work to do.
        tokenizer: use this one instead of training one; `vocab_size` is then ignored.

    Raises:
        DataError: the text cannot be read or is empty, or the cache cannot be written.
    """
    limits: dict[Split, int] = {"train": max_train_tokens, "val": max_val_tokens}
    for split, limit in limits.items():
        if limit < 2:
            raise ValueError(f"max_{split}_tokens must be at least 2, got {limit}")
    request = _Request(
        corpus=open_corpus(spec),
        vocab_size=vocab_size,
        cache=Path(cache_dir).expanduser() if cache_dir else default_cache_dir(),
        max_tokens=limits,
        given_tokenizer=Tokenizer.byte_level() if tokenizer is None and vocab_size == 0 else tokenizer,
    )
    say = on_progress or (lambda line: None)
    return _load(request) or _build_exclusively(request, say)


def _load(request: _Request) -> PreparedData | None:
    """What the cache has, without lock or writing, so that a read-only cache works."""
    tokenizer = request.given_tokenizer
    if tokenizer is None:
        try:
            tokenizer = Tokenizer.load(request.tokenizer_path)
        except DataError:  # missing, or damaged: _build says so
            return None
    splits = _read_index(request.directory(tokenizer))
    return None if splits is None else _prepared(request, tokenizer, splits)


def _prepared(request: _Request, tokenizer: Tokenizer, splits: dict[str, TokenFiles]) -> PreparedData:
    return PreparedData(
        name=request.corpus.name,
        fingerprint=request.key(tokenizer),
        tokenizer=tokenizer,
        train=splits["train"],
        val=splits["val"],
    )


def _read_index(directory: Path) -> dict[str, TokenFiles] | None:
    """The splits of a cache entry; None unless it is complete."""
    try:
        index = json.loads((directory / "index.json").read_bytes())
        splits = {name: TokenFiles.from_index(directory, name, index["splits"][name]) for name in ("train", "val")}
        intact = index["format"] == FORMAT and all(files.is_intact() for files in splits.values())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return splits if intact else None


def _build_exclusively(request: _Request, say: Progress) -> PreparedData:
    lock = request.cache / "locks" / f"{request.corpus.unfiltered().fingerprint()[:24]}.lock"
    try:
        with exclusive(lock, lambda: say("waiting for another process that prepares the same text")):
            return _build(request, say)
    except OSError as error:
        raise DataError(
            f"cannot write the cache {request.cache} ({error.strerror or error}): free some space, or name another "
            "directory with --cache-dir or SVDTRAIN_CACHE"
        ) from error


def _build(request: _Request, say: Progress) -> PreparedData:
    tokenizer = request.given_tokenizer or _cached_tokenizer(request, say)
    directory = request.directory(tokenizer)
    _remove_abandoned(directory.parent)
    splits = _read_index(directory)
    if splits is None:
        if directory.exists():
            warnings.warn(f"the cached tokens in {directory} are damaged: making them again", stacklevel=2)
            shutil.rmtree(directory)
        splits = _write_entry(request, tokenizer, directory, say)
    return _prepared(request, tokenizer, splits)


def _cached_tokenizer(request: _Request, say: Progress) -> Tokenizer:
    path = request.tokenizer_path
    if path.exists():
        try:
            return Tokenizer.load(path)
        except DataError as error:
            warnings.warn(f"{error}; training it again", stacklevel=2)
    say(f"training a tokenizer of {request.vocab_size} tokens")
    tokenizer = Tokenizer.train(_tokenizer_sample(request.corpus.unfiltered()), request.vocab_size)
    if len(tokenizer.ranks) > 256:  # bytes cost nothing to make, and must not stay when rustbpe gets installed
        tokenizer.save(path)
    return tokenizer


def _tokenizer_sample(corpus: Corpus) -> Iterator[str]:
    room = TOKENIZER_SAMPLE_CHARACTERS
    for text in corpus.documents("train"):
        if room <= 0:
            return
        yield text[: min(room, TOKENIZER_DOCUMENT_CHARACTERS)]
        room -= min(len(text), TOKENIZER_DOCUMENT_CHARACTERS)


def _remove_abandoned(parent: Path) -> None:
    """Delete what killed processes left. By age, since another machine may be writing where locks are local."""
    for directory in parent.glob("tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - directory.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(directory, ignore_errors=True)


def _write_entry(request: _Request, tokenizer: Tokenizer, directory: Path, say: Progress) -> dict[str, TokenFiles]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f"tmp-{uuid.uuid4().hex}"  # not mkdtemp: others may read a shared cache
    temporary.mkdir()
    try:
        splits = {split: _tokenise(request, tokenizer, temporary, split, say) for split in request.max_tokens}
        index = {
            "format": FORMAT,
            "corpus": request.corpus.name,
            "corpus_fingerprint": request.corpus.fingerprint(),
            "tokenizer_fingerprint": tokenizer.fingerprint(),
            "splits": {split: files.to_index() for split, files in splits.items()},
        }
        write_atomic(temporary / "index.json", json.dumps(index, indent=1).encode())
        with contextlib.suppress(OSError):  # another process was first: below we read its entry, or fail
            os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    published = _read_index(directory)
    if published is None:
        raise OSError(f"{directory} could not be put in place")
    return published


def _tokenise(request: _Request, tokenizer: Tokenizer, directory: Path, split: Split, say: Progress) -> TokenFiles:
    limit, num_threads = request.max_tokens[split], min(_num_processors(), MAX_THREADS)
    token_bytes = tokenizer.token_bytes().numpy()
    writer = TokenWriter(directory, split, bos_id=tokenizer.bos_id, token_bytes=token_bytes)
    try:
        for texts in _batches_of_text(request.corpus.documents(split)):
            for ids in tokenizer.encode_batch(texts, num_threads):
                writer.add(ids, limit)
            say(f"tokenised {writer.num_tokens / 1e6:.1f}M {split} tokens")
            if writer.num_tokens >= limit:
                break
        if writer.num_documents == 0:
            what, fix = ("training", "") if split == "train" else ("validation", " more than one document is needed;")
            raise DataError(f"{request.corpus.name} holds no {what} text:{fix} give more text with --data")
        return writer.close()
    finally:
        writer.abandon()


def _batches_of_text(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    length = 0
    for text in documents:
        batch.append(text)
        length += len(text)
        if length >= ENCODE_BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _num_processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # counts what a batch system granted, not what the node has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
