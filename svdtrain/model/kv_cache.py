"""What generation remembers between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from svdtrain.model.gpt import GPT


class KVCache:
    """Keys and values of the layers that attend, the position, and the last embedding before smearing.

    `mixer_state` has one slot per layer for sequence mixers that keep a state of their own instead of keys and values.
    attending: the layers that get memory for keys and values, all by default; without any, no memory grows with
    max_len.
    """

    def __init__(
        self,
        *,
        n_layer: int,
        batch_size: int,
        max_len: int,
        n_kv_head: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
        attending: Sequence[int] | None = None,
    ) -> None:
        layers = range(n_layer) if attending is None else attending
        self._place = {layer: place for place, layer in enumerate(layers)}
        shape = (len(layers), batch_size, max_len, n_kv_head, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.position = 0
        self.prev_embedding: Tensor | None = None
        self.mixer_state: list[Any] = [None] * n_layer

    @classmethod
    def for_model(cls, model: GPT, batch_size: int, max_len: int) -> KVCache:
        """An empty cache of the right shape, type and device for `model`; max_len in tokens."""
        config = model.config
        return cls(
            n_layer=config.n_layer,
            batch_size=batch_size,
            max_len=max_len,
            n_kv_head=config.n_kv_head,
            head_dim=config.head_dim,
            device=model.get_device(),
            dtype=model.compute_dtype,
            attending=[i for i, block in enumerate(model.blocks) if getattr(block.attn, "needs_keys", True)],
        )

    @property
    def max_len(self) -> int:
        """Capacity in tokens."""
        return self.keys.size(2)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, T, H_kv, D] behind the current position; return views of all [B, position + T, H_kv, D].

        The position moves only with `advance`, after every layer has appended. Raises ValueError when full.
        """
        end = self.position + k.size(1)
        if end > self.max_len:
            raise ValueError(
                f"the KV cache holds {self.max_len} tokens, {end} are needed; make it with a larger max_len"
            )
        keys, values = self.keys[self._place[layer]], self.values[self._place[layer]]
        keys[:, self.position : end] = k
        values[:, self.position : end] = v
        return keys[:, :end], values[:, :end]

    def num_bytes(self) -> int:
        """Memory of everything that is remembered between tokens."""
        states = [value for state in self.mixer_state if state is not None for value in state.values()]
        last = [] if self.prev_embedding is None else [self.prev_embedding]
        return sum(x.numel() * x.element_size() for x in [self.keys, self.values, *states, *last])

    def advance(self, num_tokens: int) -> None:
        """Move the position after a forward pass over num_tokens."""
        self.position += num_tokens

    def reset(self) -> None:
        """Back to empty, keeping the memory."""
        self.position = 0
        self.prev_embedding = None
        self.mixer_state = [None] * len(self.mixer_state)
