"""The token cache: right content, reuse, and every way in which it can be interrupted or damaged."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from svdtrain.data import token_files
from svdtrain.data.corpus import open_corpus
from svdtrain.data.errors import DataError
from svdtrain.data.stream import PreparedData, TokenStream, default_cache_dir, prepare, validation_batches
from svdtrain.data.tokenizer import Tokenizer

SPAWN = multiprocessing.get_context("spawn")


def prepare_small(spec: object, cache: Path, **changes) -> PreparedData:
    settings = {"vocab_size": 300, "cache_dir": cache, "max_train_tokens": 10**9, **changes}
    return prepare(str(spec), **settings)


def documents_in(data: PreparedData, split: str) -> list[str]:
    """The text back from the tokens."""
    files = getattr(data, split)
    tokens = files.tokens(0, files.num_tokens)
    return [data.tokenizer.decode(ids[1:].tolist()) for ids in np.split(tokens, files.document_starts()[1:])]


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "tokens").iterdir())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class TestContent:
    def test_every_document_with_bos_before_it(self, shards: Path, cache: Path) -> None:
        data = prepare_small(shards, cache)
        corpus = open_corpus(str(shards))
        assert data.name == "shards"
        assert data.tokenizer.vocab_size == 300
        for split in ("train", "val"):
            files, texts = getattr(data, split), list(corpus.documents(split))
            assert documents_in(data, split) == texts
            assert files.num_documents == len(texts)
            assert files.num_bytes == sum(len(text.encode()) for text in texts)
            assert (files.tokens(0, files.num_tokens)[files.document_starts()] == data.tokenizer.bos_id).all()

    def test_many_small_shards_hold_the_same(self, shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = prepare_small(shards, cache)
        monkeypatch.setattr(token_files, "SHARD_TOKENS", 1000)
        split = prepare_small(shards, cache / "other")
        assert len(split.train.shard_paths()) > 3
        assert documents_in(split, "train") == documents_in(whole, "train")
        assert prepare_small(shards, cache / "other").train == split.train

    def test_limits_cut_the_splits_exactly(self, shards: Path, cache: Path) -> None:
        whole = prepare_small(shards, cache)
        short = prepare_small(shards, cache, max_train_tokens=1234, max_val_tokens=100)
        assert (short.train.num_tokens, short.val.num_tokens) == (1234, 100)
        assert short.train.tokens(0, 1234).tolist() == whole.train.tokens(0, 1234).tolist()
        assert short.fingerprint != whole.fingerprint
        with pytest.raises(ValueError, match="max_val_tokens must be at least 2"):
            prepare_small(shards, cache, max_val_tokens=1)

    def test_bytes(self, shards: Path, cache: Path) -> None:
        data = prepare_small(shards, cache, vocab_size=0)
        assert data.tokenizer.vocab_size == 265
        assert data.train.num_tokens == data.train.num_bytes + data.train.num_documents
        assert not (cache / "tokenizers").exists()

    def test_sources_share_the_tokenizer(self, shards: Path, cache: Path) -> None:
        parts = [prepare_small(f"{shards}?source={name}", cache) for name in ("rust-doc", "git-doc")]
        whole = prepare_small(shards, cache)
        assert {part.tokenizer.fingerprint() for part in parts} == {whole.tokenizer.fingerprint()}
        assert len({part.fingerprint for part in [*parts, whole]}) == 3
        assert len(list((cache / "tokenizers").iterdir())) == 1
        assert sum(part.train.num_documents for part in parts) < whole.train.num_documents

    def test_given_tokenizer(self, shards: Path, cache: Path) -> None:
        data = prepare_small(shards, cache, tokenizer=Tokenizer.byte_level())
        assert data.fingerprint == prepare_small(shards, cache, vocab_size=0).fingerprint

    def test_from_text_to_batches(self, shards: Path, cache: Path) -> None:
        data = prepare_small(shards, cache)
        stream = TokenStream(data.train, batch_size=4, seq_len=32, seed=0)
        inputs, _ = stream.batch(0)
        assert (inputs[:, 0] == data.tokenizer.bos_id).all()
        assert int(inputs.max()) < data.tokenizer.vocab_size
        assert len(validation_batches(data.val, 4, 32, 10**6)) > 1


class TestReuse:
    def test_second_time_does_no_work(self, shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        first = prepare_small(shards, cache, on_progress=said.append)
        assert said[0] == "training a tokenizer of 300 tokens"
        assert said[-1].endswith("val tokens")
        said.clear()
        monkeypatch.setattr(Tokenizer, "train", None)
        monkeypatch.setattr(Tokenizer, "encode_batch", None)
        second = prepare_small(shards, cache, on_progress=said.append)
        assert said == []
        assert second.fingerprint == first.fingerprint
        assert second.train == first.train

    def test_other_limits_reuse_the_tokenizer(self, shards: Path, cache: Path) -> None:
        prepare_small(shards, cache)
        said: list[str] = []
        prepare_small(shards, cache, max_train_tokens=500, on_progress=said.append)
        assert not any("training" in line for line in said)
        prepare_small(shards, cache, vocab_size=310, on_progress=said.append)
        assert any("training a tokenizer of 310" in line for line in said)

    def test_changed_text_is_prepared_anew(self, tmp_path: Path, cache: Path) -> None:
        for text in ("old", "new"):
            (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text} {n}"}}\n' for n in range(4)))
            assert documents_in(prepare_small(tmp_path / "a.jsonl", cache, vocab_size=0), "val") == [f"{text} 0"]

    def test_works_without_writing_and_is_readable_for_others(self, shards: Path, cache: Path) -> None:
        prepare_small(shards, cache)
        prepare_small(shards, cache, vocab_size=0)
        before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
        prepare_small(shards, cache)
        prepare_small(shards, cache, vocab_size=0)
        assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
        umask = os.umask(0)
        os.umask(umask)
        kinds = {path.stat().st_mode & 0o777 for path in cache.rglob("*")}
        assert kinds == {0o777 & ~umask, 0o666 & ~umask}

    def test_default_place(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("SVDTRAIN_CACHE", str(tmp_path))
        assert default_cache_dir() == tmp_path
        monkeypatch.delenv("SVDTRAIN_CACHE")
        assert default_cache_dir() == Path.home() / ".cache" / "svdtrain"

    def test_bytes_for_want_of_rustbpe_do_not_stay(
        self, shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "rustbpe", None)
            with pytest.warns(UserWarning, match="pip install rustbpe"):
                assert prepare_small(shards, cache).tokenizer.vocab_size == 265
        assert prepare_small(shards, cache).tokenizer.vocab_size == 300


class TestDamage:
    @pytest.mark.parametrize("name", ["train_00000.bin", "val_00000.bin", "index.json"])
    @pytest.mark.parametrize("how", ["truncated", "longer", "missing"])
    def test_damaged_entry_is_made_again(self, shards: Path, cache: Path, name: str, how: str) -> None:
        first = prepare_small(shards, cache)
        texts = documents_in(first, "train")
        path = first.train.directory / name
        content = path.read_bytes()
        path.unlink()  # a new file: the old one may still be mapped
        if how != "missing":
            path.write_bytes(content[:-2] if how == "truncated" else content + b"\0\0")
        with pytest.warns(UserWarning, match="damaged: making them again"):
            second = prepare_small(shards, cache)
        assert documents_in(second, "train") == texts
        assert path.read_bytes() == content

    def test_index_of_another_format(self, shards: Path, cache: Path) -> None:
        path = prepare_small(shards, cache).train.directory / "index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps({**index, "format": "something else"}))
        with pytest.warns(UserWarning, match="damaged"):
            prepare_small(shards, cache)

    def test_damaged_tokenizer_is_trained_again(self, shards: Path, cache: Path) -> None:
        first = prepare_small(shards, cache)
        (path,) = (cache / "tokenizers").iterdir()
        path.write_text(path.read_text()[:-20])
        with pytest.warns(UserWarning, match="not an intact tokenizer file.*; training it again"):
            second = prepare_small(shards, cache)
        assert second.fingerprint == first.fingerprint

    def test_failure_leaves_nothing_behind(self, shards: Path, cache: Path) -> None:
        (shards / "shard_00003.parquet").write_bytes(b"broken")
        with pytest.raises(DataError, match="shard_00003"):
            prepare_small(shards, cache)
        assert entries(cache) == []

    def test_what_killed_processes_left_goes_after_a_day(self, shards: Path, cache: Path) -> None:
        old, new = cache / "tokens" / "tmp-old", cache / "tokens" / "tmp-new"
        for directory in (old, new):
            directory.mkdir(parents=True)
            (directory / "train_00000.bin").write_bytes(b"half")
        two_days_ago = time.time() - 2 * 24 * 3600
        os.utime(old, (two_days_ago, two_days_ago))
        prepare_small(shards, cache)
        assert not old.exists()
        assert new.exists()


class TestErrors:
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_disk_full(self, shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        def fail(handle: int) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(DataError, match=f"cannot write the cache .*{os.strerror(code)}.*--cache-dir") as caught:
                prepare_small(shards, cache, vocab_size=0)
        assert "\n" not in str(caught.value)
        assert entries(cache) == []
        prepare_small(shards, cache, vocab_size=0)

    def test_cache_that_is_a_file(self, shards: Path, cache: Path) -> None:
        cache.write_text("in the way")
        with pytest.raises(DataError, match="cannot write the cache"):
            prepare_small(shards, cache)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("", "holds no training text: give more text"),
            ('{"text": "alone"}\n', "holds no training text"),
            ('{"text": " "}\n' * 9, "holds no training text"),
        ],
    )
    def test_empty_corpus(self, tmp_path: Path, cache: Path, content: str, expected: str) -> None:
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(DataError, match=expected):
            prepare_small(tmp_path / "a.jsonl", cache, vocab_size=0)

    def test_no_validation_text(self, shards: Path, cache: Path) -> None:
        pq = pytest.importorskip("pyarrow.parquet")
        table = pq.read_table(shards / "shard_00003.parquet")
        pq.write_table(table.slice(0, 0), shards / "shard_00003.parquet")
        with pytest.raises(DataError, match="holds no validation text"):
            prepare_small(shards, cache, vocab_size=0)

    def test_tiny_corpus(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "tiny"}\n' * 3)
        data = prepare_small(tmp_path / "a.jsonl", cache, vocab_size=0)
        with pytest.raises(DataError, match="training text is too small"):
            TokenStream(data.train, batch_size=4, seq_len=512, seed=0)
        with pytest.raises(DataError, match="validation text is too small"):
            validation_batches(data.val, 4, 512, 1000)


def prepare_and_die(spec: Path, cache: Path, at: str) -> None:
    """Killed in the middle, as by a scheduler: no clean-up code runs."""

    def on_progress(line: str) -> None:
        if at in line:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare_small(spec, cache, on_progress=on_progress)


def prepare_together(spec: Path, cache: Path, start, results) -> None:
    """Twice: with file locks, and as on a file system that has none."""
    for vocab_size in (300, 0):
        if vocab_size == 0:
            sys.modules["fcntl"] = None  # type: ignore[assignment]
            warnings.simplefilter("ignore")
        said: list[str] = []
        start.wait(60)
        data = prepare_small(spec, cache, vocab_size=vocab_size, on_progress=said.append)
        worked = any("train tokens" in line for line in said)
        results.put((vocab_size, worked, data.fingerprint, documents_in(data, "train")))


@pytest.mark.dist
class TestProcesses:
    def test_killed_in_the_middle(self, shards: Path, cache: Path) -> None:
        process = SPAWN.Process(target=prepare_and_die, args=(shards, cache, "val tokens"))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert [path.name[:4] for path in entries(cache)] == ["tmp-"]
        data = prepare_small(shards, cache)
        assert documents_in(data, "train") == list(open_corpus(str(shards)).documents("train"))

    def test_two_at_once(self, shards: Path, cache: Path) -> None:
        start, results = SPAWN.Barrier(2), SPAWN.Queue()
        processes = [SPAWN.Process(target=prepare_together, args=(shards, cache, start, results)) for _ in range(2)]
        for process in processes:
            process.start()
        reports = sorted(results.get(timeout=60) for _ in range(4))
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        expected = list(open_corpus(str(shards)).documents("train"))
        assert all(report[3] == expected for report in reports)
        assert reports[0][2] == reports[1][2] != reports[2][2] == reports[3][2]
        assert [report[1] for report in reports[2:]] == [False, True]  # with locks, one did the work
        assert len(entries(cache)) == 2


def test_without_file_locks_it_warns_and_works(shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.warns(UserWarning, match="no file locks"):
        prepare_small(shards, cache, vocab_size=0)
    assert len(entries(cache)) == 1


def test_another_process_was_first(shards: Path, cache: Path, tmp_path: Path) -> None:
    """Without locks: the whole entry appears while this process is writing its own."""
    theirs = prepare_small(shards, tmp_path / "theirs", vocab_size=0).train.directory

    def on_progress(line: str) -> None:
        if "val tokens" in line:
            shutil.copytree(theirs, cache / "tokens" / theirs.name)

    ours = prepare_small(shards, cache, vocab_size=0, on_progress=on_progress)
    assert entries(cache) == [ours.train.directory]
    assert documents_in(ours, "train") == list(open_corpus(str(shards)).documents("train"))


@pytest.mark.skipif(not os.environ.get("SVDTRAIN_TECHDOCS"), reason="SVDTRAIN_TECHDOCS names no directory")
def test_real_shards(cache: Path) -> None:
    """A directory of parquet shards of technical English with the columns text and source."""
    data = prepare_small(os.environ["SVDTRAIN_TECHDOCS"], cache, vocab_size=1024, max_train_tokens=500_000)
    assert data.train.num_tokens == 500_000
    assert data.train.num_bytes / data.train.num_tokens > 2.0
    first = next(open_corpus(os.environ["SVDTRAIN_TECHDOCS"]).documents("val"))
    assert documents_in(data, "val")[0] == first
    with pytest.raises(DataError, match="existing sources: "):
        open_corpus(os.environ["SVDTRAIN_TECHDOCS"] + "?source=none-such")
