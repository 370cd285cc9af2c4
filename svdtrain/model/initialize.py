"""First weights of both variants, drawn from one generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svdtrain.model.attention import CausalSelfAttention
from svdtrain.model.layers import Linear

if TYPE_CHECKING:
    from svdtrain.model.gpt import GPT, Block

Generator = torch.Generator | None


@torch.no_grad()
def init_2026(model: GPT, generator: Generator) -> None:
    """nanochat 92d63d4: uniform matrices of standard deviation width^-1/2, zero output projections, small head."""
    config = model.config
    bound = (3 / config.n_embd) ** 0.5  # uniform on +-bound has standard deviation width^-1/2
    _normal(model.get_parameter("transformer.wte.weight"), 0.8, generator)
    _normal(model.lm_head.weight, 0.001, generator)
    for block in model.blocks:
        _init_block_2026(block, bound, generator)
    last = max(config.n_layer - 1, 1)
    model.resid_lambdas.copy_(torch.tensor([1.15 - 0.10 * layer / last for layer in range(config.n_layer)]))
    model.x0_lambdas.copy_(torch.tensor([0.20 - 0.15 * layer / last for layer in range(config.n_layer)]))
    model.smear_lambda.zero_()
    model.backout_lambda.fill_(0.2)
    _uniform(model.smear_gate.weight, 0.0, 0.02, generator)
    for table in model.value_embeds.parameters():
        _uniform(table, -bound, bound, generator)
    for block in model.blocks:
        gate = getattr(block.attn, "ve_gate", None)
        if gate is not None:
            _uniform(gate.weight, 0.0, 0.02, generator)


def _init_block_2026(block: Block, bound: float, generator: Generator) -> None:
    if isinstance(block.attn, CausalSelfAttention):
        for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
            _uniform(linear.weight, -bound, bound, generator)
        block.attn.c_proj.weight.zero_()
    else:
        _init_mixer(block.attn, generator)
    _uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound, generator)
    block.mlp.c_proj.weight.zero_()


@torch.no_grad()
def init_2025(model: GPT, generator: Generator) -> None:
    """nanochat b399e43: normal with std fan_in^-1/2 min(1, (fan_out/fan_in)^1/2); zero head and projections.

    The scale is that of arXiv:2310.17813.
    """
    _normal(model.get_parameter("transformer.wte.weight"), 1.0, generator)
    model.lm_head.weight.zero_()
    for block in model.blocks:
        if not isinstance(block.attn, CausalSelfAttention):
            _init_mixer(block.attn, generator)
        for module in block.modules():
            if isinstance(module, Linear):
                fan_out, fan_in = module.weight.shape
                _normal(module.weight, min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5, generator)
        if isinstance(block.attn, CausalSelfAttention):
            block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()


def _init_mixer(mixer: nn.Module, generator: Generator) -> None:
    """A foreign mixer brings its own `init_weights(generator)`."""
    init = getattr(mixer, "init_weights", None)
    if init is None:
        raise ValueError(f"{type(mixer).__name__} needs a method init_weights(generator) to be used as a mixer")
    init(generator)


def _normal(weight: Tensor, std: float, generator: Generator) -> None:
    weight.copy_(torch.empty_like(weight, dtype=torch.float32).normal_(0.0, std, generator=generator))


def _uniform(weight: Tensor, low: float, high: float, generator: Generator) -> None:
    weight.copy_(torch.empty_like(weight, dtype=torch.float32).uniform_(low, high, generator=generator))
