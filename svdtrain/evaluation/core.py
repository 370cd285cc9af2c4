"""The CORE score of DCLM (arXiv:2406.11794) on nanochat's evaluation bundle, with nanochat's samples and shots.

    BUNDLE/core.yaml            tasks: label, kind, file, number of shots, delimiter
    BUNDLE/eval_meta_data.csv   what guessing scores, per task, in percent
    BUNDLE/eval_data/           one JSON object a line

CORE is the mean over tasks of (accuracy - guessing) / (1 - guessing).
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from svdtrain.evaluation.prompts import Encode, Item, Span, spans

_SHUFFLE_SEED = 1337  # nanochat's, so that N examples per task are the same N
_SHOT_SEED = 1234  # plus the example's place

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    """One task; `items` are shuffled and cropped."""

    label: str
    kind: str
    num_shots: int
    delimiter: str
    guessing: float
    """Accuracy of guessing, from 0 to 1."""
    items: Sequence[Item]

    def shots(self, index: int) -> list[Item]:
        """The worked examples in front of an item: drawn from the others, the same ones at every evaluation."""
        others = [i for i in range(len(self.items)) if i != index]
        if self.num_shots > len(others):
            raise ValueError(f"{self.label} needs {self.num_shots} worked examples, there are {len(others)}")
        return [self.items[i] for i in random.Random(_SHOT_SEED + index).sample(others, self.num_shots)]


@dataclass(frozen=True, kw_only=True)
class CoreResult:
    """Scores by task."""

    accuracy: dict[str, float]
    centered: dict[str, float]

    @property
    def core(self) -> float:
        """Mean of the centered scores."""
        return sum(self.centered.values()) / len(self.centered)

    def metrics(self) -> dict[str, float]:
        """`core_metric` and `core/<task>`, for a record."""
        return {"core_metric": self.core, **{f"core/{label}": value for label, value in self.centered.items()}}


@dataclass(frozen=True, kw_only=True)
class CoreBundle:
    """The tasks of a bundle."""

    tasks: tuple[CoreTask, ...]

    @classmethod
    def read(cls, path: Path, max_per_task: int = 0) -> CoreBundle:
        """From a directory; with max_per_task only that many examples of each task.

        Raises ValueError where something is missing or unreadable.
        """
        import yaml

        try:
            listed = yaml.safe_load((path / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
            with open(path / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
                guessing = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
            tasks = tuple(_read_task(entry, path / "eval_data", guessing, max_per_task) for entry in listed)
        except (OSError, KeyError, TypeError, json.JSONDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is no evaluation bundle: {type(error).__name__} {error}") from error
        if not tasks:
            raise ValueError(f"{path} lists no task")
        return cls(tasks=tasks)


def _read_task(entry: dict[str, Any], data: Path, guessing: dict[str, float], max_per_task: int) -> CoreTask:
    with open(data / entry["dataset_uri"], encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    random.Random(_SHUFFLE_SEED).shuffle(items)
    return CoreTask(
        label=entry["label"],
        kind=entry["icl_task_type"],
        num_shots=entry["num_fewshot"][0],
        delimiter=entry.get("continuation_delimiter", " "),
        guessing=guessing[entry["label"]],
        items=items[:max_per_task] if max_per_task > 0 else items,
    )


def evaluate_core(
    logits: Logits,
    tokenizer: Any,
    bundle: CoreBundle,
    *,
    device: torch.device,
    max_tokens: int | None = None,
) -> CoreResult:
    """Score a model: `logits` maps tokens [B, T] to logits [B, T, vocab] without dropout or targets.

    tokenizer: with `encode(text)` and `bos_id`. max_tokens: longer prompts lose their beginning. On several ranks the
    examples are shared out and every rank gets the same result; all ranks must call this.
    """

    def encode(text: str) -> list[int]:
        return [tokenizer.bos_id, *tokenizer.encode(text)]

    accuracy, centered = {}, {}
    for task in bundle.tasks:
        accuracy[task.label] = _accuracy(task, logits, encode, tokenizer.bos_id, device, max_tokens)
        centered[task.label] = (accuracy[task.label] - task.guessing) / (1 - task.guessing)
    return CoreResult(accuracy=accuracy, centered=centered)


def _accuracy(
    task: CoreTask, logits: Logits, encode: Encode, pad: int, device: torch.device, max_tokens: int | None
) -> float:
    several = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    right = torch.zeros(len(task.items), device=device)
    for index in range(rank, len(task.items), world_size):
        item = task.items[index]
        prompts = spans(task.kind, item, task.shots(index), task.delimiter, encode)
        if max_tokens is not None:
            prompts = [prompt.cropped(max_tokens) for prompt in prompts]
        right[index] = float(_is_right(task.kind, item, prompts, logits, pad, device))
    if world_size > 1:
        dist.all_reduce(right)
    return float(right.mean())


@torch.no_grad()
def _is_right(kind: str, item: Item, prompts: list[Span], logits: Logits, pad: int, device: torch.device) -> bool:
    tokens = _stack(prompts, pad).to(device)
    scores = logits(tokens)
    if kind == "language_modeling":
        (prompt,) = prompts
        said = scores[0, prompt.start - 1 : prompt.end - 1].argmax(dim=-1)
        return bool((said == tokens[0, prompt.start : prompt.end]).all())
    losses = _mean_losses(scores, tokens, prompts)
    return losses.index(min(losses)) == item["gold"]


def _mean_losses(scores: Tensor, tokens: Tensor, prompts: list[Span]) -> list[float]:
    """Mean cross-entropy of each prompt's scored part, in nats; nan where nothing is scored.

    Contexts that are equal are the same prompt from the first token on, so nothing tells them apart; the first one is
    then the answer, as in nanochat.
    """
    return [_mean_loss(scores[i], tokens[i], prompt) if prompt.start else math.nan for i, prompt in enumerate(prompts)]


def _mean_loss(scores: Tensor, tokens: Tensor, prompt: Span) -> float:
    predicted, actual = scores[prompt.start - 1 : prompt.end - 1], tokens[prompt.start : prompt.end]
    return float(F.cross_entropy(predicted, actual, reduction="none").mean())


def _stack(prompts: list[Span], pad: int) -> Tensor:
    """Tokens [B, T], padded on the right, where a causal model does not see it."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    return torch.tensor([prompt.tokens + [pad] * (longest - len(prompt.tokens)) for prompt in prompts])
