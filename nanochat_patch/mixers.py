"""State-space mixers in the place of nanochat's attention.

Wrapped are: `GPT.init_weights`, after which the chosen layers have a mixer (so before a checkpoint is loaded, before
compiling and before the optimizer is built); the building of the optimizer, which would orthogonalise the updates of a
mixer's vectors; the counts behind the printed FLOPs; and `KVCache.prefill` and `reset`, for the states beside it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat_patch.compat import (
    MixerSurface,
    UnsupportedNanochat,
    adamw_group,
    advance_cache,
    blocks_of,
    check_attention,
    never_held_keys,
    split_optimizers,
    uses_fp8,
)
from nanochat_patch.flat import FlatParameters
from nanochat_patch.options import MixerConfig, is_main_process
from nanochat_patch.wrapping import refuse, wrap
from ssm_blocks.adapter import AttentionAdapter, states_of
from ssm_blocks.mixer import non_matrix_parameters
from svdtrain.config import OptimConfig

BETAS, EPS = (0.8, 0.95), 1e-10  # of our own trainer's group for the same parameters (svdtrain.optim.param_groups)
RATE_OF_SCALARS = 0.01


class NanochatMixer(AttentionAdapter):
    """The adapter under nanochat's own cache and its autocast.

    In the last layer it moves the cache's position on, which nanochat's attention does there. Under autocast (2025) the
    input is cast, and autocast is off inside: a mixer's gates and states stay in float32.
    """

    def __init__(self, name: str, dim: int, layer_index: int, *, is_last: bool, **options: Any) -> None:
        super().__init__(name, dim, layer_index, **options)
        self.is_last = is_last

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """See AttentionAdapter."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            with torch.autocast(kind, enabled=False):
                return self._mix(x.to(dtype), *others)
        return self._mix(x, *others)

    def _mix(self, x: Tensor, *others: Any) -> Tensor:
        cache = others[-1] if others else None
        if cache is not None:
            self._spread_state(cache, x.size(0))
        y = super().forward(x, *others)
        if cache is not None and self.is_last:
            advance_cache(cache, x.size(1))
        return y

    def _spread_state(self, cache: Any, batch: int) -> None:
        """nanochat reads a prompt once, then goes on from it in several rows."""
        states = states_of(cache)
        state = states[self.layer_index]
        if state is not None:
            states[self.layer_index] = {
                name: value if value.size(0) == batch else value.expand(batch, *value.shape[1:]).clone()
                for name, value in state.items()
            }


def install(surface: MixerSurface, config: MixerConfig) -> None:
    """Wrap what mixers need."""
    wrap(surface.gpt, "init_weights", lambda original: _init_weights(original, config))
    wrap(surface.gpt, surface.setup_name, lambda original: _setup(original, surface.setup_name))
    if surface.linear is not None:
        linear = surface.linear
        wrap(surface.gpt, "num_matmul_params", lambda original: _num_matmul_params(original, linear))
    if hasattr(surface.gpt, "estimate_flops"):
        wrap(surface.gpt, "estimate_flops", lambda original: _flops(original, counts_all=surface.linear is None))
    wrap(surface.cache, "prefill", _prefill)
    wrap(surface.cache, "reset", _reset)


def mixers_of(model: Any) -> dict[int, NanochatMixer]:
    """The mixers of a GPT by layer."""
    found = enumerate(block.attn for block in blocks_of(model))
    return {layer: attn for layer, attn in found if isinstance(attn, NanochatMixer)}


# --- weights ---


def _init_weights(original: Callable[..., Any], config: MixerConfig) -> Callable[..., Any]:
    def init_weights(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)  # first: it draws attention's weights, too, for every layer
        try:
            put_mixers(model, config)
        except (ValueError, UnsupportedNanochat) as error:
            refuse(error)
        return result

    return init_weights


def put_mixers(model: Any, config: MixerConfig) -> None:
    """Replace attention in the layers of the pattern by freshly drawn mixers.

    They are drawn from a generator of their own: the other weights, and what is drawn after them, are a plain run's.
    Raises ValueError for a width that does not suit the mixer, UnsupportedNanochat for another kind of attention.
    """
    blocks = blocks_of(model)
    layers = config.layers(len(blocks))
    device = next(model.parameters()).device
    # Another seed than nanochat's, or a mixer's first numbers would be those of its embedding.
    generator = torch.Generator(device=device).manual_seed(torch.initial_seed() + 1)
    for layer in layers:
        check_attention(blocks[layer].attn)
        with torch.device("meta"):
            mixer = NanochatMixer(config.mixer, model.config.n_embd, layer, is_last=layer == len(blocks) - 1)
        mixer.to_empty(device=device)
        mixer.init_weights(generator)
        blocks[layer].attn = mixer
        _drop_value_embedding(model, layer)
    _say(f"{config.mixer} in layers {layers} of {len(blocks)}")


