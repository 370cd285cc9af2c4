"""USR2, TERM and Ctrl-C: the step is finished, everything is saved, and the run goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from svdtrain.hooks import preemption
from svdtrain.hooks.preemption import Preemption
from svdtrain.interrupts import resume_command
from svdtrain.trainer.hooks import Hook
from svdtrain.trainer.loop import Trainer
from tests.main_job import records, tiny_settings, tiny_trainer, write_corpus

STEPS = 20


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """Whatever a test does to the handlers ends with it."""
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    return tiny_settings(corpus, train={"num_iterations": STEPS, "eval_every": 5})


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    tiny_trainer(run, settings).fit()
    return run


class SignalAt(Hook):
    """Sends a signal to this process at an event of a step."""

    name = "signal_at"

    def __init__(self, number: int, step: int, event: str = "on_step_start") -> None:
        self.number, self.step = number, step
        setattr(self, event, self._send)

    def _send(self, state: Any, *extra: Any) -> None:
        if state.step == self.step:
            os.kill(os.getpid(), self.number)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors")


def assert_as_uninterrupted(run: Path, straight: Path) -> None:
    """Final weights at atol 0, every step and every evaluation once, the same losses to the last bit."""
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(run)[name], tensor), name
    for kind, key in (("train", "train/loss"), ("eval", "val/bpb")):
        expected = [(r["step"], r[key]) for r in records(straight, kind)]
        assert [(r["step"], r[key]) for r in records(run, kind)] == expected


def preempted(run: Path, settings: dict[str, Any], prepare: Callable[[Trainer], None], *hooks: Hook) -> Trainer:
    trainer = tiny_trainer(run, settings, extra_hooks=hooks)
    prepare(trainer)
    trainer.fit(resume=True)
    return trainer


@pytest.mark.parametrize(
    ("number", "event"),
    [(signal.SIGUSR2, "on_step_start"), (signal.SIGTERM, "on_step_end"), (signal.SIGINT, "on_step_start")],
    ids=["USR2", "TERM", "INT"],
)
def test_a_signal_in_a_step_ends_the_run_behind_it(straight, settings, tmp_path, number: int, event: str) -> None:
    run = tmp_path / "run"
    trainer = preempted(run, settings, lambda _: None, SignalAt(number, 7, event))
    assert trainer.state.step == (8 if event == "on_step_start" else 7)
    assert trainer.saved
    assert trainer.state.control.ending == number
    assert signal.Signals(number).name in records(run, "end")[-1]["reason"]
    assert "preempted" in records(run, "end")[-1]["reason"]
    assert not records(run, "sample")  # the seconds are counted
    tiny_trainer(run, settings).fit(resume=True)
    assert records(run, "resume")[0]["step"] == trainer.state.step
    assert_as_uninterrupted(run, straight)


@pytest.mark.parametrize("at_step", [0, 10, STEPS])
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(straight, settings, tmp_path, at_step: int) -> None:
    run, batches = tmp_path / "run", []

    def prepare(trainer: Trainer) -> None:
        def count(module: torch.nn.Module, *_: Any) -> None:
            if not module.training and trainer.state.step == at_step:
                batches.append(1)
                if len(batches) == 2:
                    os.kill(os.getpid(), signal.SIGUSR2)

        trainer.state.model.register_forward_hook(count)

    trainer = preempted(run, settings, prepare)
    assert len(batches) == 2 < settings["train"]["eval_tokens"] // (2 * 64)
    assert trainer.state.step == at_step
    assert trainer.saved
    assert at_step not in [r["step"] for r in records(run, "eval")]
    tiny_trainer(run, settings).fit(resume=True)
    assert_as_uninterrupted(run, straight)


def test_a_signal_while_the_model_is_compiled(straight, settings, tmp_path) -> None:
    run = tmp_path / "run"

    def compile_slowly(model: torch.nn.Module) -> torch.nn.Module:
        os.kill(os.getpid(), signal.SIGTERM)
        return model

    def prepare(trainer: Trainer) -> None:
        trainer._compile_model = compile_slowly

    trainer = preempted(run, settings, prepare)
    assert trainer.state.step == 0
    assert trainer.saved
    tiny_trainer(run, settings).fit(resume=True)
    assert_as_uninterrupted(run, straight)


def test_signals_at_three_different_steps(straight, settings, tmp_path) -> None:
    run = tmp_path / "run"
    for step in (2, 3, 11):
        preempted(run, settings, lambda _: None, SignalAt(signal.SIGUSR2, step))
    tiny_trainer(run, settings).fit(resume=True)
    assert [r["step"] for r in records(run, "resume")] == [3, 4, 12]
    assert_as_uninterrupted(run, straight)


def test_a_vetoed_step_is_no_place_to_stop(settings, tmp_path) -> None:
    """Its weights may be broken: the run goes on to the next good step and saves that one."""

    class Veto(Hook):
        name = "veto"

        def on_before_optimizer_step(self, state: Any) -> None:
            if state.step in (3, 4):
                state.control.request_skip_step("test")

    trainer = preempted(tmp_path / "run", settings, lambda _: None, SignalAt(signal.SIGUSR2, 3), Veto())
    assert trainer.state.step == 6
    assert trainer.saved


def test_a_second_signal_exits_at_once_but_not_its_echo(settings, tmp_path, monkeypatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr(preemption.os, "_exit", exits.append)
    now = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    hook, trainer = Preemption(), tiny_trainer(tmp_path / "run", settings)
    hook.on_setup(trainer.state)
    os.kill(os.getpid(), signal.SIGUSR2)
    now[0] += 0.5
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes it on once more
    assert not exits
    now[0] += 1.0
    os.kill(os.getpid(), signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]
    hook.close()


def test_the_old_handlers_come_back(settings, tmp_path) -> None:
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    preempted(tmp_path / "run", settings, lambda _: None, SignalAt(signal.SIGINT, 1))
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_resume_command_keeps_the_flags() -> None:
    argv = ["--depth", "2", "--run-dir", "old", "--resume=auto", "--data", "my text"]
    assert resume_command(argv, Path("runs/x")) == "svdtrain --depth 2 --data 'my text' --run-dir runs/x --resume auto"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR2, 85), (signal.SIGINT, 130)], ids=["USR2", "INT"])
def test_the_command_exits_with_its_code_and_says_how_to_go_on(settings, tmp_path, number: int, code: int) -> None:
    import json

    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run = tmp_path / "run"
    flags = ["--config", str(tmp_path / "settings.json"), "--run-dir", str(run), "--num-iterations", "100000"]
    process = subprocess.Popen([sys.executable, "-m", "svdtrain.cli", *flags], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run, "train")) > 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    saved = (run / "checkpoints" / "latest").read_text().strip()
    assert records(run, "end")[-1]["step"] == int(saved[5:])
    assert f"--run-dir {run} --resume auto" in output.replace("\n", "")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"ended early with code {process.returncode}"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)
