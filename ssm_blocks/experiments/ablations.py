"""What 006 is measured against and nobody should use: its first design, and its blocks without the mixing.

Built by path, `build("ssm_blocks.experiments.ablations:BlockDiagonal", ...)`; they are in no registry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_blocks.layers.base import Call, Inputs
from ssm_blocks.layers.linear_state import LinearStateMixer
from ssm_blocks.layers.modules import Gate, Generator, fill_normal, split_heads
from ssm_blocks.layers.monarch import FACTORS, MonarchGated, monarch_apply, monarch_matrix
from ssm_blocks.ops.orthogonal import cayley
from ssm_blocks.ops.reference import scan_reference
from ssm_blocks.ops.scans import scan

FIRST_DESIGN = "ssm_blocks.experiments.ablations:FirstMonarch"
BLOCK_DIAGONAL = "ssm_blocks.experiments.ablations:BlockDiagonal"


class FirstMonarch(LinearStateMixer):
    """006 as first written: h_t = diag(g'_t) P^T L P diag(g_t) R h_{t-1} + B u_t, L and R fixed and orthogonal.

    The gates in (0, 1) are all that depends on the input: below 1 they forget, at 1 they are no longer gates.
    """

    adamw_names = frozenset({"skip", "first_state", "generators"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        block_size: int = 4,
        conv_size: int = 4,
        learned_state: bool = True,
        method: str = "blelloch",
        backend: str = "auto",
    ) -> None:
        heads, _ = split_heads(dim, num_heads)
        super().__init__(
            dim,
            num_heads=num_heads,
            state_size=block_size**2,
            conv_size=conv_size,
            learned_state=learned_state,
            backend=backend,
        )
        self.method = method
        self.generators = nn.Parameter(torch.empty(heads, FACTORS, block_size, block_size, block_size))
        self.gates = Gate(dim, heads * FACTORS * block_size**2, bias=3.0, gain=1.0)
        self.init_weights()

    def init_weights(self, generator: Generator = None) -> None:
        super().init_weights(generator)
        fill_normal(self.generators, 1.0, generator)

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        gates = torch.sigmoid(self.gates(x)).unflatten(-1, (self.num_heads, FACTORS, self.state_size))
        return {**super()._inputs(x, features), "gates": gates}

    def _states(self, inputs: Inputs, h: Tensor, call: Call) -> Tensor:
        b = self._drive(inputs["u"], self.B.to(h.dtype))
        L, R = cayley(self.generators.to(h.dtype)).unbind(1)
        inner, outer = inputs["gates"].unbind(3)
        nothing = torch.eye(L.size(-1), dtype=h.dtype, device=h.device).expand_as(L)
        if call.form == "parallel":
            rows, columns = monarch_matrix(nothing, R), monarch_matrix(L, nothing)
            A = outer.unsqueeze(-1) * (columns @ (inner.unsqueeze(-1) * rows))
            return scan("dense", (A,), b, h, method=self.method)

        def move(t: int, h: Tensor) -> Tensor:
            return outer[:, t] * monarch_apply(L, nothing, inner[:, t] * monarch_apply(nothing, R, h))

        return scan_reference(move, b, h)


class BlockDiagonal(MonarchGated):
    """Monarch-Householder without P and L: b blocks of b states each that never meet."""

    def _blocks(self, vectors: Tensor, gates: Tensor | None, exact: bool) -> Tensor:
        blocks = super()._blocks(vectors, gates, exact)
        identity = torch.eye(blocks.size(-1), dtype=blocks.dtype, device=blocks.device)
        L, R = blocks.unbind(3)
        return torch.stack([identity.expand_as(L), R], 3)
