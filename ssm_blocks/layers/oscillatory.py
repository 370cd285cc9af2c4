"""004 and 018: damped oscillators coupled by a low-rank term, A = diag(lambda) - P Q^* with Q^* = (G + K) P^*.

lambda = -zeta w + i w sqrt(1 - zeta^2), w > 0, 0 < zeta < 1; G = X X^* >= 0 and K skew-Hermitian, so that A + A^* <= 0
and the bilinear map (dt = 1) is a contraction for every value of the parameters. With free P and Q, as first written,
169 of 200 random initialisations were unstable.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_blocks.layers.base import Call, Inputs
from ssm_blocks.layers.linear_state import LinearStateMixer, as_complex
from ssm_blocks.layers.modules import Generator, bounded_exp, complex_of, fill_normal
from ssm_blocks.layers.poles import fill_dampings, fill_log_angles
from ssm_blocks.mixer import register
from ssm_blocks.ops.discretize import bilinear
from ssm_blocks.ops.inverse import woodbury_solve
from ssm_blocks.ops.lti import lti_states
from ssm_blocks.ops.orthogonal import skew
from ssm_blocks.ops.reference import scan_reference

LARGEST_COUPLING = 1000.0


@register("oscillatory_dplr")
class OscillatoryDPLR(LinearStateMixer):
    """state_size: complex n per head; rank: r of the coupling, 0 for none. Options as in `LinearStateMixer`."""

    is_complex, normed = True, False
    default_rank = 2
    adamw_names = frozenset({"skip", "log_frequency", "damping", "first_state"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        state_size: int = 32,
        rank: int | None = None,
        conv_size: int = 4,
        learned_state: bool = False,
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
        rank = min(self.default_rank, state_size) if rank is None else rank
        if not 0 <= rank <= state_size:
            raise ValueError(f"rank is within 0..state_size = {state_size}, got {rank}")
        heads = self.num_heads
        self.log_frequency = nn.Parameter(torch.empty(heads, state_size))
        self.damping = nn.Parameter(torch.empty(heads, state_size))
        self.P: nn.Parameter | None = None
        self.X: nn.Parameter | None = None
        self.K: nn.Parameter | None = None
        if rank:
            self.P = nn.Parameter(torch.empty(heads, state_size, rank, 2))
            self.X, self.K = (nn.Parameter(torch.empty(heads, rank, rank, 2)) for _ in range(2))
        self.init_weights()

    @property
    def rank(self) -> int:
        """Rank of the coupling."""
        return 0 if self.P is None else self.P.size(2)

    def init_weights(self, generator: Generator = None) -> None:
        """Frequencies and damping as in `poles`, a coupling of norm about .1."""
        super().init_weights(generator)
        fill_log_angles(self.log_frequency, generator)
        fill_dampings(self.damping, generator)
        for parameter, std in ((self.P, self.state_size**-0.5), (self.X, 0.3), (self.K, 0.3)):
            if parameter is not None:
                fill_normal(parameter, std, generator)

    # the system ----------------------------------------------------------------------------------------------------

    def poles(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """lambda [H, n], real parts negative."""
        w, zeta = bounded_exp(self.log_frequency.to(dtype)), torch.sigmoid(self.damping.to(dtype))
        return torch.complex(-zeta * w, w * ((1 - zeta) * (1 + zeta)).sqrt())

    def low_rank(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(P, Q) [H, n, r] with A = diag(lambda) - P Q^*."""
        if self.P is None or self.X is None or self.K is None:
            none = torch.zeros(self.num_heads, self.state_size, 0, dtype=complex_of(dtype), device=self.C.device)
            return none, none
        P, X, K = (as_complex(parameter, dtype) for parameter in (self.P, self.X, self.K))
        return P, P @ _bounded(X @ X.mH + skew(K), P).mH

    def input_map(self, dtype: torch.dtype) -> Tensor:
        """B [H, n, p], rows scaled by sqrt(2 |Re lambda|), which gives every mode the same energy."""
        return (-2 * self.poles(dtype).real).sqrt().unsqueeze(-1) * as_complex(self.B, dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """A [H, n, n] of the continuous system."""
        P, Q = self.low_rank(dtype)
        return torch.diag_embed(self.poles(dtype)) - P @ Q.mH

    def discrete(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(Ad [H, n, n], Bd [H, n, p]) of the bilinear map, the inverse by Woodbury.

        Ad = 2 (I - A/2)^{-1} - I: unlike (I - A/2)^{-1} (I + A/2), it cancels no large numbers.
        """
        B = self.input_map(dtype)
        identity = torch.eye(self.state_size, dtype=B.dtype, device=B.device).expand(self.num_heads, -1, -1)
        inverse, Bd = self._resolve(torch.cat([identity, B], -1), dtype).split([self.state_size, self.head_dim], -1)
        return 2 * inverse - identity, Bd

    def _resolve(self, X: Tensor, dtype: torch.dtype) -> Tensor:
        """(I - A/2)^{-1} X for X [..., H, n, m]: a diagonal and an r x r system."""
        P, Q = self.low_rank(dtype)
        return woodbury_solve(1 - self.poles(dtype) / 2, P / 2, Q, X)

    # the three forms ------------------------------------------------------------------------------------------------

    def recurrence_flops_per_token(self) -> int:
        """Complex: three diagonal products, P and Q^* on a vector, an r x r solve whose factors are kept."""
        n, r = self.state_size, self.rank
        return 8 * self.num_heads * (3 * n + 2 * n * r + r * r)

    def _states(self, inputs: Inputs, h: Tensor, call: Call) -> Tensor:
        u, dtype = inputs["u"], inputs["u"].dtype
        if call.form == "step":
            return self._one_step(u[:, 0], h, dtype).unsqueeze(1)
        if call.form == "parallel":
            Ad, Bd = self.discrete(dtype)
            return lti_states(Ad, self._drive(u, Bd), h)
        Ad, Bd = bilinear(self.dense(dtype), self.input_map(dtype))
        return scan_reference(lambda _, h: (Ad @ h.unsqueeze(-1)).squeeze(-1), self._drive(u, Bd), h)

    def _one_step(self, u: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
        """Ad h + Bd u in O(n r), without a matrix [n, n]."""
        drive = self.input_map(dtype) @ u.to(h.dtype).unsqueeze(-1)
        return self._resolve(2 * h.unsqueeze(-1) + drive, dtype).squeeze(-1) - h


def _bounded(M: Tensor, P: Tensor) -> Tensor:
    """M [H, r, r], shortened where ||P M P^*||_F exceeds 1,000, for P [H, n, r].

    A first coupling has about 10, and at 1,000 the bilinear map has long turned what is coupled to -1. Far beyond it
    float32 cannot: norms reached 1.002, and the r x r system became singular.
    """
    tiny = torch.finfo(torch.float32).tiny
    p, m = (torch.linalg.matrix_norm(matrix, keepdim=True).clamp(min=tiny) for matrix in (P, M))
    P, unit = P / p, M / m  # products of the matrices themselves may overflow
    gram = P.mH @ P
    squared = (unit @ gram @ unit.mH @ gram).diagonal(dim1=-2, dim2=-1).sum(-1).real
    size = p.square() * m * squared.clamp(min=tiny).sqrt()[..., None, None]
    return M * (LARGEST_COUPLING / size.clamp(min=LARGEST_COUPLING))


@register("oscillatory_diagonal")
class OscillatoryDiagonal(OscillatoryDPLR):
    """The ablation: no coupling."""

    default_rank = 0


@register("adaptive_dplr")
class AdaptiveDPLR(OscillatoryDPLR):
    """Starts at rank r_max = 8; `adaptive_rank` scores trained layers, shares a budget of ranks, and truncates."""

    default_rank = 8
