"""Flags to settings: what tyro says of a bad flag in a box becomes one line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import tyro


def read_flags(kind: Any, argv: Sequence[str], *, program: str, description: str, **options: Any) -> Any:
    """An instance of the dataclass `kind`, its fields' names as flat flags; `options` go to `tyro.cli`.

    Raises ValueError, in one line, for flags that cannot be read; SystemExit for --help.
    """
    errors, flat = io.StringIO(), (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=program, description=description, args=list(argv), config=flat, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip(" │╭╮╰╯─-") for line in errors.getvalue().splitlines()]
        said = [line for line in lines if line][1:]  # the first one is the title of the box
        end = next((i for i, line in enumerate(said) if line.startswith(("Argument helptext", "For full"))), len(said))
        raise ValueError(" ".join(said[:end]) or f"the flags cannot be read; see {program} --help") from None
