"""One matrix in low-rank mode: W = W_p + B A, factorised on the optimizer's side of the gradient.

The model always runs with its own dense W. Only the optimizer sees B and A: their gradients come from G = dL/dW by
the chain rule before the step, and W is written from them after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdtrain.adaptive.precision import full_precision
from svdtrain.spectral.decompose import Decomposition

_ROUNDING = 1e-5  # relative; what one order of summation or another makes of W_p + B A in float32, and some more


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of one factored matrix, in parameters."""

    matrix: int
    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """Everything stored for the matrix in low-rank mode besides W itself."""
        return self.trainable + self.frozen


class FactoredWeight:
    """W [m, n] (the model's own parameter), W_p [m, n] frozen, B [m, r] and A [r, n] trained.

    W_p is kept in float32 at least: with bf16 weights a W_p in bf16 could not hold W - B A, and the first merge would
    move W.
    """

    def __init__(self, W: nn.Parameter, B: Tensor, A: Tensor) -> None:
        """B and A are rounded to W's dtype first; W_p = W - B A is formed from what is stored. W is not written."""
        self.W = W
        self.B = nn.Parameter(B.to(W.dtype))
        self.A = nn.Parameter(A.to(W.dtype))
        self.W_p = self._remainder()
        self._version: int | None = W._version
        self.checksum: Tensor | None = None

    @classmethod
    def split(cls, W: nn.Parameter, decomposition: Decomposition, r: int, protect: str = "minor") -> FactoredWeight:
        """Train r singular directions of W: B = U_m sqrt(S_m), A = sqrt(S_m) V_m^T (MiLoRA, arXiv:2406.09044, eq. 4).

        `protect` says which: see `trained_columns`. Raises ValueError unless 1 <= r < min(m, n).
        """
        return cls(W, *singular_factors(decomposition, r, protect))

    @classmethod
    def restored(cls, W: nn.Parameter, W_p: Tensor, B: Tensor, A: Tensor) -> FactoredWeight:
        """From saved tensors, bit for bit; W may still hold other values."""
        factors = cls.__new__(cls)
        factors.W = W
        factors.W_p, B, A = (saved.to(W.device, copy=True).contiguous() for saved in (W_p, B, A))
        factors.B, factors.A = nn.Parameter(B), nn.Parameter(A)
        factors._version = factors.checksum = None
        return factors

    @property
    def r(self) -> int:
        """Number of trained directions."""
        return self.B.shape[1]

    def refactor(self, decomposition: Decomposition, r: int, protect: str = "minor") -> None:
        """Recompute W_p, B and A from the current W. The parameter objects stay, so the optimizer keeps them; their
        data tensors are replaced, not overwritten. W is not written."""
        B, A = singular_factors(decomposition, r, protect)
        self.B.grad = self.A.grad = None
        self.B.data, self.A.data = B.to(self.W.dtype), A.to(self.W.dtype)
        self.W_p = self._remainder()
        self.mark_merged()

    def project_gradient(self) -> None:
        """B.grad = G A^T, A.grad = B^T G: the exact chain rule of W = W_p + B A. None where W has no gradient."""
        G = self.W.grad
        if G is None:
            self.B.grad = self.A.grad = None
            return
        with full_precision(self.W.device):
            self.B.grad = G @ self.A.T
            self.A.grad = self.B.T @ G

    def merge(self) -> None:
        """W <- W_p + B A, in place."""
        with full_precision(self.W.device):
            if self.W_p.dtype == self.W.dtype:
                torch.addmm(self.W_p, self.B, self.A, out=self.W)
            else:
                self.W.copy_(self.dense())
        self.mark_merged()

    def mark_merged(self) -> None:
        """W holds what it should; whoever writes it from now on is somebody else."""
        self._version, self.checksum = self.W._version, None

    @property
    def counted_a_write(self) -> bool:
        """Whether PyTorch has counted a write to W since it was merged. It counts none that goes through `.data`."""
        return self._version != self.W._version

    def take_up_foreign_write(self) -> float:
        """Keep what somebody else has written to W since it was merged (a checkpoint loaded, a constraint), which the
        next merge would undo: W_p = W - B A. Relative size of the change; 0 where there was none beyond rounding."""
        dense, known = self.dense(), self._version is not None
        self.mark_merged()
        W = self.W.detach().to(dense.dtype)
        scale = float(torch.maximum(torch.linalg.vector_norm(W), torch.linalg.vector_norm(dense)))
        change = float(torch.linalg.vector_norm(W - dense)) / scale if scale > 0 else 0.0
        beyond_rounding = change > max(_ROUNDING, torch.finfo(self.W.dtype).eps)
        # A restored matrix is compared once: rounding is not taken up there, so that a resume stays exact.
        if beyond_rounding or (known and self.W.dtype == dense.dtype):
            self.W_p = self._remainder()
        return change if beyond_rounding else 0.0

    def dense(self) -> Tensor:
        """W_p + B A [m, n] in W_p's dtype."""
        with full_precision(self.W.device):
            return torch.addmm(self.W_p, self.B.to(self.W_p.dtype), self.A.to(self.W_p.dtype))

    def clear_gradients(self) -> None:
        """Drop B.grad and A.grad."""
        self.B.grad = self.A.grad = None

    @property
    def nbytes(self) -> int:
        """Bytes held beside W."""
        return sum(t.numel() * t.element_size() for t in (self.W_p, self.B, self.A))

    def split_error(self) -> float:
        """||W - (W_p + B A)||_F / ||W||_F; 0 for W = 0."""
        W = self.W.detach().to(self.W_p.dtype)
        scale = float(torch.linalg.vector_norm(W))
        return float(torch.linalg.vector_norm(W - self.dense())) / scale if scale > 0 else 0.0

    def counts(self) -> ParameterCounts:
        """Parameters of the matrix: itself, trainable (B and A), frozen (W_p)."""
        trainable = self.B.numel() + self.A.numel()
        return ParameterCounts(matrix=self.W.numel(), trainable=trainable, frozen=self.W_p.numel())

    def _remainder(self) -> Tensor:
        wide = torch.promote_types(self.W.dtype, torch.float32)
        with full_precision(self.W.device):
            return torch.addmm(self.W.to(wide), self.B.to(wide), self.A.to(wide), alpha=-1)


