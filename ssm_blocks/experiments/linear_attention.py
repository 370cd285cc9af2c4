"""What 005 is measured against: linear attention with a dense state; and positions for mixers that have none."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_blocks.layers.base import Call, Inputs, RecurrentMixer
from ssm_blocks.layers.modules import DecayGate, Generator, Linear, split_heads, wide
from ssm_blocks.mixer import Mixer, State, build
from ssm_blocks.ops import fla
from ssm_blocks.ops.delta import chunk_linear_attention
from ssm_blocks.ops.reference import linear_attention_reference

DENSE = "ssm_blocks.experiments.linear_attention:DenseLinearAttention"
POSITIONED = "ssm_blocks.experiments.linear_attention:Positioned"


class DenseLinearAttention(RecurrentMixer):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T with every entry of S [d, d] kept: `segmented_hss` without the structure."""

    has_fla_kernel = True
    neutral: ClassVar = {"k": 0.0, "log_decay": 0.0}

    def __init__(
        self, dim: int, *, num_heads: int | None = None, conv_size: int = 4, chunk: int = 64, backend: str = "auto"
    ) -> None:
        heads, width = split_heads(dim, num_heads)
        super().__init__(dim, features=3 * dim, read_heads=(heads, width), conv_size=conv_size, backend=backend)
        self.num_heads, self.head_dim, self.chunk = heads, width, chunk
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim) for _ in range(3))
        self.decay_gate = DecayGate(dim, heads)
        self.init_weights()

    def _first_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        return {"S": torch.zeros(batch, self.num_heads, self.head_dim, self.head_dim, dtype=dtype, device=device)}

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        q, k, v = features.to(wide(x.dtype)).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v, "log_decay": self.decay_gate(x)}

    def _recur(self, inputs: Inputs, state: State, call: Call) -> tuple[Tensor, State]:
        x = (inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"], state["S"])
        if call.form != "parallel":
            o, S = linear_attention_reference(*x)
        elif fla.use_fla(self.backend, call.dtype, inputs["q"].device, self.head_dim, decays=True):
            o, S = fla.linear_attention(*x, call.dtype)
        else:
            o, S = chunk_linear_attention(*x, self.chunk)
        return o, {"S": S}


class Positioned(Mixer):
    """A mixer that is told where it is: cosines and sines of the position, with periods of 2 to `longest` tokens, are
    added to its input by a learned map. Linear attention alone cannot tell how long ago something was.
    """

    def __init__(self, dim: int, *, inner: str, longest: int = 256, **options: Any) -> None:
        super().__init__(dim)
        self.inner = build(inner, dim, **options)
        self.longest, self.num_angles = longest, dim // 2
        self.position = Linear(2 * self.num_angles, dim)
        self.position.init_weights()

    def forward(
        self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """See `Mixer.forward`. Raises ValueError for packed sequences, which it does not take."""
        if cu_seqlens is not None:
            raise ValueError("positions are counted from the row's start; packed sequences are not taken")
        state = self.init_state(x.size(0), x.device, x.dtype) if state is None else state
        inner = {name: value for name, value in state.items() if name != "position"}
        steps = torch.arange(x.size(1), device=x.device, dtype=inner_type(x))
        x = x + self._code(state["position"] + steps).to(x.dtype)
        y, last = self.inner(x, inner, return_state=True)
        return (y, {**last, "position": state["position"] + x.size(1)}) if return_state else y

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        y, state = self.forward(x.unsqueeze(1), state, return_state=True)  # type: ignore[misc]
        return y.squeeze(1), state

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The inner mixer's, and the position."""
        state = self.inner.init_state(batch, device, dtype)
        where = next(iter(state.values()))
        return {**state, "position": torch.zeros(batch, 1, device=where.device, dtype=where.dtype)}

    def init_weights(self, generator: Generator = None) -> None:
        """See `Mixer.init_weights`."""
        self.inner.init_weights(generator)
        self.position.init_weights(generator)

    def _code(self, position: Tensor) -> Tensor:
        """position [B, T] -> [B, T, dim]."""
        periods = torch.logspace(1, math.log2(self.longest), self.num_angles, base=2, device=position.device)
        angles = position.unsqueeze(-1) * (2 * math.pi / periods)
        return self.position(torch.cat([angles.cos(), angles.sin()], -1))


def inner_type(x: Tensor) -> torch.dtype:
    """Positions are counted in float32 or wider: bfloat16 stops counting at 256."""
    return wide(x.dtype)
