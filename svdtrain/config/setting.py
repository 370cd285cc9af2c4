"""What every group of settings is made with."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal, get_args, get_origin, get_type_hints


def advanced(default: Any) -> Any:
    """A setting that --help leaves out: a flag all the same, and a key of --config."""
    return field(default=default, metadata={"advanced": True})


def require(condition: bool, message: str) -> None:
    """ValueError with the message where the condition does not hold."""
    if not condition:
        raise ValueError(message)


def require_choices(settings: Any) -> None:
    """ValueError where a setting with named choices has none of them: the command line checks that itself, Python and
    --config do not."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            value, choices = getattr(settings, name), get_args(hint)
            named = ", ".join(map(str, choices))
            require(value in choices, f"--{name.replace('_', '-')} must be one of {named}; got {value!r}")
