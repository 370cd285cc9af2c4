"""Measuring forgetting: the right rows, the right numbers, and training that never notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from svdtrain.config import SVDConfig
from svdtrain.hooks.forgetting import ForgettingHook
from svdtrain.hooks.reference import count_rows
from svdtrain.model.attention import CausalSelfAttention
from svdtrain.trainer.hooks import Hook
from svdtrain.trainer.loop import Trainer
from tests.main_job import records, tiny_settings, tiny_trainer, write_corpus

EVERY = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def settings(corpus: Path, **svd: Any) -> dict[str, Any]:
    watched = {
        "svd_switching": False,
        "svd_on_alarm": "none",
        "svd_interference_every": EVERY,
        "svd_probe_rows": 8,
        **svd,
    }
    return tiny_settings(corpus, train={"num_iterations": 14}, svd=watched)


def forgetting_of(trainer: Trainer) -> ForgettingHook:
    return next(hook for hook in trainer.engine.hooks if isinstance(hook, ForgettingHook))


class Losses(Hook):
    """Loss of fixed rows after each step, by the plain way."""

    name = "losses"

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def on_step_end(self, state: Any) -> None:
        x, y = state.stream.stream.first_rows(8)
        reference = state.model(x[:1], y[:1])
        probe = torch.stack([state.model(x[i : i + 1], y[i : i + 1]) for i in range(8)])
        self.seen[state.step] = {"reference/loss": float(reference), "probe/loss": float(probe.mean())}


def test_training_is_the_same_to_the_last_bit_with_and_without(corpus, tmp_path) -> None:
    for name, every in (("with", 1), ("without", 0)):
        tiny_trainer(tmp_path / name, settings(corpus, svd_interference_every=every)).fit()
    losses = [[r["train/loss"] for r in records(tmp_path / name, "train")] for name in ("with", "without")]
    assert losses[0] == losses[1]
    weights = [load_file(tmp_path / n / "checkpoints/step_000014/model.safetensors") for n in ("with", "without")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert len(records(tmp_path / "with", "forgetting")) == 14
    assert not records(tmp_path / "without", "forgetting")


def test_losses_are_those_of_the_first_rows_and_the_schedule_is_kept(corpus, tmp_path) -> None:
    losses = Losses()
    trainer = tiny_trainer(tmp_path / "run", settings(corpus), extra_hooks=[losses])
    trainer.fit()
    found = records(tmp_path / "run", "forgetting")
    assert [r["step"] for r in found] == [4, 9, 14]  # the step before an analysis
    for record in found:
        for key, value in losses.seen[record["step"]].items():
            assert record[key] == pytest.approx(value, rel=1e-5)
    first, second = found[0], found[1]
    assert "interference/total" not in first
    assert second["probe/rise"] == pytest.approx(second["probe/loss"] - first["probe/loss"], abs=1e-6)
    names = list(forgetting_of(trainer).targets)
    assert second["interference/total"] == pytest.approx(sum(second[f"interference/{n}"] for n in names), rel=1e-4)
    for record in found:
        assert record["forgetting/seconds"] >= record["interference/seconds"] > 0


@pytest.mark.parametrize(
    ("before", "after", "keeps_harm"),
    [((8, 1), (4, 1), False), ((1, 1), (4, 1), False), ((8, 1), (8, 4), True), ((8, 1), (8, 1), True)],
    ids=["fewer-probe", "one-probe", "more-reference", "same"],
)
def test_a_resume_with_other_rows_compares_nothing_with_the_old_ones(
    corpus, tmp_path, caplog, before: tuple[int, int], after: tuple[int, int], keeps_harm: bool
) -> None:
    """Losses of 8 rows less those of 4 ended the run; of one row less those of 4, or of other reference rows, gave a
    number."""

    def with_rows(rows: tuple[int, int]) -> dict[str, Any]:
        return settings(corpus, svd_probe_rows=rows[0], svd_reference_rows=rows[1])

    first = with_rows(before)
    first["train"]["num_iterations"] = 7
    tiny_trainer(tmp_path / "run", first).fit()
    tiny_trainer(tmp_path / "run", with_rows(after)).fit(resume=True)
    record = next(r for r in records(tmp_path / "run", "forgetting") if r["step"] > 7)
    assert ("probe/rise" in record) == keeps_harm
    assert ("reference/loss_change" in record) == ("interference/total" in record) == (before == after)
    assert ("probe rows were followed before" in caplog.text) != keeps_harm


def test_the_control_set_is_validation_text(corpus, tmp_path) -> None:
    trainer = tiny_trainer(tmp_path / "run", settings(corpus))
    trainer.fit()
    control = forgetting_of(trainer).first_seen._control[0]
    train_rows = trainer.state.stream.stream.rows_seen(range(trainer.state.stream.rows_per_epoch))[0]  # type: ignore[attr-defined]
    assert len(control) == 8
    assert not any(bool((train_rows == row).all(1).any()) for row in control)


def test_the_difference_to_the_control_set_is_given_where_that_was_evaluated(corpus, tmp_path) -> None:
    """With the loss of an earlier step in its place, the difference would jump at each evaluation."""
    trainer = tiny_trainer(tmp_path / "run", settings(corpus, svd_interference_every=2))
    trainer.fit()
    found = records(tmp_path / "run", "forgetting")
    assert len(found) == 7
    assert ["probe/minus_control" in record for record in found] == [True, *[False] * 4, True, False]
    for record in (found[0], found[5]):
        assert record["probe/minus_control"] == pytest.approx(record["probe/loss"] - record["control/loss"])


def test_everything_watched_explains_the_change_of_the_loss(corpus, tmp_path) -> None:
    """With all matrices of the blocks watched and everything else held still, little stays unexplained."""

    class Still(Hook):
        name = "still"

        def on_before_optimizer_step(self, state: Any) -> None:
            targets = {id(W) for W in forgetting_of(trainer).targets.values()}
            for p in state.model.parameters():
                if id(p) not in targets:
                    p.grad = None

    changed = settings(corpus, svd_targets="all", svd_interference_every=1)
    changed["optim"]["matrix_lr"] = 0.1
    trainer = tiny_trainer(tmp_path / "run", changed, extra_hooks=[Still()])
    trainer.fit()
    found = records(tmp_path / "run", "forgetting")[5:]
    changes = sum(abs(r["reference/loss_change"]) for r in found)
    assert sum(abs(r["interference/unexplained"]) for r in found) < 0.1 * changes


def test_functional_drift_is_logged_beside_its_chance_level(corpus, tmp_path) -> None:
    trainer = tiny_trainer(tmp_path / "run", settings(corpus))
    trainer.fit()
    last = records(tmp_path / "run", "forgetting")[-1]
    for name in forgetting_of(trainer).targets:
        drift, chance, lift = (last[f"drift/{name}/functional_drift{end}"] for end in ("", "_chance", "_lift"))
        assert drift > 0
        assert lift == pytest.approx(drift / chance, rel=1e-4)


def test_a_module_that_is_not_called_is_named_once_and_left_out(corpus, tmp_path, monkeypatch, caplog) -> None:
    """Attention's output projection by its weight alone, as a model of somebody else's may have it."""
    plain = CausalSelfAttention.__init__

    def init(self: CausalSelfAttention, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        kind = type(self.c_proj)
        self.c_proj.__class__ = type("ByWeight", (kind,), {"__call__": kind.forward})  # no hooks, as with F.linear

    monkeypatch.setattr(CausalSelfAttention, "__init__", init)
    trainer = tiny_trainer(tmp_path / "run", settings(corpus))
    trainer.fit()
    said = [record.message for record in caplog.records if "no input reaches" in record.message]
    assert len(said) == 1
    assert "c_proj" in said[0]
    measured = {key.split("/")[1] for key in records(tmp_path / "run", "forgetting")[-1] if key.startswith("drift/")}
    assert measured
    assert not any("c_proj" in name for name in measured if "attn" in name)


def test_a_wrong_mixer_is_named_before_any_text_is_read(tmp_path) -> None:
    wrong = tiny_settings(tmp_path / "no text here", model={"mixer": "mambo"})
    with pytest.raises(ValueError, match=r"unknown mixer 'mambo'"):
        tiny_trainer(tmp_path / "run", wrong)


def test_protecting_inputs_by_the_policy_has_its_references(corpus, tmp_path) -> None:
    changed = settings(corpus, svd_protect="activation", svd_switching=True, svd_rule="original", svd_engine="exact")
    trainer = tiny_trainer(tmp_path / "run", changed)
    trainer.fit()
    controller = forgetting_of(trainer).svd.running
    assert set(controller.state_dict()["references"]) == set(controller.targets)
    assert records(tmp_path / "run", "switch")  # to a guard, which needs a reference
    assert not [r for r in records(tmp_path / "run", "alert") if "nothing is known" in r["message"]]


@pytest.mark.parametrize(
    ("wanted", "compiled", "world_size", "expected"),
    [
        (0, False, 1, (2, 2)),  # a sixteenth of 32 rows, each a part
        (0, True, 1, (4, 1)),  # one micro-batch
        (0, True, 2, (8, 1)),  # one on each rank
        (5, True, 1, (8, 2)),
        (5, False, 2, (6, 3)),
        (20, False, 1, (24, 8)),
    ],
)
def test_row_counts(wanted: int, compiled: bool, world_size: int, expected: tuple[int, int]) -> None:
    counts = count_rows(
        SVDConfig(svd_reference_rows=wanted, svd_probe_rows=8),
        batch_size=32,
        micro_batch=4,
        world_size=world_size,
        available=100,
        compiled=compiled,
    )
    assert (counts.reference, counts.parts) == expected
    assert counts.probe == max(8, counts.reference)
    with pytest.raises(ValueError, match="--svd-reference-rows"):
        count_rows(
            SVDConfig(svd_reference_rows=101),
            batch_size=32,
            micro_batch=4,
            world_size=1,
            available=100,
            compiled=compiled,
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_recompiles(corpus, tmp_path) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def counting(graph: Any, example_inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    trainer = tiny_trainer(tmp_path / "run", settings(corpus, svd_interference_every=1))
    trainer._compile_model = lambda model: torch.compile(model, backend=counting, dynamic=False)
    after: dict[int, int] = {}

    class Count(Hook):
        name = "count"

        def on_step_end(self, state: Any) -> None:
            after[state.step] = len(graphs)

    trainer.engine.hooks.append(Count())
    trainer.fit()
    assert forgetting_of(trainer).first_seen.counts.reference == 2  # a micro-batch
    assert after[1] == after[14] > 0
    torch._dynamo.reset()
