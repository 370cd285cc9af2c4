"""The one error that users see when something is wrong with their text."""

from __future__ import annotations


class DataError(ValueError):
    """Something is wrong with the text or its cache. One line: what is wrong, and what to do."""


def first_line(error: BaseException) -> str:
    """Class and first line of the message of a library's error, for use inside a DataError."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
