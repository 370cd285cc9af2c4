"""A table that a script keeps up to date between two marks of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def put_between(page: Path, marks: tuple[str, str], lines: Sequence[str]) -> None:
    """Replace what stands between the first mark, which the page has once, and the next place of the second."""
    before, rest = page.read_text().split(marks[0])
    after = rest.split(marks[1], 1)[1]
    page.write_text("\n".join([before + marks[0], *lines, marks[1] + after]))
