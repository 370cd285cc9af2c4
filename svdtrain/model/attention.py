"""Causal self-attention, and the slot that other sequence mixers can take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from svdtrain.model.attention_backends import attend, attend_cached
from svdtrain.model.gpt_config import GPTConfig
from svdtrain.model.kv_cache import KVCache
from svdtrain.model.layers import Linear, apply_rotary, rms_norm

MixerFactory = Callable[[GPTConfig, int], nn.Module]
"""(config, layer index) -> module with nanochat's attention signature:

    forward(x[B, T, D], ve[B, T, kv_dim] | None, cos_sin, window_size, kv_cache | None) -> y[B, T, D]

With a cache, the module reads and writes `kv_cache.mixer_state[layer]` (or keys and values); the GPT moves the
position. A module whose `needs_keys` is false gets no memory for keys and values, and one whose `uses_value_embedding`
is false no table; `flops_per_token()`, if there is one, says what it costs beside its nn.Linear weights.
"""

VE_GATE_CHANNELS = 12
QK_GAIN = 1.2


class CausalSelfAttention(nn.Module):
    """Rotary, QK-normalised attention with grouped heads; in the 2026 variant also value embeddings and QK gain."""

    def __init__(self, config: GPTConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads, self.num_kv_heads, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        kv_dim = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        gated = config.has_value_embedding(layer_index)
        self.ve_gate = Linear(VE_GATE_CHANNELS, config.n_kv_head) if gated else None
        # q and k are both multiplied by the gain; only their product matters, so it goes into the scale.
        self.scale = (QK_GAIN**2 if config.variant == "2026" else 1.0) / config.head_dim**0.5
        self.backend = "auto"

    def forward(
        self,
        x: Tensor,
        ve: Tensor | None,
        cos_sin: tuple[Tensor, Tensor],
        window_size: tuple[int, int],
        kv_cache: KVCache | None,
    ) -> Tensor:
        """x [B, T, D] (already normed) -> [B, T, D]; window_size is (left, right), left -1 for everything."""
        batch, length, _ = x.shape
        q = self.c_q(x).view(batch, length, self.num_heads, self.head_dim)
        k = self.c_k(x).view(batch, length, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).view(batch, length, self.num_kv_heads, self.head_dim)
        if ve is not None and self.ve_gate is not None:
            v = torch.addcmul(v, self._value_gate(x), ve.view_as(v))
        q, k = rms_norm(apply_rotary(q, *cos_sin)), rms_norm(apply_rotary(k, *cos_sin))
        window = None if window_size[0] < 0 else window_size[0]
        if kv_cache is None:
            y = attend(q, k, v, window, self.scale, self.backend)
        else:
            y = attend_cached(q, *kv_cache.append(self.layer_index, k, v), window, self.scale)
        return self.c_proj(y.reshape(batch, length, -1))

    def _value_gate(self, x: Tensor) -> Tensor:
        """[B, T, H_kv, 1] in (0, 3): how much of the value embedding each head adds (ResFormer, arXiv:2410.17897)."""
        assert self.ve_gate is not None
        return 3 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS])).unsqueeze(-1)