def _drop_value_embedding(model: Any, layer: int) -> None:
    """A mixer does not read it: it would get no gradient, which nanochat's optimizer does not survive."""
    embeddings = getattr(model, "value_embeds", None)
    if embeddings is not None and str(layer) in embeddings:
        del embeddings[str(layer)]


# --- optimizer ---


def _setup(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def setup(model: Any, *args: Any, **kwargs: Any) -> Any:
        mixers = mixers_of(model)
        with set_aside(mixers) as small:
            result = original(model, *args, **kwargs)
        given = signature.bind(model, *args, **kwargs)
        given.apply_defaults()
        try:
            if any(uses_fp8(mixer) for mixer in mixers.values()):
                raise ValueError("nobody has validated mixers in 8 bits: train them without --fp8")
            if small:
                _add_group(split_optimizers(name, result)[0], name, small, given.arguments.get("scalar_lr"))
        except (ValueError, UnsupportedNanochat) as error:
            refuse(error)
        return result

    return setup


@contextmanager
def set_aside(mixers: dict[int, NanochatMixer]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the mixers seem to consist of their trained matrices only: nanochat gives every parameter of a block to
    Muon, and counts whether it has all. Gives the other trained parameters by name."""
    small: dict[str, nn.Parameter] = {}
    places = []
    for layer, mixer in mixers.items():
        no_matrices = non_matrix_parameters(mixer)
        for name, parameter in list(mixer.named_parameters()):
            if name not in no_matrices and parameter.requires_grad:
                continue
            owner, _, local = name.rpartition(".")
            places.append((mixer.get_submodule(owner), local, parameter))
            if parameter.requires_grad:
                small[f"transformer.h.{layer}.attn.{name}"] = parameter
    for module, local, _ in places:
        module._parameters[local] = None  # not removed: its place in the order stays
    try:
        yield small
    finally:
        for module, local, parameter in places:
            module._parameters[local] = parameter


def _add_group(
    optimizer: torch.optim.Optimizer, setup_name: str, small: dict[str, nn.Parameter], scalar_lr: float | None
) -> None:
    """AdamW without weight decay, at the rate that our own trainer gives such parameters. scalar_lr: nanochat's, where
    it has one, already scaled for the batch."""
    lr = RATE_OF_SCALARS * (OptimConfig().scalar_lr if scalar_lr is None else scalar_lr)
    group = {**adamw_group(setup_name, optimizer), "lr": lr, "initial_lr": lr, "betas": BETAS, "eps": EPS}
    num_ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    FlatParameters(small, num_ranks).add_to(optimizer, {**group, "weight_decay": 0.0})
    _say(f"{sum(p.numel() for p in small.values()):,} parameters that are no matrices go to AdamW at {lr:.3g}")


# --- counts ---


def _num_matmul_params(original: Callable[..., Any], linear: type) -> Callable[..., Any]:
    def num_matmul_params(model: Any) -> int:
        counted = sum(_linear_weights(mixer, but=linear) for mixer in mixers_of(model).values())
        return original(model) + counted

    return num_matmul_params


def _flops(original: Callable[..., Any], *, counts_all: bool) -> Callable[..., Any]:
    def estimate_flops(model: Any) -> Any:
        flops = original(model)
        for layer, mixer in mixers_of(model).items():
            flops += mixer.flops_per_token() - 12 * model.config.n_embd * _visible_keys(model, layer)
            if counts_all:  # 6 for each parameter, those included whose products the mixer has counted itself
                flops -= 6 * (sum(p.numel() for p in mixer.parameters()) - _linear_weights(mixer))
        return flops

    return estimate_flops


def _visible_keys(model: Any, layer: int) -> int:
    """That nanochat thinks this layer's attention reads per token."""
    length = model.config.sequence_len
    windows = getattr(model, "window_sizes", None)
    left = -1 if windows is None else windows[layer][0]
    return length if left < 0 else min(left, length)


def _linear_weights(module: nn.Module, but: type | None = None) -> int:
    """Weights of the matrices in it, those of class `but` left out."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and not (but and isinstance(m, but))]
    return sum(layer.weight.numel() for layer in layers)


# --- cache ---


def _prefill(original: Callable[..., Any]) -> Callable[..., Any]:
    def prefill(cache: Any, other: Any) -> Any:
        states = getattr(other, "mixer_state", None)
        result = None
        if states is not None and never_held_keys(other):
            # Only mixers: there is nothing to copy, which the original takes for a mistake.
            assert cache.get_pos() == 0, "cannot prefill a cache that is in use"
            cache.pos = other.pos
        else:
            result = original(cache, other)
        cache.mixer_state = copy.copy(states)  # states are replaced and never written to, so both may hold them
        return result

    return prefill


def _reset(original: Callable[..., Any]) -> Callable[..., Any]:
    def reset(cache: Any, *args: Any, **kwargs: Any) -> Any:
        cache.mixer_state = None
        return original(cache, *args, **kwargs)

    return reset


def _say(line: str) -> None:
    if is_main_process():
        print(f"mixer | {line}", flush=True)
