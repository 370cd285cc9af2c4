"""006: input-dependent Monarch transitions, h_t = g_t P^T L_t P R_t h_{t-1} + B u_t.

The state of a head is a b x b grid: R_t moves the entries within each row, L_t those within each column (P transposes
the grid). Every b x b block has norm <= 1: products of n_h reflections I - beta u u^T of the input with beta in (0, 2),
or Cayley transforms. Fixed orthogonal L and R with gates, as first proposed, either forget (.9 x .9 leaves .015 after
20 steps) or do not depend on the input; and Monarch matrices are not closed under multiplication, so the parallel form
in torch scans dense n x n products, n = b^2. On a GPU, `ops.triton_scan` walks through time instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_blocks.layers.base import Call, Inputs
from ssm_blocks.layers.linear_state import LinearStateMixer
from ssm_blocks.layers.modules import Gate, Linear, split_heads, wide
from ssm_blocks.mixer import register
from ssm_blocks.ops import triton_scan
from ssm_blocks.ops.householder import householder_product, householder_product_reference
from ssm_blocks.ops.orthogonal import scaled_cayley, skew
from ssm_blocks.ops.reference import scan_reference
from ssm_blocks.ops.scans import scan

FACTORS = 2  # L and R
FORGET_BIAS = 8.0  # sigmoid(8) = .9997
LARGEST_SKEW = 100.0


@register("monarch")
class MonarchGated(LinearStateMixer):
    """Householder blocks. block_size: b, the state has b^2 numbers a head; num_householder: n_h per block.

    Other options as in `LinearStateMixer`; method: of the form in torch, see `ops.scans.scan`.
    """

    has_triton_kernel = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        block_size: int = 4,
        num_householder: int = 1,
        conv_size: int = 4,
        learned_state: bool = True,
        method: str = "blelloch",
        backend: str = "auto",
    ) -> None:
        if block_size < 2 or num_householder < 1:
            raise ValueError(
                f"block_size is at least 2 and num_householder at least 1, got {block_size} and {num_householder}"
            )
        heads, _ = split_heads(dim, num_heads)
        self.block_size, self.num_householder, self.method = block_size, num_householder, method
        directions = heads * FACTORS * block_size * self._vectors_per_block() * block_size
        super().__init__(
            dim,
            num_heads=num_heads,
            state_size=block_size**2,
            conv_size=conv_size,
            learned_state=learned_state,
            backend=backend,
            extra_features=directions,
        )
        self.k_proj = Linear(dim, directions)
        self.forget_gate = Gate(dim, heads, bias=FORGET_BIAS)
        gates = heads * FACTORS * block_size * self._gates_per_block()
        self.block_gate = Gate(dim, gates, gain=1.0) if gates else None
        self.init_weights()

    def recurrence_flops_per_token(self) -> int:
        """Making the 2 b blocks, and applying them: 2 b^2 each."""
        b = self.block_size
        return self.num_heads * (FACTORS * b * (self._block_flops() + 2 * b * b) + b * b)

    # what a variant defines -----------------------------------------------------------------------------------------

    def _vectors_per_block(self) -> int:
        return self.num_householder

    def _gates_per_block(self) -> int:
        return self.num_householder

    def _block_flops(self) -> int:
        """Forward FLOPs of one block: a reflection costs 4 b^2."""
        return 4 * self.block_size**2 * self.num_householder

    def _blocks(self, vectors: Tensor, gates: Tensor | None, exact: bool) -> Tensor:
        """vectors [..., m, b], gates [..., m] -> [..., b, b] of norm <= 1; `exact` multiplies one by one."""
        assert gates is not None
        product = householder_product_reference if exact else householder_product
        return product(*self._reflections(vectors, gates))

    @property
    def _is_made_of_reflections(self) -> bool:
        """Whether a kernel may take the reflections for the blocks: a subclass with blocks of its own may not."""
        own = type(self)._blocks is not MonarchGated._blocks
        return not own and self.num_householder <= triton_scan.MOST_REFLECTIONS

    def _reflections(self, vectors: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors u and beta in (0, 2) of the reflections I - beta u u^T."""
        return F.normalize(vectors, dim=-1), 2 * torch.sigmoid(gates)

    # ----------------------------------------------------------------------------------------------------------------

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.v_proj(x), self.k_proj(x)], -1)

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        inputs = super()._inputs(x, features)
        shape = (self.num_heads, FACTORS, self.block_size)
        vectors = features[..., self.num_heads * self.head_dim :].to(wide(x.dtype))
        inputs["vectors"] = vectors.unflatten(-1, (*shape, self._vectors_per_block(), self.block_size))
        inputs["forget"] = torch.sigmoid(self.forget_gate(x))
        if self.block_gate is not None:
            inputs["gates"] = self.block_gate(x).unflatten(-1, (*shape, self._gates_per_block()))
        return inputs

    def _states(self, inputs: Inputs, h: Tensor, call: Call) -> Tensor:
        b = self._drive(inputs["u"], self.B.to(h.dtype))
        walks = call.form == "parallel" and triton_scan.use_triton(self.backend, h.dtype, h.device, self.state_size)
        if walks and self._is_made_of_reflections:
            u, beta = self._reflections(inputs["vectors"], inputs["gates"])
            return triton_scan.monarch_scan(u, beta, inputs["forget"], b, h)  # type: ignore[call-arg]
        blocks = self._blocks(inputs["vectors"], inputs.get("gates"), exact=call.form == "reference")
        L, R = blocks.unbind(3)
        forget = inputs["forget"]
        if call.form != "parallel":
            return scan_reference(lambda t, h: forget[:, t, :, None] * monarch_apply(L[:, t], R[:, t], h), b, h)
        A = forget[..., None, None] * monarch_matrix(L, R)
        if walks:
            return triton_scan.dense_scan(A, b, h)  # type: ignore[call-arg]
        return scan("dense", (A,), b, h, method=self.method)


