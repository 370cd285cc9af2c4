"""003: parity needs a transition that depends on the input, which only the time-varying form has."""

from __future__ import annotations

from typing import Any

from ssm_blocks.experiments.experiment import Arm, Criterion, Row, at_length, criterion, values_of
from ssm_blocks.experiments.models import LSTM
from ssm_blocks.experiments.token_experiment import TokenExperiment, accuracy_columns, model_config
from ssm_blocks.experiments.training import Training
from ssm_blocks.tasks.groups import group_task
from ssm_blocks.tasks.task import Task

LENGTHS = (32, 64, 128, 256, 512)
WIDTH, HEADS = 16, 4
INVARIANT = ("dplr_plain", "dplr_similarity", "dplr_lti")
MAIN, BASELINES = "DPLR: time-varying, and the time-invariant forms that must tie", "Beside it"


class Parity(TokenExperiment):
    """Trained at T=32; chance is 1/2."""

    name = "parity"
    proposal = "003"
    question = (
        "Does the time-varying DPLR layer solve parity and carry it to T=256, and do the time-invariant ones tie?"
    )
    training = Training(steps=1500, batch=256, lr=1e-2, lengths=(8, 16, 32), solved_loss=2e-5)
    lengths = LENGTHS
    columns = accuracy_columns(LENGTHS, 32)

    notes = (
        "An accuracy far below chance is the opposite answer nearly every time: a small error per token has turned "
        "the state by half a turn at that length.",
    )

    def task(self, config: Any) -> Task:
        return group_task(config)

    def arms(self) -> list[Arm]:
        state = {"learned_state": True}
        return [
            _arm("dplr_ltv", MAIN, key_dim=4),
            *(_arm(name, MAIN, state_size=16) for name in INVARIANT),
            _arm("deltanet", BASELINES, key_dim=4, **state),
            _arm("neg_deltanet", BASELINES, key_dim=4, **state),
            _arm("deltaproduct", BASELINES, key_dim=4, **state),
            *(_arm(f"diagonal{kind}", BASELINES, state_size=16, **state) for kind in ("", "_signed", "_complex")),
            Arm(name="lstm", group=BASELINES, config={"task": "parity", "model": model_config(LSTM, WIDTH)}),
        ]

    def judge(self, rows: list[Row]) -> list[Criterion]:
        trained = {name: values_of(rows, name, at_length(32)) for name in INVARIANT}
        every = [value for values in trained.values() for value in values] if all(trained.values()) else []
        seeds = min(map(len, trained.values()))
        apart = [max(every) - min(every)] if every else []
        return [
            *(
                criterion(f"dplr_ltv, final at T={n}", values_of(rows, "dplr_ltv", at_length(n)), above=0.9)
                for n in (32, 64, 128, 256)
            ),
            *(criterion(f"{name} is near chance, final at T=32", trained[name], below=0.6) for name in INVARIANT),
            criterion("time-invariant forms tie: best minus worst of all runs, T=32", apart, below=0.1, runs=seeds),
        ]


def _arm(mixer: str, group: str, **options: Any) -> Arm:
    """No convolution: it would see short words whole."""
    model = model_config(mixer, WIDTH, num_heads=HEADS, conv_size=0, **options)
    return Arm(name=mixer, group=group, config={"task": "parity", "model": model})


EXPERIMENT = Parity()
