"""Text streamed from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from svdtrain.data.base import Corpus, Split
from svdtrain.data.errors import DataError, first_line

VALIDATION_DOCUMENTS = 2000  # about 2 million tokens of FineWeb-Edu


class HubCorpus(Corpus):
    """`hf:NAME[:CONFIG]`: the first 2,000 documents of the `train` split are validation, the rest is training.

    Example: hf:HuggingFaceFW/fineweb-edu:sample-10BT
    """

    def __init__(self, dataset: str, config: str | None = None, source: str | None = None) -> None:
        self.dataset, self.config, self.source = dataset, config, source
        self.name = f"hf:{dataset}" + (f":{config}" if config else "") + (f"?source={source}" if source else "")

    @classmethod
    def from_spec(cls, spec: str, source: str | None = None) -> HubCorpus:
        """Parse `hf:NAME[:CONFIG]`; raises DataError."""
        dataset, _, config = spec.removeprefix("hf:").partition(":")
        if not dataset:
            raise DataError("hf: needs a name, for example --data hf:HuggingFaceFW/fineweb-edu:sample-10BT")
        return cls(dataset, config or None, source)

    def unfiltered(self) -> Corpus:
        return HubCorpus(self.dataset, self.config)

    def fingerprint(self) -> str:
        """Hash of the name alone: what was cached once works without network, and is not refetched if it changes."""
        key = f"hub 1 {VALIDATION_DOCUMENTS} {self.dataset!r} {self.config!r} {self.source!r}"
        return hashlib.sha256(key.encode()).hexdigest()

    def documents(self, split: Split) -> Iterator[str]:
        rows = (row["text"] for row in self._rows() if self.source is None or row["source"] == self.source)
        texts = (text for text in rows if text and not text.isspace())
        return islice(texts, VALIDATION_DOCUMENTS) if split == "val" else islice(texts, VALIDATION_DOCUMENTS, None)

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            import datasets
        except ImportError as error:
            raise DataError("--data hf:... needs the package datasets: pip install datasets") from error
        wanted = ["text"] if self.source is None else ["text", "source"]
        try:
            with _no_warnings_from_hub():
                rows = datasets.load_dataset(self.dataset, self.config, split="train", streaming=True)
            self._check_columns(getattr(rows, "column_names", None) or list(next(iter(rows), {})), wanted)
            yield from rows.select_columns(wanted)
        except DataError:
            raise
        except Exception as error:  # the hub client raises dozens of unrelated types, different ones in each version
            raise DataError(
                f"cannot stream {self.name} from the Hugging Face hub ({first_line(error)}): check the name and the "
                "network, or use --data stdlib, which needs none"
            ) from error

    def _check_columns(self, existing: list[str], wanted: list[str]) -> None:
        for column in wanted:
            if column not in existing:
                raise DataError(f"{self.name} has no column {column!r}; its columns are: {', '.join(existing)}")


@contextlib.contextmanager
def _no_warnings_from_hub() -> Iterator[None]:
    """Without network the client prints a line per retry, ten of them; the DataError that follows says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