def monarch_matrix(L: Tensor, R: Tensor) -> Tensor:
    """P^T L P R as [..., b^2, b^2] for blocks L, R [..., b, b, b]: block j of L acts on column j, i of R on row i."""
    M = torch.einsum("...jai,...ijk->...ajik", L, R)
    return M.flatten(-4, -3).flatten(-2, -1)


def monarch_apply(L: Tensor, R: Tensor, h: Tensor) -> Tensor:
    """P^T L P R h for h [..., b^2], in O(b^3)."""
    grid = h.unflatten(-1, R.shape[-2:])
    rows = torch.einsum("...ijk,...ik->...ij", R, grid)
    return torch.einsum("...jai,...ij->...aj", L, rows).flatten(-2)


def _bounded_skew(X: Tensor) -> Tensor:
    """The skew part of X [..., b, b], shortened to a Frobenius norm of at most 100: angles up to pi - .028.

    The inverse in the Cayley transform is as inexact as this is long: without a bound, float32 lets norms reach 1.007.
    """
    K = skew(X)
    length = torch.linalg.matrix_norm(K, keepdim=True)
    return K * (LARGEST_SKEW / length.clamp(min=LARGEST_SKEW))


@register("monarch_cayley")
class MonarchCayley(MonarchGated):
    """Blocks are rotations: Cayley transforms of the input's skew part. n_h has no meaning here."""

    def _vectors_per_block(self) -> int:
        return self.block_size

    def _gates_per_block(self) -> int:
        return 0

    def _block_flops(self) -> int:
        """An inverse."""
        return 2 * self.block_size**3

    def _blocks(self, vectors: Tensor, gates: Tensor | None, exact: bool) -> Tensor:
        sign = torch.ones_like(vectors[..., 0]) if gates is None else gates.tanh()
        return scaled_cayley(_bounded_skew(vectors), sign)


@register("monarch_signed_cayley")
class MonarchSignedCayley(MonarchCayley):
    """Rotations times diag(tanh of the input): with signs every orthogonal block, reflections included."""

    def _gates_per_block(self) -> int:
        return self.block_size
