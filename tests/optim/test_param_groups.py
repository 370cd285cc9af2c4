"""Every parameter in one group, with nanochat's hyperparameters."""

import pytest
import torch
from torch import nn

from svdtrain.config import OptimConfig
from svdtrain.model import GPT, GPTConfig
from svdtrain.optim import MuonAdamW, build_param_groups


def meta_model(variant: str = "2026") -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig.from_depth(4, vocab_size=512, sequence_len=64, variant=variant))  # type: ignore[arg-type]


def test_groups_of_2026() -> None:
    model = meta_model()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["name"]: g for g in build_param_groups(model, OptimConfig(), lr_scale=0.5, weight_decay=0.1)}
    width = (256 / 768) ** -0.5
    table = {  # lr, betas, weight decay, number of parameters
        "lm_head": (0.008 * 0.5 * width, (0.8, 0.96), 0.01, 1),
        "wte": (0.3 * 0.5 * width, (0.8, 0.995), 0.001, 1),
        "value_embeds": (0.15 * 0.5 * width, (0.8, 0.995), 0.01, 2),
        "resid_lambdas": (0.005 * 0.5, (0.8, 0.95), 0.05, 1),
        "x0_lambdas": (0.5 * 0.5, (0.96, 0.95), 0.0, 1),
        "smear_backout": (0.2, (0.8, 0.95), 0.0, 3),
    }
    for name, (lr, betas, decay, count) in table.items():
        group = groups.pop(name)
        assert group["kind"] == "adamw"
        assert (group["lr"], group["initial_lr"]) == (pytest.approx(lr), pytest.approx(lr))
        assert (group["betas"], group["weight_decay"], len(group["params"])) == (betas, decay, count)
    assert list(groups) == ["muon_2x12", "muon_256x256", "muon_256x1024", "muon_1024x256"]
    assert {names[id(p)] for p in groups["muon_2x12"]["params"]} == {
        f"transformer.h.{layer}.attn.ve_gate.weight" for layer in (1, 3)
    }
    for group in groups.values():
        assert (group["lr"], group["weight_decay"], group["initial_weight_decay"]) == (0.01, 0.1, 0.1)
    MuonAdamW(build_param_groups(model, OptimConfig()))


def test_groups_of_2025_and_default_decay() -> None:
    groups = build_param_groups(meta_model("2025"), OptimConfig(weight_decay=0.2))
    assert [g["name"] for g in groups] == ["lm_head", "wte", "muon_256x256", "muon_256x1024", "muon_1024x256"]
    assert groups[-1]["weight_decay"] == 0.2


def test_foreign_mixer_parameters_that_are_no_matrices_go_to_adamw_without_decay() -> None:
    model = meta_model()
    model.blocks[0].attn.register_parameter("poles", nn.Parameter(torch.zeros(3, 4, 5)))
    model.blocks[0].attn.register_parameter("gains", nn.Parameter(torch.zeros(7)))
    groups = {g["name"]: g for g in build_param_groups(model, OptimConfig())}
    assert sorted(p.dim() for p in groups["block_other"]["params"]) == [1, 3]
    assert groups["block_other"]["weight_decay"] == 0


def test_unknown_parameter_is_named() -> None:
    model = meta_model()
    model.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="'extra'"):
        build_param_groups(model, OptimConfig())