def singular_factors(decomposition: Decomposition, r: int, protect: str) -> tuple[Tensor, Tensor]:
    """B [m, r] and A [r, n] of r singular directions, each carrying the square root of the values. Both lie row by row
    in memory, like their gradients: operations over lists of tensors are single launches only where all lie alike."""
    g = decomposition.S.numel()
    if not 1 <= r < g:
        raise ValueError(f"r must lie in [1, {g - 1}] for this matrix, got {r}")
    columns = trained_columns(protect, g, r)
    if isinstance(columns, Tensor):
        columns = columns.to(decomposition.S.device)
    root = decomposition.S[columns].clamp_min(0).sqrt()
    B, A = (side[:, columns] * root for side in (decomposition.U, decomposition.V))
    return B.contiguous(), A.T.contiguous()


def trained_columns(protect: str, g: int, r: int) -> slice | Tensor:
    """Which r of g singular directions are trained, as ascending indices (0 is the largest value): a slice, which needs
    no copy to the device, where they lie side by side.

    minor: the last r (MiLoRA). principal: the first r (PiSSA, arXiv:2404.02948). middle: r around the centre. random: a
    fixed draw, the same at every call and nested in r (the control).
    """
    if protect == "random":
        generator = torch.Generator().manual_seed(g)
        return torch.randperm(g, generator=generator, device="cpu")[:r].sort().values
    first = {"minor": g - r, "principal": 0, "middle": (g - r) // 2}
    if protect not in first:
        raise ValueError(f"protect={protect!r} does not name a set of singular directions: {[*first, 'random']}")
    return slice(first[protect], first[protect] + r)
