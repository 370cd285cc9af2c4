"""Against nanochat itself: weights load both ways, logits, loss, generation and first weights agree.

Set NANOCHAT_DIR_2026 to a checkout of commit 92d63d4 and NANOCHAT_DIR_2025 to one of b399e43. nanochat runs in a
process of its own, in fp32. Its 2025 form keeps rotary tables in bf16 even then; ours rounds them the same way.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from svdtrain.model import GPT, GPTConfig, generate

THEIRS = """
import sys, torch
from nanochat.gpt import GPT, GPTConfig
ask = torch.load(sys.argv[1], weights_only=True)
model = GPT(GPTConfig(**ask["config"]))
torch.manual_seed(7)
model.init_weights()
first = {name: value.clone() for name, value in model.state_dict().items()}
model.load_state_dict(ask["weights"], strict=True)
loss = model(ask["tokens"], ask["targets"])
loss.backward()
torch.save({
    "first": first,
    "logits": model(ask["tokens"]).detach(),
    "loss": loss.detach(),
    "gradients": {name: p.grad for name, p in model.named_parameters()},
    "generated": torch.tensor(list(model.generate(ask["prompt"], 40, temperature=0))),
}, sys.argv[2])
"""


def config_of(variant: str) -> GPTConfig:
    return GPTConfig(
        sequence_len=256, vocab_size=500, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, variant=variant  # type: ignore[arg-type]
    )  # fmt: skip


def model_of(variant: str) -> GPT:
    """Weights large enough that every part of the network shows in the logits."""
    model = GPT(config_of(variant))
    torch.manual_seed(7)
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        std = 0.3 if "lambda" in name else parameter.shape[-1] ** -0.5
        parameter.data.add_(torch.empty_like(parameter).normal_(0, std, generator=generator))
    return model


@pytest.fixture(params=["2026", "2025"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[GPT, dict[str, torch.Tensor], dict[str, Any]]:
    """Our model, the question, and nanochat's answer."""
    directory = os.environ.get(f"NANOCHAT_DIR_{request.param}")
    if not directory:
        pytest.skip(f"NANOCHAT_DIR_{request.param} is not set")
    model = model_of(request.param)
    config = {name: getattr(model.config, name) for name in ("sequence_len", "vocab_size", "n_layer", "n_head")}
    config |= {"n_kv_head": model.config.n_kv_head, "n_embd": model.config.n_embd}
    tokens = torch.randint(0, 500, (2, 257), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, :9] = -1
    ask = {"config": config, "weights": model.state_dict(), "tokens": tokens[:, :-1], "targets": targets}
    ask["prompt"] = tokens[0, :200].tolist()
    torch.save(ask, tmp_path / "ask.pt")
    environment = {**os.environ, "PYTHONPATH": directory, "NANOCHAT_DTYPE": "float32"}
    environment["NANOCHAT_BASE_DIR"] = str(tmp_path / "base")
    command = [sys.executable, "-c", THEIRS, str(tmp_path / "ask.pt"), str(tmp_path / "answer.pt")]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=tmp_path, timeout=300)
    return model, ask, torch.load(tmp_path / "answer.pt", weights_only=True)


def test_same_network(both: tuple[GPT, dict[str, torch.Tensor], dict[str, Any]]) -> None:
    model, ask, theirs = both
    logits = model(ask["tokens"])
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, theirs["logits"], atol=1e-5, rtol=1e-5)
    loss = model(ask["tokens"], ask["targets"])
    torch.testing.assert_close(loss, theirs["loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        scale = float(theirs["gradients"][name].abs().max())
        torch.testing.assert_close(parameter.grad, theirs["gradients"][name], atol=1e-4 * scale, rtol=1e-4, msg=name)
    assert list(generate(model, ask["prompt"], 40, temperature=0)) == theirs["generated"].tolist()  # type: ignore[arg-type]


def test_their_weights_load_here(both: tuple[GPT, dict[str, torch.Tensor], dict[str, Any]]) -> None:
    model, _, theirs = both
    GPT(model.config).load_state_dict(theirs["first"], strict=True)
    if model.config.variant == "2025":
        return  # other order of draws; the scales are tested without nanochat
    torch.manual_seed(7)
    model.init_weights()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs["first"][name], atol=0, rtol=0, msg=name)
