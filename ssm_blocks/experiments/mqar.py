"""002 and 006: associative recall. SSD-DeltaNet is DeltaNet computed otherwise, so it must recall exactly as well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from ssm_blocks.experiments.experiment import Arm, Column, Criterion, Row, at_length, criterion, values_of
from ssm_blocks.experiments.models import LSTM
from ssm_blocks.experiments.token_experiment import TokenExperiment, model_config, number
from ssm_blocks.experiments.training import Training
from ssm_blocks.tasks.recall import Recall
from ssm_blocks.tasks.task import Task

WIDTH, HEADS = 64, 2
LENGTH_OF = {4: 64, 16: 128, 32: 256}  # pairs: tokens
DELTA = ("deltanet", "ssd_deltanet", "gated_ssd_deltanet", "neg_deltanet")
BASELINES = ("diagonal", "diagonal_complex", "lstm")
MODELS: dict[str, dict[str, Any]] = {
    **{name: {} for name in DELTA},
    "monarch": {"block_size": 8},
    "diagonal": {"state_size": 64, "method": "doubling"},
    "diagonal_complex": {"state_size": 64, "method": "doubling"},
}


class MQAR(TokenExperiment):
    """An arm's task: the number of pairs."""

    name = "mqar"
    proposal = "002"
    question = (
        "Does SSD-DeltaNet recall as DeltaNet does, at 4 pairs and more, and does the Monarch layer recall at all?"
    )
    training = Training(steps=1500, batch=128, lr=5e-3, solved_loss=1e-3)
    columns = (
        Column(title="all answers", value=lambda row: _only(row, "token"), format=".4f"),
        Column(title="last answer", value=lambda row: _only(row, "final"), format=".4f"),
        Column(title="whole sequence", value=lambda row: _only(row, "sequence"), format=".4f"),
        Column(title="chance", value=lambda row: _only(row, "chance"), format=".4f"),
        number("state", "state_size"),
        number("parameters", "parameters"),
        number("steps", "steps"),
    )
    curve, curve_label = "token", "accuracy of all answers"

    reasons: ClassVar = {
        "monarch, 4 pairs": "it stays where the diagonal models and the LSTM are, at one in four, as often as naming "
        "any of the four values that were read is right. A delta rule writes v under its k; here every value is "
        "added to one vector through the same matrix B, and the transitions would have to learn to carry each to a "
        "place of its own and back."
    }

    def task(self, config: Any) -> Task:
        return Recall(config)

    def arms(self) -> list[Arm]:
        names = {4: (*DELTA, "monarch", *BASELINES), 16: (*DELTA, *BASELINES), 32: DELTA}
        return [_arm(pairs, name) for pairs in LENGTH_OF for name in names[pairs]]

    def lengths_of(self, arm: Arm, settings: dict[str, Any]) -> list[int]:
        return [3 * arm.config["task"]] if settings["quick"] else arm.config["training"]["lengths"]

    def training_of(self, arm: Arm, settings: dict[str, Any]) -> Training:
        return replace(super().training_of(arm, settings), lengths=tuple(self.lengths_of(arm, settings)))

    def judge(self, rows: list[Row]) -> list[Criterion]:
        return [
            *(
                criterion(
                    f"ssd_deltanet, {pairs} pairs", _recalled(rows, "ssd_deltanet", pairs), above=0.95, format=".4f"
                )
                for pairs in LENGTH_OF
            ),
            *(_tie(rows, pairs) for pairs in LENGTH_OF),
            criterion("monarch, 4 pairs", _recalled(rows, "monarch", 4), above=0.95, format=".4f"),
        ]


def _recalled(rows: list[Row], name: str, pairs: int) -> list[float]:
    return values_of(rows, f"{name}_{pairs}", at_length(LENGTH_OF[pairs], "token"))


def _tie(rows: list[Row], pairs: int) -> Criterion:
    name = f"ssd_deltanet against deltanet, {pairs} pairs, largest difference"
    apart = _apart(rows, pairs)
    return criterion(name, [max(apart)] if apart else [], below=0.01, format=".4f", runs=len(apart))


def _apart(rows: list[Row], pairs: int) -> list[float]:
    """Seed by seed they start from the same weights and read the same data."""
    both = zip(
        *(_recalled(rows, name, pairs) for name in ("ssd_deltanet", "deltanet")),
        strict=False,
    )
    return [abs(one - other) for one, other in both]


def _only(row: Row, score: str) -> float | None:
    return next((at[score] for at in row["by_length"].values()), None)


def _arm(pairs: int, name: str) -> Arm:
    if name == "lstm":
        model = model_config(LSTM, WIDTH, layers=2)
    else:
        model = model_config(name, WIDTH, layers=2, num_heads=HEADS, **MODELS[name])
    length = LENGTH_OF[pairs]
    weight = 4 if name == "monarch" else length / 64
    config = {"task": pairs, "model": model, "training": {"lengths": [length]}}
    return Arm(
        name=f"{name}_{pairs}", group=f"{pairs} pairs in {length} tokens, two layers", config=config, weight=weight
    )


EXPERIMENT = MQAR()
