"""Broken text, numbers that are none, a machine without a network: one line, or a run that goes on."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from svdtrain import build
from svdtrain.cli import main
from svdtrain.trainer.hooks import Hook
from tests.main_job import records, tiny_settings, tiny_trainer, write_corpus

STEPS = 12


def arguments(directory: Path, corpus: Path) -> list[str]:
    train = {"num_iterations": STEPS, "save_every": 4}
    (directory / "settings.json").write_text(json.dumps(tiny_settings(corpus, train=train)))
    return ["--config", str(directory / "settings.json"), "--run-dir", str(directory / "run")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.txt", b"", "no training text"),
        ("text.jsonl", b"", "no training text"),
        ("text.txt", b"word", "no training text"),
        ("text.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n', "too small"),
        ("text.txt", "d\xe9j\xe0 vu".encode("latin-1"), "not UTF-8"),
        ("text.parquet", b"PAR1 this is none PAR1", "not a readable parquet file"),
        ("text.jsonl", b'{"text": "a"\n', "line 1"),
    ],
    ids=["empty", "empty jsonl", "one token", "three tokens", "not UTF-8", "broken parquet", "broken json"],
)
def test_a_corpus_that_cannot_be_used_is_one_line(tmp_path, capsys, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert main([*arguments(tmp_path, tmp_path / name), "--vocab-size", "0"]) == 2  # bytes: no tokenizer to train
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


class Break(Hook):
    """Puts a NaN where it is told to, once."""

    name = "break"

    def __init__(self, what: str, step: int) -> None:
        self.what, self.step = what, step

    def on_backward_end(self, state: Any) -> None:
        if (self.what, self.step) == ("gradient", state.step):
            next(p for p in state.model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan

    def on_step_start(self, state: Any) -> None:
        if (self.what, self.step) == ("weight", state.step):
            with torch.no_grad():
                state.model.blocks[1].mlp.c_fc.weight[1, 2] = math.nan


def run_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: Hook) -> int:
    build_hooks = build.build_hooks
    monkeypatch.setattr(build, "build_hooks", lambda *args: [hook, *build_hooks(*args)])
    return main(arguments(tmp_path, write_corpus(tmp_path / "text")))


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    latest = (run / "checkpoints" / "latest").read_text().strip()
    return load_file(run / "checkpoints" / latest / "model.safetensors")


def test_a_gradient_that_is_no_number_costs_one_step(tmp_path, monkeypatch) -> None:
    assert run_broken(tmp_path, monkeypatch, Break("gradient", 6)) == 0
    run = tmp_path / "run"
    assert [r["step"] for r in records(run, "alert") if r["rule"] == "non_finite"] == [6]
    assert [r["step"] for r in records(run, "train")] == [s for s in range(1, STEPS + 1) if s != 7]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in final_weights(run).values())


def test_a_weight_that_is_no_number_stops_the_run_and_is_not_saved(tmp_path, monkeypatch, capsys) -> None:
    assert run_broken(tmp_path, monkeypatch, Break("weight", 6)) == 1
    run = tmp_path / "run"
    assert (run / "checkpoints" / "latest").read_text() == "step_000004\n"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in final_weights(run).values())
    assert "last good checkpoint" in capsys.readouterr().out.replace("\n", "")


def test_a_run_asks_for_no_network(tmp_path, monkeypatch) -> None:
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        asked.append(args)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("WANDB_MODE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert main(arguments(tmp_path, write_corpus(tmp_path / "text"))) == 0
    assert not asked


def test_what_a_hook_freezes_stays_and_the_rest_trains(tmp_path) -> None:
    """docs/HOOKS.md names it as a use of on_setup; a frozen target is not watched, with a warning."""
    frozen = ("transformer.wte.weight", "transformer.h.0.attn.c_q.weight")

    class Freeze(Hook):
        name = "freeze"

        def on_setup(self, state: Any) -> None:
            for name in frozen:
                state.model.get_parameter(name).requires_grad_(False)

    settings = tiny_settings(write_corpus(tmp_path / "text"), train={"num_iterations": 8})
    trainer = tiny_trainer(tmp_path / "run", settings, extra_hooks=[Freeze()])
    before = {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}
    with pytest.warns(UserWarning, match="frozen parameters are not watched: transformer.h.0.attn.c_q.weight"):
        trainer.fit()
    for name in frozen:
        assert torch.equal(trainer.state.model.get_parameter(name), before[name])
    moved = trainer.state.model.get_parameter("transformer.h.1.attn.c_q.weight")
    assert not torch.equal(moved, before["transformer.h.1.attn.c_q.weight"])
