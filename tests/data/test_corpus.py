"""Every kind of corpus: which documents it gives, how it splits them, and what it says when it cannot."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdtrain.data import local
from svdtrain.data.corpus import StdlibCorpus, open_corpus
from svdtrain.data.errors import DataError
from svdtrain.data.hub import VALIDATION_DOCUMENTS, HubCorpus
from svdtrain.data.readers import TEXT_HARD_LIMIT, read_text


def everything(spec: object) -> tuple[list[str], list[str]]:
    corpus = open_corpus(str(spec))
    return list(corpus.documents("train")), list(corpus.documents("val"))


def error_of(spec: object) -> str:
    """The message of the DataError that opening or reading must raise; always one line."""
    with pytest.raises(DataError) as caught:
        everything(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class TestStdlib:
    @pytest.fixture
    def library(self, tmp_path: Path) -> Path:
        root = tmp_path / "python"
        for number in range(200):
            path = root / f"package{number % 7}" / f"module{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"value = {number}\n")
        for name in ("site-packages/other.py", "package0/__pycache__/cached.py", "_sysconfigdata_linux.py"):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("value = 'must not appear'\n")
        (root / "package0" / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é".encode("latin-1"))
        (root / "package0" / "__init__.py").write_text("")
        (root / "sitecustomize.py").symlink_to(tmp_path / "nowhere.py")
        return root

    def test_splits_every_library_file_once(self, library: Path) -> None:
        corpus = StdlibCorpus(library)
        train, val = list(corpus.documents("train")), list(corpus.documents("val"))
        assert sorted(train + val) == sorted(f"value = {number}\n" for number in range(200))
        assert 2 <= len(val) <= 25

    def test_order_and_fingerprint_do_not_depend_on_the_place(self, library: Path, tmp_path: Path) -> None:
        first = StdlibCorpus(library)
        shutil.copytree(library, tmp_path / "elsewhere", symlinks=True)
        second = StdlibCorpus(tmp_path / "elsewhere")
        assert list(first.documents("train")) == list(second.documents("train"))
        assert first.fingerprint() == second.fingerprint()
        (tmp_path / "elsewhere" / "package3" / "module3.py").write_text("value = 4\n")
        assert StdlibCorpus(tmp_path / "elsewhere").fingerprint() != first.fingerprint()

    def test_the_real_one_is_there(self) -> None:
        corpus = open_corpus("stdlib")
        assert corpus.name == "stdlib"
        firsts = [next(corpus.documents("val")), next(corpus.documents("train"))]
        assert all(len(text) > 0 for text in firsts)
        assert firsts[0] != firsts[1]

    def test_a_python_without_sources(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no \.py sources"):
            StdlibCorpus(tmp_path)


class TestParquet:
    def test_last_shard_is_validation(self, shards: Path) -> None:
        train, val = everything(shards)
        tables = [pq.read_table(path)["text"].to_pylist() for path in sorted(shards.glob("*.parquet"))]
        assert train == tables[0] + tables[1] + tables[2]
        assert val == tables[3]

    def test_single_file_holds_out_every_20th_document(self, shards: Path) -> None:
        path = shards / "shard_00000.parquet"
        texts = pq.read_table(path)["text"].to_pylist()
        train, val = everything(path)
        assert val == texts[::20]
        assert train == [text for number, text in enumerate(texts) if number % 20]

    def test_source_keeps_only_its_documents(self, shards: Path) -> None:
        train, val = everything(f"{shards}?source=rust-doc")
        rows = pq.read_table(shards / "shard_00003.parquet").to_pylist()
        assert val == [row["text"] for row in rows if row["source"] == "rust-doc"]
        assert 0 < len(train) < 120

    def test_unknown_source_lists_the_existing_ones(self, shards: Path) -> None:
        message = error_of(f"{shards}?source=cobol")
        assert "'cobol'" in message
        assert "git-doc, linux-kernel, rust-doc" in message

    def test_source_needs_its_column(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
        assert "no column 'source'" in error_of(f"{tmp_path}?source=x")

    def test_blank_and_missing_texts_are_left_out(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": ["a", None, "", "  \n", "b", "c"]}), tmp_path / "a.parquet")
        assert everything(tmp_path) == (["b", "c"], ["a"])

    def test_dictionary_and_large_strings_are_text(self, tmp_path: Path) -> None:
        text = pa.array(["a", "b"]).dictionary_encode()
        pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"text": pa.array(["c"], pa.large_string())}), tmp_path / "b.parquet")
        assert everything(tmp_path) == (["a", "b"], ["c"])

    def test_errors(self, shards: Path, tmp_path: Path) -> None:
        pq.write_table(pa.table({"content": ["a"], "id": [1]}), tmp_path / "columns.parquet")
        assert "no column 'text'; its columns are: content, id" in error_of(tmp_path / "columns.parquet")
        pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
        assert "holds int64, not text" in error_of(tmp_path / "numbers.parquet")
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is not a parquet file PAR1")
        assert "broken.parquet is not a readable parquet file" in error_of(tmp_path / "broken.parquet")
        whole = (shards / "shard_00001.parquet").read_bytes()
        (shards / "shard_00001.parquet").write_bytes(whole[: len(whole) // 2])
        assert "shard_00001.parquet is not a readable parquet file" in error_of(shards)

    def test_damaged_page_inside_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        texts = [random.Random(row).randbytes(100).hex() for row in range(500)]
        pq.write_table(pa.table({"text": texts}), path, compression="zstd", use_dictionary=False)
        content = bytearray(path.read_bytes())
        content[1000:9000] = bytes(8000)
        path.write_bytes(content)
        assert "a.parquet is not a readable parquet file" in error_of(path)

    def test_text_that_is_not_utf8(self, tmp_path: Path) -> None:
        latin = pa.array(["é".encode("latin-1")], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"text": latin}), tmp_path / "a.parquet")
        assert "a.parquet is not UTF-8" in error_of(tmp_path / "a.parquet")


class TestJsonLines:
    def test_reads_text_and_source(self, tmp_path: Path) -> None:
        records = [{"text": f"document {n}", "source": "ab"[n % 2]} for n in range(4)]
        path = write_jsonl(tmp_path / "a.jsonl", records)
        assert everything(path) == (["document 1", "document 2", "document 3"], ["document 0"])
        assert everything(f"{path}?source=b") == (["document 3"], ["document 1"])

    def test_half_a_surrogate_pair_becomes_text(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "x\\ud800y"}\n\n{"text": "\\ud83d\\ude42"}\n')
        assert everything(path) == (["🙂"], ["x\ufffdy"])

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("{broken", "a.jsonl, line 2 is not JSON"),
            ("[1]", "a.jsonl, line 2: expected an object"),
            ('{"body": "x", "id": 1}', "a.jsonl, line 2 has no field 'text'; its fields are: body, id"),
            ('{"text": 5}', "a.jsonl, line 2: the field 'text' holds int, not text"),
            ("[" * 100_000, "a.jsonl, line 2 is not JSON"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path: Path, line: str, expected: str) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
        assert expected in error_of(tmp_path / "a.jsonl")


class TestPlainText:
    def test_blocks_of_paragraphs_put_together_are_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "book.txt"
        text = "".join(f"Paragraph {n} " + "word " * 40 + "\r\n\n" for n in range(200)) + "x" * 40_000 + "\nend"
        path.write_bytes(text.encode())
        blocks = list(read_text(path))
        assert "".join(blocks) == text
        assert len(blocks) > 5
        assert all(block.endswith("\r\n\n") for block in blocks[:5])

    def test_no_blank_lines_still_gives_documents(self, tmp_path: Path) -> None:
        path = tmp_path / "log.txt"
        path.write_text("a line of a log\n" * 20_000)
        assert max(map(len, read_text(path))) < TEXT_HARD_LIMIT + 20

    def test_small_files_are_one_document_each(self, tmp_path: Path) -> None:
        for name in ("c", "a", "b"):
            (tmp_path / f"{name}.txt").write_text(f"file {name}\n\nmore\n")
        (tmp_path / "README.md").write_text("ignored")
        assert everything(tmp_path) == (["file b\n\nmore\n", "file c\n\nmore\n"], ["file a\n\nmore\n"])

    def test_errors(self, tmp_path: Path) -> None:
        (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
        assert "latin.txt is not UTF-8" in error_of(tmp_path / "latin.txt")
        assert "no sources" in error_of(f"{tmp_path / 'latin.txt'}?source=x")


class TestSpec:
    def test_paths(self, tmp_path: Path) -> None:
        assert "does not exist" in error_of(tmp_path / "nowhere")
        assert "is empty" in error_of(tmp_path)
        (tmp_path / "a.pdf").write_text("x")
        assert "no .parquet, .jsonl or .txt file" in error_of(tmp_path)
        assert "must end in" in error_of(tmp_path / "a.pdf")

    def test_options(self, tmp_path: Path) -> None:
        assert "write ?source=NAME" in error_of(f"{tmp_path}?shard=3")
        assert "write ?source=NAME" in error_of(f"{tmp_path}?source=")
        assert "stdlib has no sources" in error_of("stdlib?source=x")

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
    def test_unreadable_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        (tmp_path / "a.txt").chmod(0)
        assert "cannot read" in error_of(tmp_path / "a.txt")


class TestFingerprint:
    def test_follows_content_and_names_not_times_or_places(self, shards: Path, tmp_path: Path) -> None:
        original = open_corpus(str(shards)).fingerprint()
        copy = tmp_path / "copy"
        shutil.copytree(shards, copy)
        os.utime(copy / "shard_00000.parquet", (1, 1))
        assert open_corpus(str(copy)).fingerprint() == original
        (copy / "shard_00000.parquet").rename(copy / "shard_00000b.parquet")
        assert open_corpus(str(copy)).fingerprint() != original

    def test_one_changed_byte(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x" * 1000)
        before = open_corpus(str(tmp_path)).fingerprint()
        (tmp_path / "a.txt").write_text("x" * 500 + "y" + "x" * 499)
        assert open_corpus(str(tmp_path)).fingerprint() != before

    def test_large_corpora_are_sampled_at_both_ends(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(local, "FULL_HASH_BYTES", 100)
        monkeypatch.setattr(local, "HASH_BLOCK_BYTES", 10)
        path = tmp_path / "a.txt"
        prints = set()
        for changed in (None, 0, 9, 990, 999):
            content = bytearray(b"x" * 1000)
            if changed is not None:
                content[changed] = ord("y")
            path.write_bytes(content)
            prints.add(open_corpus(str(path)).fingerprint())
        assert len(prints) == 5

    def test_source_is_part_of_it_but_not_of_the_unfiltered_one(self, shards: Path) -> None:
        whole, part = open_corpus(str(shards)), open_corpus(f"{shards}?source=git-doc")
        assert part.fingerprint() != whole.fingerprint()
        assert part.unfiltered().fingerprint() == whole.unfiltered().fingerprint() == whole.fingerprint()


class FakeRows:
    """What `datasets` returns for a streamed dataset, as far as it is used."""

    def __init__(self, rows: list[dict], column_names: list[str] | None) -> None:
        self.rows, self.column_names = rows, column_names

    def __iter__(self):
        return iter(self.rows)

    def select_columns(self, names: list[str]):
        return FakeRows([{name: row[name] for name in names} for row in self.rows], names)


class TestHub:
    @pytest.fixture
    def fake_hub(self, monkeypatch: pytest.MonkeyPatch) -> dict:
        served: dict = {"columns": ["text", "source", "id"]}

        def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> FakeRows:
            served["asked"] = (name, config, split, streaming)
            rows = [{"text": f"page {n}", "source": "ab"[n % 2], "id": n} for n in range(2 * VALIDATION_DOCUMENTS + 9)]
            return FakeRows(rows, served["columns"])

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        return served

    @pytest.mark.parametrize("announced", [True, False])
    def test_first_documents_are_validation(self, fake_hub: dict, announced: bool) -> None:
        if not announced:
            fake_hub["columns"] = None
        train, val = everything("hf:org/name:sample")
        assert fake_hub["asked"] == ("org/name", "sample", "train", True)
        assert val == [f"page {n}" for n in range(VALIDATION_DOCUMENTS)]
        assert train[0] == f"page {VALIDATION_DOCUMENTS}"
        assert len(train) == VALIDATION_DOCUMENTS + 9

    def test_source(self, fake_hub: dict) -> None:
        train, val = everything("hf:org/name?source=b")
        assert fake_hub["asked"][:2] == ("org/name", None)
        assert val[:2] == ["page 1", "page 3"]
        assert len(train) == 4

    def test_no_text_column(self, fake_hub: dict) -> None:
        fake_hub["columns"] = ["content"]
        assert "no column 'text'; its columns are: content" in error_of("hf:org/name")

    def test_offline_is_one_line(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        logger = logging.getLogger("huggingface_hub.utils")
        level = logger.getEffectiveLevel()

        def load_dataset(*_: object, **__: object) -> None:
            logger.warning("retrying")
            raise ConnectionError("no route\nto host")

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        message = error_of("hf:org/name")
        assert "ConnectionError: no route)" in message
        assert "--data stdlib" in message
        assert caplog.records == []
        assert logger.getEffectiveLevel() == level

    def test_package_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert "pip install datasets" in error_of("hf:org/name")

    def test_name_missing(self) -> None:
        assert "needs a name" in error_of("hf:")

    def test_fingerprint_needs_no_network(self) -> None:
        prints = {HubCorpus.from_spec(spec).fingerprint() for spec in ("hf:a/b", "hf:a/b:c", "hf:a/bc")}
        assert len(prints) == 3


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_any_text_file_comes_back_whole(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    assert "".join(read_text(path)) == text.removeprefix("\ufeff")
