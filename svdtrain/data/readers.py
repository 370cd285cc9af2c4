"""One reader per file kind: `read(path, source) -> texts`. Every failure is a DataError that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from svdtrain.data.errors import DataError, first_line

# A plain text file has no documents of its own: one ends at the first blank line after the soft limit, or at the
# first line end after the hard one. Pieces this long keep context; shorter ones would make rows of unrelated scraps.
TEXT_SOFT_LIMIT = 4096
TEXT_HARD_LIMIT = 16384


def read_parquet(path: Path, source: str | None = None) -> Iterator[str]:
    """Column `text`, row by row, a few hundred rows in memory at a time."""
    for batch in _parquet_batches(path, ["text"] if source is None else ["text", "source"]):
        for row in range(len(batch["text"])):
            if source is None or batch["source"][row] == source:
                yield batch["text"][row] or ""


def _parquet_batches(path: Path, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_parquet_columns(path, file.schema_arrow, columns)
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield batch.to_pydict()
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = first_line(error)
        raise DataError(f"{path} is not a readable parquet file ({reason}): remove it or fetch it again") from error


def _check_parquet_columns(path: Path, schema: Any, columns: list[str]) -> None:
    import pyarrow.types as types

    for column in columns:
        if column not in schema.names:
            raise DataError(f"{path} has no column {column!r}; its columns are: {', '.join(schema.names)}")
        kind = schema.field(column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise DataError(f"{path}: the column {column!r} holds {kind}, not text")


def read_jsonl(path: Path, source: str | None = None) -> Iterator[str]:
    """Field `text` of every line. Halves of surrogate pairs, which JSON can spell, become U+FFFD."""
    for number, record in _json_records(path):
        if source is None or _json_field(path, number, record, "source") == source:
            text = _json_field(path, number, record, "text")
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not text.isascii() else text


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_utf8_lines(path), start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON ({first_line(error)})") from error
        if not isinstance(record, dict):
            raise DataError(f'{path}, line {number}: expected an object such as {{"text": "..."}}')
        yield number, record


def _json_field(path: Path, number: int, record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise DataError(f"{path}, line {number} has no field {field!r}; its fields are: {', '.join(record)}")
    value = record[field]
    if not isinstance(value, str | None):
        raise DataError(f"{path}, line {number}: the field {field!r} holds {type(value).__name__}, not text")
    return value or ""


def read_text(path: Path, source: str | None = None) -> Iterator[str]:
    """Blocks of paragraphs; put together they are the file again. A small file is one document."""
    if source is not None:
        raise _no_source_in_text(path)
    lines: list[str] = []
    length = 0
    for line in _utf8_lines(path):
        lines.append(line)
        length += len(line)
        if (length >= TEXT_SOFT_LIMIT and line.isspace()) or length >= TEXT_HARD_LIMIT:
            yield "".join(lines)
            lines, length = [], 0
    yield "".join(lines)


def _utf8_lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def list_sources(path: Path) -> set[str]:
    """Every value of the `source` column or field of one file."""
    if path.suffix == ".parquet":
        return {name for batch in _parquet_batches(path, ["source"]) for name in batch["source"] if name}
    if path.suffix == ".jsonl":
        return {_json_field(path, number, record, "source") for number, record in _json_records(path)} - {""}
    raise _no_source_in_text(path)


def _no_source_in_text(path: Path) -> DataError:
    return DataError(f"{path}: plain text has no sources to choose from; drop ?source=...")


def _not_utf8(path: Path) -> DataError:
    return DataError(f"{path} is not UTF-8: convert it first, for example with iconv -f LATIN1 -t UTF-8")


READERS: dict[str, Callable[[Path, str | None], Iterator[str]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".txt": read_text,
}
