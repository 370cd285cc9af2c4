"""006: the word problem of S5, the smallest group that no solvable (diagonal, triangular) recurrence can follow."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, ClassVar

from ssm_blocks.experiments.ablations import BLOCK_DIAGONAL, FIRST_DESIGN
from ssm_blocks.experiments.experiment import Arm, Criterion, Row, at_length, criterion, values_of
from ssm_blocks.experiments.models import LSTM
from ssm_blocks.experiments.token_experiment import MS, TokenExperiment, accuracy_columns, model_config
from ssm_blocks.experiments.training import Training
from ssm_blocks.tasks.groups import group_task
from ssm_blocks.tasks.task import Task

LENGTHS = (20, 40, 80, 160, 320, 512)
WIDTH = 64
ONE_HEAD = {"num_heads": 1, "conv_size": 0, "learned_state": True}
SCANNED = {**ONE_HEAD, "method": "doubling"}  # fewer kernels than blelloch, which is what small models wait for
DELTA = {"num_heads": 4, "key_dim": 16, "conv_size": 0, "learned_state": True}
MORE = {"steps": 6000}
MUCH = {"lengths": [2, 3, 5, 10, 20], "steps": 3000, "batch": 512}
LONG = {"lengths": [2, 3, 5, 10, 20, 64, 128], "steps": 4000, "batch": 128}

EASY = "Transpositions (10 tokens), one layer"
DEEP = "Transpositions, two layers"
SMALL = "n = 9 states, one layer: blocks of 3 hold no S5; two reflections a block, or one"
HARD = "All 120 elements as tokens, one layer"
HARD_LONG = "All 120 elements as tokens, one layer, trained up to T=128"
LONG_PAIR = ("monarch_120_long", "deltaproduct4_120_long")
TIME = "Time of a training step (256 sequences of 20), alone on the machine"
BEST = "120 tokens, trained to 128: best seed of monarch minus best seed of deltaproduct (n_h = 4), final at T=160"


class S5(TokenExperiment):
    """Trained at T=20, scored up to 512."""

    name = "s5"
    proposal = "006"
    question = "Does an input-dependent Monarch transition track S5, what of it is needed, and what does it cost?"
    training = Training(steps=1500, batch=256, lr=1e-2, lengths=(3, 5, 10, 20), solved_loss=1e-4)
    lengths = LENGTHS
    columns = accuracy_columns(LENGTHS, 20)

    reasons: ClassVar = {
        BEST: "no seed of monarch gets its loss to where training counts as solved within the steps there are, and a "
        "small error per token adds up; deltaproduct does so with one seed, which then goes on to any length, and "
        "fails with the others. The medians, one row up, say who gets there more reliably, this row who gets further."
    }
    notes = (
        "Of the times, the Monarch layers' are those of our kernel in Triton, all others' of scans in torch; what the "
        "kernel makes of it stands under [The Monarch kernel](#the-monarch-kernel).",
        "With transpositions, blocks of 4 hold S5 by themselves, so block_diagonal needs no mixing there, and one "
        "reflection a token is enough for neg_deltanet. n = 9 is where mixing counts, 120 tokens where reflections do.",
        "Published (DeltaProduct, arXiv:2502.10297), one layer trained at T=128: n_h = 4 about 1.0 up to T=190 and .5 "
        "at 330; n_h <= 3 fails by T=50.",
    )

    def task(self, config: Any) -> Task:
        return group_task(config)

    def arms(self) -> list[Arm]:
        models = _models()
        easy = [_arm(name, EASY, model) for name, model in models.items()]
        deep = [_arm(f"{name}_2layers", DEEP, {**models[name], "layers": 2}) for name in ("monarch", "diagonal")]
        small = [
            _arm(
                f"{name}_9{label}",
                SMALL,
                model_config(mixer, WIDTH, block_size=3, num_householder=reflections, **SCANNED),
                training=MORE,
            )
            for reflections, label in ((2, ""), (1, "_1reflection"))
            for name, mixer in (("monarch", "monarch"), ("block_diagonal", BLOCK_DIAGONAL))
        ]
        hard_models = _hard_models()
        hard = [_arm(f"{name}_120", HARD, model, task="s5", training=MUCH) for name, model in hard_models.items()]
        long = [
            _arm(f"{name}_120_long", HARD_LONG, hard_models[name], task="s5", training=LONG)
            for name in ("monarch", "deltaproduct4", "lstm")
        ]
        time = [
            _arm(f"time_{name}", TIME, models[name], exclusive=True, time=[256, 20])
            for name in (
                "monarch",
                "monarch_cayley",
                "monarch_signed_cayley",
                "first_design",
                "diagonal",
                "neg_deltanet",
            )
        ]
        return [*easy, *deep, *small, *hard, *long, *time]

    def judge(self, rows: list[Row]) -> list[Criterion]:
        final = at_length(20)
        return [
            criterion("monarch, final at T=20", values_of(rows, "monarch", final), above=0.85),
            criterion("diagonal, final at T=20", values_of(rows, "diagonal", final), below=0.5),
            criterion("monarch against diagonal, time of a step", _ratios(rows), below=3),
            criterion("the first design, final at T=20", values_of(rows, "first_design", final), below=0.5),
            criterion("n = 9: monarch, final at T=20", values_of(rows, "monarch_9", final), above=0.85),
            criterion("n = 9: block-diagonal, final at T=20", values_of(rows, "block_diagonal_9", final), below=0.5),
            criterion("120 tokens: monarch, final at T=20", values_of(rows, "monarch_120", final), above=0.85),
            criterion(
                "120 tokens, trained to 128: median of monarch minus median of deltaproduct (n_h = 4), final at T=160",
                _differences(rows, *LONG_PAIR, 160),
                above=-0.02,
                runs=min(len(values_of(rows, name, final)) for name in LONG_PAIR),
            ),
            criterion(
                BEST,
                _differences(rows, *LONG_PAIR, 160, max),
                above=-0.02,
                runs=min(len(values_of(rows, name, final)) for name in LONG_PAIR),
            ),
        ]


def _models() -> dict[str, dict[str, Any]]:
    """Diagonal models and the first design get 64 states a head, the corrected one 16."""
    return {
        "monarch": model_config("monarch", WIDTH, block_size=4, **SCANNED),
        "monarch_cayley": model_config("monarch_cayley", WIDTH, block_size=4, **SCANNED),
        "monarch_signed_cayley": model_config("monarch_signed_cayley", WIDTH, block_size=4, **SCANNED),
        "block_diagonal": model_config(BLOCK_DIAGONAL, WIDTH, block_size=4, **SCANNED),
        "first_design": model_config(FIRST_DESIGN, WIDTH, block_size=8, **SCANNED),
        "diagonal": model_config("diagonal", WIDTH, state_size=64, **SCANNED),
        "diagonal_signed": model_config("diagonal_signed", WIDTH, state_size=64, **SCANNED),
        "diagonal_complex": model_config("diagonal_complex", WIDTH, state_size=64, **SCANNED),
        "deltanet": model_config("deltanet", WIDTH, **DELTA),
        "neg_deltanet": model_config("neg_deltanet", WIDTH, **DELTA),
        "deltaproduct4": model_config("deltaproduct", WIDTH, num_householder=4, **DELTA),
        "lstm": model_config(LSTM, WIDTH),
    }


def _hard_models() -> dict[str, dict[str, Any]]:
    """An element of S5 is a product of up to 4 reflections; several heads, because few of them find the group."""
    models = _models()
    return {
        "monarch": model_config("monarch", WIDTH, block_size=4, num_householder=4, **{**ONE_HEAD, "num_heads": 4}),
        "monarch_signed_cayley": models["monarch_signed_cayley"],
        "diagonal": models["diagonal"],
        "neg_deltanet": models["neg_deltanet"],
        "deltaproduct4": model_config("deltaproduct", WIDTH, num_householder=4, **{**DELTA, "key_dim": 8}),
        "lstm": models["lstm"],
    }


def _arm(
    name: str,
    group: str,
    model: dict[str, Any],
    *,
    task: str = "s5_transpositions",
    exclusive: bool = False,
    **more: Any,
) -> Arm:
    weight = {HARD: 2, HARD_LONG: 5}.get(group, 1)
    config = {"task": task, "model": model, **more}
    return Arm(name=name, group=group, exclusive=exclusive, weight=weight, config=config)


def _ratios(rows: list[Row]) -> list[float]:
    """Seed by seed (a timing's seed only says which repetition it is)."""
    pairs = zip(
        *(values_of(rows, f"time_{name}", lambda row: row[MS]) for name in ("monarch", "diagonal")), strict=False
    )
    return [monarch / diagonal for monarch, diagonal in pairs]


def _differences(
    rows: list[Row],
    arm: str,
    other: str,
    length: int,
    of: Callable[[list[float]], float] = statistics.median,
) -> list[float]:
    """One number: arms are compared, not seeds."""
    both = [values_of(rows, name, at_length(length)) for name in (arm, other)]
    return [of(both[0]) - of(both[1])] if all(both) else []


EXPERIMENT = S5()
