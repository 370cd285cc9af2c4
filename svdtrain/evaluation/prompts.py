"""Prompts of in-context tasks: which text is shown and which part of it is scored. No torch.

Three kinds, as in DCLM (arXiv:2406.11794, appendix G): multiple_choice (one question, several answers: the answers are
scored), schema (several contexts, one continuation: the continuation is scored), language_modeling (the continuation
must be what the model would say).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Span:
    """One tokenised prompt; tokens [start, end) are scored."""

    tokens: list[int]
    start: int
    end: int

    def cropped(self, max_tokens: int) -> Span:
        """The last max_tokens tokens. Raises ValueError if the scored part does not fit."""
        extra = len(self.tokens) - max_tokens
        if extra <= 0:
            return self
        if self.start - extra < 1:
            raise ValueError(f"the scored part of a prompt does not fit into {max_tokens} tokens")
        return Span(tokens=self.tokens[extra:], start=self.start - extra, end=self.end - extra)


def spans(kind: str, item: Item, shots: Sequence[Item], delimiter: str, encode: Encode) -> list[Span]:
    """The prompts of one item behind its worked examples; `encode` puts the document separator first.

    Raises ValueError for an unknown kind, or when a prompt does not begin with its own context.
    """
    if kind not in _BUILDERS:
        raise ValueError(f"unknown kind of task {kind!r}; known: {', '.join(_BUILDERS)}")
    return _BUILDERS[kind](item, shots, delimiter, encode)


def _multiple_choice(item: Item, shots: Sequence[Item], delimiter: str, encode: Encode) -> list[Span]:
    head = _examples(f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}" for shot in shots)
    tokens = [encode(f"{head}{item['query']}{delimiter}{choice}") for choice in item["choices"]]
    start = common_prefix(tokens)
    return [Span(tokens=t, start=start, end=len(t)) for t in tokens]


def _schema(item: Item, shots: Sequence[Item], delimiter: str, encode: Encode) -> list[Span]:
    head = _examples(f"{shot['context_options'][shot['gold']]}{delimiter}{shot['continuation']}" for shot in shots)
    tokens = [encode(f"{head}{option}{delimiter}{item['continuation']}") for option in item["context_options"]]
    length = common_prefix([t[::-1] for t in tokens])
    return [Span(tokens=t, start=len(t) - length, end=len(t)) for t in tokens]


def _language_modeling(item: Item, shots: Sequence[Item], delimiter: str, encode: Encode) -> list[Span]:
    head = _examples(f"{shot['context'].strip()}{delimiter}{shot['continuation']}" for shot in shots)
    context = f"{head}{item['context'].strip()}{delimiter}"
    # White space at the end of a context would be a token there and part of a word in the whole prompt.
    before, whole = encode(context.strip()), encode(context + item["continuation"])
    if whole[: len(before)] != before or len(whole) == len(before):
        raise ValueError(f"the tokens of a context are not the beginning of its prompt's: {context[-60:]!r}")
    return [Span(tokens=whole, start=len(before), end=len(whole))]


_BUILDERS: dict[str, Callable[[Item, Sequence[Item], str, Encode], list[Span]]] = {
    "multiple_choice": _multiple_choice,
    "schema": _schema,
    "language_modeling": _language_modeling,
}


def _examples(texts: Any) -> str:
    return "".join(f"{text}\n\n" for text in texts)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share."""
    shortest = min(len(sequence) for sequence in sequences)
    first = sequences[0]
    differs = (i for i in range(shortest) if any(sequence[i] != first[i] for sequence in sequences))
    return next(differs, shortest)
