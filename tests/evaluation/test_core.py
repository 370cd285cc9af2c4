"""Prompts, the score's arithmetic, and sampling. Against nanochat itself: tests/nanochat_patch/test_real_models.py."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svdtrain.data.tokenizer import Tokenizer
from svdtrain.evaluation import CoreBundle, evaluate_core
from svdtrain.evaluation.prompts import Span, common_prefix, spans

TOKENIZER = Tokenizer.byte_level()


def encode(text: str) -> list[int]:
    return [TOKENIZER.bos_id, *TOKENIZER.encode(text)]


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


def scored(span: Span) -> str:
    return text_of(span.tokens[span.start : span.end])


def test_multiple_choice_scores_the_answers() -> None:
    shot = {"query": "1+1=", "choices": ["3", "2"], "gold": 1}
    item = {"query": "2+2=", "choices": ["four", "five"], "gold": 0}
    first, second = spans("multiple_choice", item, [shot], " ", encode)
    assert text_of(first.tokens) == "<|bos|>1+1= 2\n\n2+2= four"
    assert (scored(first), scored(second)) == ("our", "ive")  # the shared first letter tells nothing


def test_schema_scores_the_shared_ending() -> None:
    item = {"context_options": ["The cup", "The bag"], "continuation": "broke.", "gold": 0}
    shot = {"context_options": ["He", "She"], "continuation": "left.", "gold": 1}
    first, second = spans("schema", item, [shot], " ", encode)
    assert text_of(second.tokens) == "<|bos|>She left.\n\nThe bag broke."
    assert scored(first) == scored(second) == " broke."


def test_language_modeling_scores_the_continuation_behind_a_trimmed_context() -> None:
    item = {"context": "  to be or not ", "continuation": "to be"}
    shot = {"context": " alas poor ", "continuation": "Yorick"}
    (span,) = spans("language_modeling", item, [shot], " ", encode)
    assert text_of(span.tokens) == "<|bos|>alas poor Yorick\n\nto be or not to be"
    assert scored(span) == " to be"
    with pytest.raises(ValueError, match="not the beginning"):
        spans("language_modeling", {"context": "a", "continuation": ""}, [], "", encode)
    with pytest.raises(ValueError, match="unknown kind"):
        spans("essay", item, [], " ", encode)


def test_crops_from_the_left() -> None:
    span = Span(tokens=[9, 1, 2, 3, 4], start=3, end=5)
    assert span.cropped(3) == Span(tokens=[2, 3, 4], start=1, end=3)
    assert span.cropped(5) is span
    with pytest.raises(ValueError, match="does not fit"):
        span.cropped(2)


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 2
    assert common_prefix([[1], [2]]) == 0


def write_bundle(path: Path, *, num_items: int = 6) -> Path:
    """Two tasks: guess the next letter of the alphabet; choose the letter that comes next."""
    (path / "eval_data").mkdir(parents=True)
    said = [{"context": "abc"[: 1 + i % 3], "continuation": "bcd"[i % 3]} for i in range(num_items)]
    chosen = [{"query": "ab", "choices": ["c", "x"] if i % 2 else ["x", "c"], "gold": 1 - i % 2} for i in range(4)]
    for name, items in (("said", said), ("chosen", chosen)):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (path / "eval_data" / f"{name}.jsonl").write_text(lines)
    (path / "core.yaml").write_text(
        "icl_tasks:\n"
        "- {label: said, dataset_uri: said.jsonl, num_fewshot: [0], icl_task_type: language_modeling,"
        " continuation_delimiter: ''}\n"
        "- {label: chosen, dataset_uri: chosen.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}\n"
    )
    (path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsaid,0\nchosen,50\n")
    return path


def next_letter(tokens: Tensor, *, wrong: bool = False) -> Tensor:
    """A model that is sure of the next letter of the alphabet (or of x)."""
    guess = torch.full_like(tokens, ord("x")) if wrong else (tokens + 1) % 265
    return 10.0 * torch.nn.functional.one_hot(guess, 265).float()


def test_score_of_a_model_that_knows_and_one_that_does_not(tmp_path: Path) -> None:
    bundle = CoreBundle.read(write_bundle(tmp_path / "bundle"))
    assert bundle.tasks[1].guessing == 0.5
    cpu = torch.device("cpu")
    knows = evaluate_core(next_letter, TOKENIZER, bundle, device=cpu)
    assert knows.metrics()["core/said"] == 1.0
    wrong = evaluate_core(lambda t: next_letter(t, wrong=True), TOKENIZER, bundle, device=cpu)
    assert wrong.accuracy == {"said": 0.0, "chosen": 0.0}
    assert wrong.core == pytest.approx((0 + (0 - 0.5) / 0.5) / 2)


def test_equal_contexts_are_answered_by_the_first(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle")
    items = [{"context_options": ["same", "same"], "continuation": "end", "gold": gold} for gold in (0, 0, 0, 1)]
    (path / "eval_data" / "said.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (path / "core.yaml").write_text(
        "icl_tasks: [{label: said, dataset_uri: said.jsonl, num_fewshot: [0], icl_task_type: schema}]"
    )
    result = evaluate_core(next_letter, TOKENIZER, CoreBundle.read(path), device=torch.device("cpu"))
    assert result.accuracy == {"said": 0.75}


def test_samples_are_the_same_at_every_evaluation(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle")
    one, two = CoreBundle.read(path, max_per_task=3), CoreBundle.read(path, max_per_task=3)
    assert one == two
    assert [len(task.items) for task in one.tasks] == [3, 3]
    assert one.tasks[0].items == CoreBundle.read(path).tasks[0].items[:3]
    task = CoreBundle.read(path).tasks[1]
    assert task.shots(1) == task.shots(1)
    assert all(shot is not task.items[1] for shot in task.shots(1))
    with pytest.raises(ValueError, match="needs 2 worked examples, there are 0"):
        CoreBundle.read(path, max_per_task=1).tasks[1].shots(0)


def test_what_is_no_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluation bundle"):
        CoreBundle.read(tmp_path)
    path = write_bundle(tmp_path / "bundle")
    (path / "eval_data" / "said.jsonl").write_text("{")
    with pytest.raises(ValueError, match="no evaluation bundle: JSONDecodeError"):
        CoreBundle.read(path)
