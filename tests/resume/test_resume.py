"""Straight N steps equal n + resume (N - n), bit for bit, wherever the save falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from svdtrain.trainer.hooks import Hook
from tests.main_job import records, tiny_settings, tiny_trainer, write_corpus

STEPS = 40


class StopAt(Hook):
    """Ends training after a step, as a signal would."""

    name = "stop_at"

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: Any) -> None:
        if state.step == self.step:
            state.control.request_stop("test")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    return tiny_settings(corpus, train={"num_iterations": STEPS}, svd={"svd_interval": 5, "svd_preset": "fast"})


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    tiny_trainer(run, settings).fit()
    return run


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal at atol 0, through every nested value."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}/{index}")
    else:
        assert left == right or (left != left and right != right), where  # nan equals nan here


TIMES = ("run_seconds", "train/dt", "train/tok_per_sec", "interference/seconds", "forgetting/seconds")


def load(run: Path) -> dict[str, Any]:
    directory = run / "checkpoints" / f"step_{STEPS:06d}"
    state = torch.load(directory / "state_rank0.pt", weights_only=True)
    state["metrics"] = {k: v for k, v in state["metrics"].items() if k not in TIMES}
    del state["run_seconds"]
    optimizer = torch.load(directory / "optimizer_rank0.pt", weights_only=True)
    return {"model": load_file(directory / "model.safetensors"), "optimizer": optimizer, "state": state}


def test_the_straight_run_switches(straight: Path) -> None:
    """Otherwise the tests below would prove nothing about switches."""
    kinds = {(s["step"], s["change"]) for s in records(straight, "switch")}
    assert any(change == "to_lowrank" for _, change in kinds)
    assert any(0 < step < STEPS for step, _ in kinds)


def switch_steps(run: Path) -> list[int]:
    return sorted({s["step"] for s in records(run, "switch")})


@pytest.mark.parametrize("offset", [-1, 0, 1], ids=["before", "at", "after"])
@pytest.mark.parametrize("which", [0, -1], ids=["first-switch", "last-change"])
def test_resume_is_exact_around_a_switch(straight, settings, tmp_path, offset: int, which: int) -> None:
    changes = [step for step in switch_steps(straight) if step < STEPS]
    stop = changes[which] + offset
    run = tmp_path / "run"
    tiny_trainer(run, settings, extra_hooks=[StopAt(stop)]).fit()
    resumed = tiny_trainer(run, settings)
    resumed.fit(resume=True)
    assert resumed.state.resumed_from == stop
    expected, actual = load(straight), load(run)
    expected["state"]["hooks"].pop("stop_at", None)
    assert_same(expected, actual)


def test_resume_twice_and_thrice(straight, settings, tmp_path) -> None:
    run = tmp_path / "run"
    for stop in (7, 18, 31):
        tiny_trainer(run, settings, extra_hooks=[StopAt(stop)]).fit(resume=stop != 7)
    tiny_trainer(run, settings).fit(resume=True)
    assert_same(load(straight), load(run))
    steps = [r["step"] for r in records(run, "train")]
    assert steps == list(range(1, STEPS + 1))  # no gap, no step twice
    losses = {name: [r["train/loss"] for r in records(path, "train")] for name, path in (("a", straight), ("b", run))}
    assert losses["a"] == losses["b"]
