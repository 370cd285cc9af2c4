"""Against nanochat's own MuonAdamW, uncompiled, in fp32. Set NANOCHAT_DIR_2026 to a checkout of commit 92d63d4."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svdtrain.config import OptimConfig
from svdtrain.model import GPT, GPTConfig
from svdtrain.optim import MuonAdamW, build_param_groups

STEPS = 4

THEIRS = """
import sys, torch
from nanochat.gpt import GPT, GPTConfig
ask = torch.load(sys.argv[1], weights_only=True)
model = GPT(GPTConfig(**ask["config"]))
model.init_weights()
model.load_state_dict(ask["weights"])
optimizer = model.setup_optimizer(
    unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, weight_decay=0.28, scalar_lr=0.5
)
groups = [{k: v for k, v in g.items() if k != "params"} | {"count": len(g["params"])} for g in optimizer.param_groups]
for grads in ask["grads"]:
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name].clone()
    optimizer.step()
torch.save({"weights": model.state_dict(), "groups": groups}, sys.argv[2])
"""


def test_same_steps_and_same_groups(tmp_path: Path) -> None:
    directory = os.environ.get("NANOCHAT_DIR_2026")
    if not directory:
        pytest.skip("NANOCHAT_DIR_2026 is not set")
    shape = {"sequence_len": 64, "vocab_size": 128, "n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": 64}
    model = GPT(GPTConfig(**shape))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    grads = [
        {name: 0.01 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
        for _ in range(STEPS)
    ]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"config": shape, "weights": start, "grads": grads}, tmp_path / "ask.pt")
    environment = {**os.environ, "PYTHONPATH": directory, "NANOCHAT_DTYPE": "float32", "TORCHDYNAMO_DISABLE": "1"}
    environment["NANOCHAT_BASE_DIR"] = str(tmp_path / "base")
    command = [sys.executable, "-c", THEIRS, str(tmp_path / "ask.pt"), str(tmp_path / "answer.pt")]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=tmp_path, timeout=300)
    theirs = torch.load(tmp_path / "answer.pt", weights_only=True)

    optimizer = MuonAdamW(build_param_groups(model, OptimConfig()))
    for ours, group in zip(optimizer.param_groups, theirs["groups"], strict=True):
        assert len(ours["params"]) == group.pop("count")
        for key, value in group.items():
            assert ours[key] == pytest.approx(value), (ours["name"], key)
    for step in grads:
        for name, parameter in model.named_parameters():
            parameter.grad = step[name].clone()
        optimizer.step()
    for name, value in model.state_dict().items():
        moved = float((theirs["weights"][name] - start[name]).abs().max())
        assert moved > 0
        torch.testing.assert_close(value, theirs["weights"][name], atol=2e-4 * moved, rtol=1e-5, msg=name)
