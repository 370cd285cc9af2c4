"""Experiments on token tasks: an arm is a model and a task; what comes out is accuracy by length."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ssm_blocks.experiments.experiment import Arm, Column, Experiment, Row, at_length
from ssm_blocks.experiments.models import SequenceModel, sizes
from ssm_blocks.experiments.training import Training, ms_per_step, train
from ssm_blocks.tasks.scoring import accuracy_by_length
from ssm_blocks.tasks.task import Task

MS = "ms_per_step"


def accuracy_columns(lengths: tuple[int, ...], train_length: int) -> tuple[Column, ...]:
    """Final accuracy at every length, token and sequence accuracy at the trained one, and what it took."""
    return (
        *(
            Column(title=f"final T={length}", value=at_length(length), chance=at_length(length, "chance"))
            for length in lengths
        ),
        Column(title=f"token T={train_length}", value=at_length(train_length, "token")),
        Column(title=f"sequence T={train_length}", value=at_length(train_length, "sequence")),
        number("state", "state_size"),
        number("parameters", "parameters"),
        number("steps", "steps"),
        number("ms per training step", MS, ".2f"),
    )


def number(title: str, key: str, format: str = ",.0f") -> Column:
    """A column of row[key], empty for rows without it."""
    return Column(title=title, value=lambda row: row.get(key), format=format)


def model_config(mixer: str, width: int, layers: int = 1, **options: Any) -> dict[str, Any]:
    """The part of an arm's config that `SequenceModel` is made from."""
    return {"mixer": mixer, "width": width, "layers": layers, "options": options}


class TokenExperiment(Experiment):
    """An arm's config: model (see `model_config`), task (given to `task`), training (changes to the settings').

    With time = [batch, length] in its config an arm is not trained: the time of a training step is taken.
    """

    training = Training()
    lengths: tuple[int, ...] = (20,)
    test_sequences = 1024

    def task(self, config: Any) -> Task:
        """The task that an arm's config["task"] means."""
        raise NotImplementedError

    def settings(self, quick: bool) -> dict[str, Any]:
        """Quick: a few steps on short sequences; it shows that everything runs, not that anything is learnt."""
        if quick:
            short = Training(steps=2, batch=4, lengths=(8,), warmup=1, cooldown=1, check_every=1)
            return _plain({"training": asdict(short), "lengths": (8, 16), "test_sequences": 8})
        return _plain(
            {"training": asdict(self.training), "lengths": self.lengths, "test_sequences": self.test_sequences}
        )

    def run(self, arm: Arm, seed: int, settings: dict[str, Any], device: torch.device) -> Row:
        task = self.task(arm.config["task"])
        torch.manual_seed(seed)  # weights are drawn on the CPU: the same on every device
        model = SequenceModel(task.vocabulary, task.num_classes, **arm.config["model"]).to(device)
        if "time" in arm.config:
            return {**sizes(model), MS: _time(model, task, arm.config["time"], settings, device)}
        training = self.training_of(arm, settings)

        def batch_at(step: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
            return task.batch(seed, step, size=training.batch, length=length, device=device)

        report = train(model, batch_at, training)
        count = settings["test_sequences"]
        by_length = accuracy_by_length(
            model, task, self.lengths_of(arm, settings), count=count, seed=seed, device=device
        )
        trained = {"steps": report.steps, "train_s": report.seconds, "loss": report.loss, "ended": report.ended}
        return {**trained, **sizes(model), "by_length": by_length}

    def training_of(self, arm: Arm, settings: dict[str, Any]) -> Training:
        """The settings' training with the arm's changes; a quick run makes none."""
        shared = settings["training"]
        own = {} if settings["quick"] else arm.config.get("training", {})
        merged = {**shared, **own}
        return Training(**{**merged, "lengths": tuple(merged["lengths"])})

    def lengths_of(self, arm: Arm, settings: dict[str, Any]) -> list[int]:
        """Lengths an arm is scored at."""
        return settings["lengths"]


def _time(model: SequenceModel, task: Task, shape: list[int], settings: dict[str, Any], device: torch.device) -> float:
    size, length = (8, 8) if settings["quick"] else shape
    batch = task.batch(0, 0, size=size, length=length, device=device)
    return ms_per_step(model, batch, repeats=1 if settings["quick"] else 50)


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
