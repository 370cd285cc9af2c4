"""Conversion without nanochat: round trips, what does not fit, and pickles that want more than data."""

import dataclasses
import json
import os
import pickle
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanochat_patch import weights
from svdtrain.config import RunConfig
from svdtrain.data.tokenizer import Tokenizer
from svdtrain.model import GPT, GPTConfig
from svdtrain.trainer.checkpoint import Checkpoint, CheckpointStore

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 265


def model_of(variant: str) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig.from_depth(1, vocab_size=VOCAB_SIZE, sequence_len=32, variant=variant)  # type: ignore[arg-type]
    model = GPT(config)
    model.init_weights()
    return model


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """scripts/convert_nanochat.py with these arguments; its exit code."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    script = runpy.run_path(str(ROOT / "scripts/convert_nanochat.py"), run_name="convert")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["convert_nanochat.py", *map(str, arguments)])
        return script["main"]()

    return run


@pytest.mark.parametrize("variant", ["2026", "2025"])
def test_a_run_there_and_back(
    variant: str, tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(variant)
    config = RunConfig.from_dict({"model": {"depth": 1, "variant": variant, "max_seq_len": 32, "vocab_size": 0}})
    run = tmp_path / "run"
    CheckpointStore(run / "checkpoints").save(Checkpoint(step=20, model=model.state_dict(), optimizer={}, state={}))
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    Tokenizer.byte_level().save(run / "tokenizer.json")  # as training leaves it
    there = ("to-nanochat", run, "--tag", "d1")
    assert convert(*there) == 0
    saved = torch.load(tmp_path / "base/base_checkpoints/d1/model_000020.pt", weights_only=True)
    assert_same(saved, dict(model.state_dict()))
    assert convert("from-nanochat", "d1", "--out", tmp_path / "again") == 0
    read = weights.read_run(tmp_path / "again")
    pattern = model.config.window_pattern if variant == "2026" else "L"  # it means nothing in 2025
    assert (read.step, read.config) == (20, dataclasses.replace(model.config, window_pattern=pattern))
    assert_same(read.tensors, dict(model.state_dict()))
    assert Tokenizer.load(tmp_path / "again/tokenizer.json").fingerprint() == Tokenizer.byte_level().fingerprint()
    capsys.readouterr()
    assert convert(*there) == 2
    assert "d1 holds a model already; choose another --tag" in capsys.readouterr().err
    assert convert("from-nanochat", "d1", "--out", run) == 2
    assert "run holds a run already; choose another --out" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))
    assert convert(*there[:3], "same") == 0  # there is one tokenizer already: the same
    Tokenizer(Tokenizer.byte_level().ranks, pattern="another").save(tmp_path / "another.json")
    assert convert(*there[:3], "other", "--tokenizer", tmp_path / "another.json") == 2
    assert "--replace-tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "base/base_checkpoints/other").exists()


def saved_nanochat(tmp_path: Path, tensors: dict[str, torch.Tensor], config: GPTConfig) -> Path:
    return weights.write_nanochat(weights.Weights(config=config, step=3, tensors=tensors), tmp_path).parent


def test_compiled_and_rounded_weights_are_read(tmp_path: Path) -> None:
    model = model_of("2026")
    tensors = {f"_orig_mod.{name}": value.bfloat16() for name, value in model.state_dict().items()}
    read = weights.read_nanochat(saved_nanochat(tmp_path, tensors, model.config))
    assert read.model().state_dict()["lm_head.weight"].dtype == torch.float32
    assert list(read.tensors) == list(model.state_dict())


def test_what_does_not_fit_says_so(tmp_path: Path) -> None:
    model = model_of("2026")
    tensors = dict(model.state_dict())
    with pytest.raises(weights.ConversionError, match="no checkpoint"):
        weights.read_nanochat(tmp_path)
    directory = saved_nanochat(tmp_path, tensors, model.config)
    with pytest.raises(weights.ConversionError, match="there are 3"):
        weights.read_nanochat(directory, 4)
    saved_nanochat(tmp_path, {**tensors, "lm_head.weight": torch.zeros(2, 2)}, model.config)
    with pytest.raises(weights.ConversionError, match=r"lm_head\.weight should be"):
        weights.read_nanochat(directory)
    del tensors["smear_lambda"]
    saved_nanochat(tmp_path, tensors, model.config)
    with pytest.raises(weights.ConversionError, match="smear_lambda missing"):
        weights.read_nanochat(directory)


def test_a_run_with_a_vocabulary_of_unknown_size_asks_for_the_tokenizer(tmp_path: Path) -> None:
    model = model_of("2025")
    weights.write_run(weights.Weights(config=model.config, step=1, tensors=model.state_dict()), tmp_path)
    named = RunConfig.from_dict({"model": {"depth": 1, "variant": "2025", "max_seq_len": 32, "vocab_size": 4096}})
    (tmp_path / "config.json").write_text(json.dumps(named.to_dict()))
    with pytest.raises(weights.ConversionError, match="--tokenizer"):
        weights.read_run(tmp_path)
    assert weights.read_run(tmp_path, tokenizer=Tokenizer.byte_level()).config == model.config
    path = tmp_path / "checkpoints/step_000001/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(weights.ConversionError, match="damaged"):
        weights.read_run(tmp_path)


class Evil:
    """A pickle that would run a program when it is read."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch evil",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), pickle.dumps({"a": 1}), b"no pickle", b""])
def test_a_tokenizer_pickle_that_is_none(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(weights.ConversionError, match="no tokenizer"):
        weights.read_nanochat_tokenizer(tmp_path)
    assert not (tmp_path / "evil").exists()
