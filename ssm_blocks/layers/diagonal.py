"""Diagonal state-space models whose decays depend on the input: the baselines.

h_t = a_t * h_{t-1} + i_t * B u_t with a_t in (0, 1), in (-1, 1), or in the complex unit disk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssm_blocks.layers.base import Call, Inputs
from ssm_blocks.layers.linear_state import LinearStateMixer
from ssm_blocks.layers.modules import Gate
from ssm_blocks.layers.poles import RADIUS, logit
from ssm_blocks.mixer import register
from ssm_blocks.ops.reference import scan_reference
from ssm_blocks.ops.scans import scan


@register("diagonal")
class DiagonalSSM(LinearStateMixer):
    """a_t = sigmoid in (0, 1). Options as in `LinearStateMixer`; method: see `ops.scans.scan`."""

    first_decay = logit(RADIUS)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        state_size: int = 64,
        conv_size: int = 4,
        learned_state: bool = False,
        method: str = "blelloch",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            num_heads=num_heads,
            state_size=state_size,
            conv_size=conv_size,
            learned_state=learned_state,
            backend=backend,
        )
        size = self.num_heads * state_size
        self.method = method
        self.decay_gate = Gate(dim, size, bias=self.first_decay)
        self.input_gate = Gate(dim, size)
        self.angle_gate = Gate(dim, size, gain=1.0) if self.is_complex else None
        self.init_weights()

    def recurrence_flops_per_token(self) -> int:
        """Per state: a h + i b of 3, or 10 where complex."""
        return (10 if self.is_complex else 3) * self.num_heads * self.state_size

    def _decay(self, raw: Tensor) -> Tensor:
        return torch.sigmoid(raw)

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        inputs = super()._inputs(x, features)
        a, gate = self._decay(self.decay_gate(x)), torch.sigmoid(self.input_gate(x))
        if self.angle_gate is not None:
            a = torch.polar(a, self.angle_gate(x))
        shape = (self.num_heads, self.state_size)
        drive = self._drive(inputs["u"], self._number(self.B, gate.dtype))
        return {**inputs, "a": a.unflatten(-1, shape), "b": gate.unflatten(-1, shape) * drive}

    def _states(self, inputs: Inputs, h: Tensor, call: Call) -> Tensor:
        a, b = inputs["a"], inputs["b"]
        if call.form == "parallel":
            return scan("diagonal", (a,), b, h, method=self.method)
        return scan_reference(lambda t, h: a[:, t] * h, b, h)


@register("diagonal_signed")
class SignedDiagonalSSM(DiagonalSSM):
    """a_t = tanh in (-1, 1): parity, but no rotation (arXiv:2411.12537)."""

    first_decay = math.atanh(RADIUS)

    def _decay(self, raw: Tensor) -> Tensor:
        return torch.tanh(raw)


@register("diagonal_complex")
class ComplexDiagonalSSM(DiagonalSSM):
    """|a_t| in (0, 1) with an angle from the input: every abelian group."""

    is_complex = True
