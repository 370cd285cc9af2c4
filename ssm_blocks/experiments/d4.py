"""001: is the word problem of D4, the square's symmetries, solved by one layer, and by what part of it?"""

from __future__ import annotations

from typing import Any

from ssm_blocks.experiments.experiment import Arm, Criterion, Row, at_length, criterion, values_of
from ssm_blocks.experiments.models import LSTM
from ssm_blocks.experiments.token_experiment import TokenExperiment, accuracy_columns, model_config
from ssm_blocks.experiments.training import Training
from ssm_blocks.tasks.groups import group_task
from ssm_blocks.tasks.task import Task

LENGTHS = (20, 40, 80, 160, 320, 512)
WIDTH = 16
HEADS = 4
MAIN, MINIMAL = "One layer, d = 16: 4 heads, transitions 4 x 4", "One layer, minimal state: 4 heads, transitions 2 x 2"
LONG = "One layer, trained up to T=128"
LONGER = {"training": {"lengths": [4, 8, 20, 64, 128], "steps": 2500}}
DELTA = ("deltanet", "neg_deltanet", "cs_deltanet", "cs_neg_deltanet", "deltaproduct")
DIAGONAL = ("diagonal", "diagonal_signed", "diagonal_complex")


class D4(TokenExperiment):
    """All 8 elements are tokens, so the answer is uniform at every position: chance is 1/8."""

    name = "d4"
    proposal = "001"
    question = "Does a column-sparse DeltaNet with negative eigenvalues track D4, and are both parts needed?"
    training = Training(steps=2000, batch=256, lr=1e-2, lengths=(4, 8, 20), solved_loss=5e-5)
    lengths = LENGTHS
    columns = accuracy_columns(LENGTHS, 20)

    def task(self, config: Any) -> Task:
        return group_task(config)

    def arms(self) -> list[Arm]:
        main = [_delta(name, name, MAIN, key_dim=4) for name in DELTA]
        state = {"num_heads": HEADS, "state_size": WIDTH, "conv_size": 0, "learned_state": True}
        main += [Arm(name=name, group=MAIN, config=_config(name, **state)) for name in DIAGONAL]
        main.append(Arm(name="lstm", group=MAIN, config=_config(LSTM)))
        minimal = [_delta(f"{name}_2", name, MINIMAL, key_dim=2) for name in DELTA]
        long = [_delta(f"{name}_long", name, LONG, key_dim=4, **LONGER) for name in ("cs_neg_deltanet", "deltaproduct")]
        long.append(_delta("cs_neg_deltanet_2_long", "cs_neg_deltanet", LONG, key_dim=2, **LONGER))
        return [*main, *minimal, *long]

    def judge(self, rows: list[Row]) -> list[Criterion]:
        final = at_length(20)
        only = [
            criterion(f"minimal state: {name} does not", values_of(rows, f"{name}_2", final), below=0.9)
            for name in ("deltanet", "neg_deltanet", "cs_deltanet")
        ]
        return [
            criterion("cs_neg_deltanet, final at T=20", values_of(rows, "cs_neg_deltanet", final), above=0.9),
            criterion("deltanet, final at T=20", values_of(rows, "deltanet", final), below=0.5),
            criterion("minimal state: cs_neg_deltanet passes", values_of(rows, "cs_neg_deltanet_2", final), above=0.9),
            *only,
            criterion("deltaproduct (n_h = 2), final at T=20", values_of(rows, "deltaproduct", final), above=0.9),
            criterion(
                "trained up to T=128: cs_neg_deltanet, final at T=512",
                values_of(rows, "cs_neg_deltanet_long", at_length(512)),
                above=0.9,
            ),
        ]


def _delta(name: str, mixer: str, group: str, key_dim: int, **more: Any) -> Arm:
    """The dictionary, where there is one, has 8 entries: as many as the group."""
    config = {**_config(mixer, num_heads=HEADS, key_dim=key_dim, conv_size=0, learned_state=True), **more}
    return Arm(name=name, group=group, config=config, weight=3 if group == LONG else 1)


def _config(mixer: str, **options: Any) -> dict[str, Any]:
    """No convolution: it would see short words whole."""
    return {"task": "d4", "model": model_config(mixer, WIDTH, **options)}


EXPERIMENT = D4()
