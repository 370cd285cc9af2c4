"""A mixer in the place of a GPT block's attention, its state beside the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssm_blocks.mixer import State, build, mixer_class

ATTENTION = "A"
MIXER = "M"


class _Config(Protocol):
    n_embd: int
    n_layer: int


class AttentionAdapter(nn.Module):
    """Runs a mixer behind nanochat's attention signatures, (x, ve, cos_sin, window_size, kv_cache) of 2026 and
    (x, cos_sin, kv_cache) of 2025.

    Positions: a recurrence knows its order, so the rotary tables, the window and the value embedding are not used. With
    a cache, the state of this layer lies in `kv_cache.mixer_state[layer_index]`; one token goes through `step`, more
    through `forward` from that state. Whoever owns the cache moves its position on.
    """

    needs_keys = False  # the cache keeps no keys and values for this layer
    uses_value_embedding = False

    def __init__(self, name: str, dim: int, layer_index: int, **options: Any) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.attn_mixer = build(name, dim, **options)  # "attn" in the name: adaptive SVD's family attn finds it

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """x [B, T, D] -> [B, T, D]; the other arguments as in either of nanochat's attentions, the cache last."""
        if len(others) not in (2, 4):
            raise ValueError(
                "an attention takes (x, ve, cos_sin, window_size, kv_cache) or (x, cos_sin, kv_cache); got "
                f"{1 + len(others)} arguments"
            )
        cache = others[-1]
        if cache is None:
            return self.attn_mixer(x)
        return self._continue(x, states_of(cache))

    def _continue(self, x: Tensor, states: Any) -> Tensor:
        """Go on from this layer's state in the cache, and leave the new one there."""
        state: State | None = states[self.layer_index]
        if x.size(1) == 1:
            state = self.attn_mixer.init_state(x.size(0), x.device, x.dtype) if state is None else state
            y, states[self.layer_index] = self.attn_mixer.step(x[:, 0], state)
            return y.unsqueeze(1)
        y, states[self.layer_index] = self.attn_mixer(x, state, return_state=True)
        return y

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """The mixer's own, with a zero output projection: a block starts as the identity, as in nanochat."""
        self.attn_mixer.init_weights(generator)
        output = getattr(self.attn_mixer, "o_proj", None)
        if output is not None:
            output.weight.zero_()

    def flops_per_token(self) -> int:
        """FLOPs per token, forward and backward, beside the weights of `nn.Linear`, which the GPT counts itself."""
        return 3 * self.attn_mixer.flops_per_token()


def states_of(cache: Any) -> Any:
    """layer -> state in a cache, None before the first token. Ours has the slots; a foreign cache gets a dictionary."""
    if getattr(cache, "mixer_state", None) is None:
        cache.mixer_state = _Slots()
    return cache.mixer_state


class _Slots(dict):
    """layer -> state, None before the first token."""

    def __missing__(self, layer: int) -> None:
        return None


def is_attention_layer(pattern: str, layer: int) -> bool:
    """Whether `layer` keeps its attention under a pattern of M and A, tiled over the layers, e.g. MMMA.

    Raises ValueError for an empty pattern or other letters.
    """
    if not pattern or set(pattern) - {MIXER, ATTENTION}:
        raise ValueError(f"a mixer pattern consists of the letters M (mixer) and A (attention), got {pattern!r}")
    return pattern[layer % len(pattern)] == ATTENTION


def mixer_factory(
    name: str, attention: Callable[[Any, int], nn.Module], pattern: str = MIXER, **options: Any
) -> Callable[[Any, int], nn.Module]:
    """A GPT's `mixer_factory`: (config, layer) -> the adapted mixer `name`, or `attention(config, layer)` where the
    pattern says A. Raises ValueError at once for an unknown name, a bad pattern, or options the mixer refuses later.
    """
    mixer_class(name)
    is_attention_layer(pattern, 0)

    def make(config: _Config, layer: int) -> nn.Module:
        if is_attention_layer(pattern, layer):
            return attention(config, layer)
        return AttentionAdapter(name, config.n_embd, layer, **options)

    return make
