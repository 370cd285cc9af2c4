"""The tasks: right answers, the same batch for the same seed and step, disjoint halves, exact chance levels."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from ssm_blocks.tasks.groups import WordProblem, closure, compose, group_task
from ssm_blocks.tasks.recall import Recall
from ssm_blocks.tasks.scoring import accuracy_by_length, scores
from ssm_blocks.tasks.task import IGNORED, half_of

GROUPS = ("d4", "parity", "s5", "s5_transpositions")


@pytest.mark.parametrize("name", GROUPS)
def test_targets_are_the_running_products(name: str) -> None:
    task = group_task(name)
    elements = {"d4": closure([(1, 2, 3, 0), (0, 3, 2, 1)]), "parity": [(0, 1), (1, 0)]}.get(
        name, list(itertools.permutations(range(5)))
    )
    tokens, targets = task.batch(1, 2, size=3, length=13)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        g = tuple(range(len(elements[0])))
        for token, answer in zip(row, answers, strict=True):
            g = compose(elements[int(task.letters[token])], g)
            assert elements[answer] == g


def test_the_groups_have_their_sizes() -> None:
    sizes = {name: (group_task(name).vocabulary, group_task(name).num_classes) for name in GROUPS}
    assert sizes == {"d4": (8, 8), "parity": (2, 2), "s5": (120, 120), "s5_transpositions": (10, 120)}
    with pytest.raises(ValueError, match="unknown group task"):
        group_task("m11")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_batch_depends_on_seed_and_step_alone(split: str) -> None:
    task = group_task("s5_transpositions")

    def tokens(seed: int, step: int) -> Tensor:
        return task.batch(seed, step, size=8, length=20, split=split)[0]

    first = tokens(0, 0)
    assert torch.equal(first, tokens(0, 0))
    assert not torch.equal(first, tokens(0, 1))
    assert not torch.equal(first, tokens(1, 0))


def test_the_halves_share_no_sequence_and_cover_all() -> None:
    """Parity at 7 tokens has 128 sequences: both splits together see all of them, and none in both."""
    task = group_task("parity")
    seen = {
        split: {tuple(row) for step in range(20) for row in _tokens(task, step, split).tolist()}
        for split in ("train", "test")
    }
    assert not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) == 2**7
    assert all(len(half) > 40 for half in seen.values())


def _tokens(task: WordProblem, step: int, split: str) -> Tensor:
    return task.batch(0, step, size=64, length=7, split=split)[0]


def test_the_hash_is_balanced_and_sees_every_place() -> None:
    tokens = torch.randint(8, (4000, 20), generator=torch.Generator().manual_seed(0))
    half = half_of(tokens)
    assert 0.46 < half.double().mean() < 0.54
    for place in (0, 10, 19):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 8
        assert 0.4 < (half_of(changed) != half).double().mean() < 0.6


def test_within_its_half_every_sequence_is_as_likely() -> None:
    """No token and no answer is rarer in one of the halves."""
    task = group_task("d4")
    for split in ("train", "test"):
        tokens, targets = task.batch(0, 0, size=4096, length=20, split=split)
        for values in (tokens[:, -1], targets[:, -1]):
            counts = Counter(values.tolist())
            assert len(counts) == 8
            assert all(abs(n / 4096 - 1 / 8) < 0.03 for n in counts.values())


def test_chance_is_exact() -> None:
    assert group_task("d4").chance(20) == pytest.approx(1 / 8)
    assert group_task("parity").chance(5) == pytest.approx(1 / 2)
    assert group_task("s5").chance(3) == pytest.approx(1 / 120)
    transpositions = group_task("s5_transpositions")
    assert transpositions.chance(1) == pytest.approx(1 / 10)
    assert transpositions.chance(2) == pytest.approx(1 / 10)  # back to the identity
    assert transpositions.chance(20) == pytest.approx(1 / 60, rel=1e-3)


def test_too_short_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="different sequences"):
        group_task("parity").batch(0, 0, size=4, length=3)
    with pytest.raises(ValueError, match="split is one of"):
        group_task("parity").batch(0, 0, size=4, length=20, split="valid")


def test_scores_of_hand_made_answers() -> None:
    targets = torch.tensor([[0, 1, 1], [1, IGNORED, IGNORED], [IGNORED, 0, 1]])
    answers = torch.tensor([[0, 1, 0], [1, 1, 0], [1, 0, 1]])
    logits = torch.nn.functional.one_hot(answers, 2).float()
    expected = torch.tensor([[2 / 3, 0, 0], [1, 1, 1], [1, 1, 1]])
    torch.testing.assert_close(scores(logits, targets), expected)


def test_accuracy_by_length_of_a_model_that_knows_and_one_that_does_not() -> None:
    task = group_task("d4")

    def oracle(tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(task.running_products(tokens), 8).float()

    found = accuracy_by_length(oracle, task, (8, 30), count=50, seed=0, device="cpu")
    assert found == {n: {"token": 1, "final": 1, "sequence": 1, "chance": pytest.approx(1 / 8)} for n in ("8", "30")}
    guess = accuracy_by_length(lambda t: oracle(0 * t), task, (20,), count=4000, seed=0, device="cpu")["20"]
    assert abs(guess["final"] - 1 / 8) < 0.03
    assert guess["sequence"] == 0


# recall --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "length"), [(4, 12), (4, 64), (32, 256)])
def test_recall_asks_every_key_once_and_wants_its_value(pairs: int, length: int) -> None:
    task = Recall(pairs)
    tokens, targets = task.batch(0, 3, size=6, length=length)
    assert tokens.shape == targets.shape == (6, length)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        value_of = {row[i]: row[i + 1] - task.keys for i in range(0, 2 * pairs, 2)}
        assert len(value_of) == pairs, "keys do not repeat"
        asked = [(token, answer) for token, answer in zip(row, answers, strict=True) if answer != IGNORED]
        assert dict(asked) == value_of
        assert len(asked) == pairs
        rest = [t for t, a in zip(row[2 * pairs :], answers[2 * pairs :], strict=True) if a == IGNORED]
        assert set(rest) <= {task.filler}
        assert all(a == IGNORED for a in answers[: 2 * pairs])


def test_recall_is_reproducible_and_its_halves_are_disjoint() -> None:
    task = Recall(1, keys=4, values=4)
    halves = {}
    for split in ("train", "test"):
        halves[split] = {tuple(row) for step in range(30) for row in _recalled(task, step, split)}
    assert not halves["train"] & halves["test"]
    assert len(halves["train"] | halves["test"]) == 4 * 4 * 5  # key, value, one of five places to ask
    assert _recalled(task, 1, "train") == _recalled(task, 1, "train") != _recalled(task, 2, "train")


def _recalled(task: Recall, step: int, split: str) -> list[list[int]]:
    return task.batch(0, step, size=32, length=7, split=split)[0].tolist()


def test_recall_by_guessing_is_chance() -> None:
    task = Recall(4, values=8)
    _, targets = task.batch(0, 0, size=4000, length=16)
    share = (targets[targets != IGNORED] == 3).double().mean()
    assert task.chance(16) == 1 / 8
    assert abs(share - 1 / 8) < 0.02


@pytest.mark.parametrize("options", [{"pairs": 0}, {"pairs": 65}, {"pairs": 2, "values": 1}])
def test_impossible_recall_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="recall needs"):
        Recall(**options)
    with pytest.raises(ValueError, match="need a length of at least 12"):
        Recall(4).batch(0, 0, size=2, length=11)
