"""The data of nanochat's fine-tuning, made up: both checkouts find it where they keep what they download."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ("red", "blue", "one", "two", "sun", "moon", "cat", "dog", "tree", "sea")


def conversation(draw: random.Random) -> dict[str, Any]:
    said = [" ".join(draw.choices(WORDS, k=3)) for _ in range(2)]
    return {
        "messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
    }


def question(draw: random.Random) -> dict[str, Any]:
    return {
        "question": draw.choice(WORDS),
        "choices": draw.sample(WORDS, 4),
        "answer": draw.randrange(4),
        "subject": "words",
    }


def wrapped(draw: random.Random) -> dict[str, Any]:
    return {"train": question(draw)}


def school_question(draw: random.Random) -> dict[str, Any]:
    choices = {"text": draw.sample(WORDS, 4), "label": ["A", "B", "C", "D"]}
    return {"question": draw.choice(WORDS), "choices": choices, "answerKey": draw.choice("ABCD")}


def sum_of_two(draw: random.Random) -> dict[str, Any]:
    a, b = draw.randrange(9), draw.randrange(9)
    return {"question": f"{a} and {b}?", "answer": f"It is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}


TASKS: list[tuple[str, str, str, Callable[[random.Random], dict[str, Any]]]] = [
    *[("HuggingFaceTB--smol-smoltalk", "default", split, conversation) for split in ("train", "test")],
    *[("cais--mmlu", "all", split, question) for split in ("auxiliary_train", "test")],
    ("cais--mmlu", "auxiliary_train", "train", wrapped),
    *[("openai--gsm8k", "main", split, sum_of_two) for split in ("train", "test")],
    *[
        ("allenai--ai2_arc", subset, split, school_question)
        for subset in ("ARC-Easy", "ARC-Challenge")
        for split in ("train", "test")
    ],
]


NUM_ROWS = {"HuggingFaceTB--smol-smoltalk": 10_000, "cais--mmlu": 5200, "openai--gsm8k": 420, "allenai--ai2_arc": 40}
"""As many as nanochat takes of each, at most."""


def write_tasks(base: Path) -> None:
    """The tasks, a word list and some conversations, in a base directory of nanochat."""
    draw = random.Random(3)
    for name, subset, split, make in TASKS:
        directory = base / "task_data" / name / subset / split
        directory.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([make(draw) for _ in range(NUM_ROWS[name])]), directory / "00000.parquet")
        (directory / "manifest.json").write_text(json.dumps(["00000.parquet"]))
    (base / "words_alpha.txt").write_text("\n".join(WORDS))
    lines = [json.dumps(conversation(draw)["messages"]) for _ in range(20)]
    (base / "identity_conversations.jsonl").write_text("\n".join(lines))
