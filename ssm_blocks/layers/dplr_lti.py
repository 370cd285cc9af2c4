"""003, time-invariant: per channel h_t = A h_{t-1} + B u_t, y_t = C h_t + D u_t with A = P L + p q^T shared by a head.

P is a fixed permutation, L a positive diagonal. P L is diagonalised through its cycles, p q^T comes in by Woodbury, and
the kernel C A^t B is the inverse FFT of its generating function at the roots of unity (S4, arXiv:2111.00396). Diagonal
entries below .999 (1 - s), |p| = s and |q| = 1 make ||A|| < 1. `dplr_plain` has no permutation. `dplr_similarity`
conjugates by one, P (L + p q^T) P^T: the same kernels as `dplr_plain`, so no gain; the ablation that must tie.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_blocks.layers.base import Call, Inputs, RecurrentMixer
from ssm_blocks.layers.modules import Generator, Linear, fill_normal, split_heads, squash, wide
from ssm_blocks.layers.poles import fill_radii
from ssm_blocks.mixer import State, register
from ssm_blocks.ops.cycles import Cycles, diagonalise, find_cycles
from ssm_blocks.ops.discretize import cauchy_matrix
from ssm_blocks.ops.lti import causal_convolution, krylov, matrix_power, power_apply
from ssm_blocks.ops.reference import scan_reference


@register("dplr_plain")
class PlainDPLR(RecurrentMixer):
    """A = L + p q^T. num_heads: default one per 64 channels; state_size: n per channel."""

    permuted = relabelled = False
    adamw_names = frozenset({"decay", "p", "q", "skip"})
    index: Tensor
    relabel: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        state_size: int = 16,
        conv_size: int = 4,
        backend: str = "auto",
    ) -> None:
        heads, width = split_heads(dim, num_heads)
        if state_size < 1:
            raise ValueError(f"state_size is at least 1 per channel, got {state_size}")
        super().__init__(dim, features=dim, read_heads=(heads, width), conv_size=conv_size, backend=backend)
        self.norm = nn.Identity()
        self.num_heads, self.head_dim, self.state_size = heads, width, state_size
        self.v_proj = Linear(dim, dim)
        self.decay, self.p, self.q = (nn.Parameter(torch.empty(heads, state_size)) for _ in range(3))
        self.strength = nn.Parameter(torch.empty(heads))
        self.B, self.C = (nn.Parameter(torch.empty(heads, width, state_size)) for _ in range(2))
        self.skip = nn.Parameter(torch.empty(heads, width))
        empty = torch.empty(heads, state_size, dtype=torch.long)
        for name in ("index", "relabel", "order", "place", "length"):
            self.register_buffer(name, empty.clone())
        self.init_weights()

    def init_weights(self, generator: Generator = None) -> None:
        super().init_weights(generator)
        fill_radii(self.decay, generator)
        fill_normal(self.p, 1.0, generator)
        fill_normal(self.q, 1.0, generator)
        nn.init.constant_(self.strength, -3.0)
        fill_normal(self.B, 1.0, generator)
        fill_normal(self.C, self.state_size**-0.5, generator)
        nn.init.ones_(self.skip)
        self.set_permutations(*(self._permutation(drawn, generator) for drawn in (self.permuted, self.relabelled)))

    def _permutation(self, drawn: bool, generator: Generator) -> Tensor:
        if not drawn or self.index.is_meta:
            return torch.arange(self.state_size, device=self.index.device).expand_as(self.index)
        noise = torch.empty(self.index.shape, device=self.index.device)
        return noise.uniform_(generator=generator).argsort(-1)

    def set_permutations(self, index: Tensor, relabel: Tensor) -> None:
        """P of P L, and the permutation that conjugates A; both int [H, n]."""
        self.index.copy_(index)
        self.relabel.copy_(relabel)
        if self.index.is_meta:
            return
        for name, value in find_cycles(self.index)._asdict().items():
            getattr(self, name).copy_(value)

    # the system ----------------------------------------------------------------------------------------------------

    def coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(l, p, q) [H, n] of A = P L + p q^T, with max l + |p| |q| < 1."""
        s = squash(self.strength.to(dtype), 1e-4, 0.5).unsqueeze(-1)
        l = (1 - s) * squash(self.decay.to(dtype), 0.01, 0.999)  # bounded below: cycles are scaled by ratios of these
        p, q = s * F.normalize(self.p.to(dtype), dim=-1), F.normalize(self.q.to(dtype), dim=-1)
        return tuple(x.gather(-1, self.relabel) for x in (l, p, q))  # type: ignore[return-value]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """A [H, n, n]."""
        l, p, q = self.coefficients(dtype)
        eye = torch.eye(self.state_size, dtype=dtype, device=l.device)
        return eye[self.index] * l.unsqueeze(-2) + p.unsqueeze(-1) * q.unsqueeze(-2)

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """C A^t B for t < length, [H, p, length]: Cauchy sums over the eigenvalues, Woodbury for p q^T, inverse FFT."""
        l, p, q = self.coefficients(dtype)
        cycles = Cycles(self.order, self.place, self.length)  # type: ignore[arg-type]
        eigenvalues, V, inverse = diagonalise(l, cycles)
        A, B, C = self.dense(dtype), self.B.to(dtype), self.C.to(dtype)
        C = C - C @ matrix_power(A, length)  # z^length = 1: the series cut off after `length` terms
        angle = -2 * math.pi * torch.arange(length, device=l.device, dtype=dtype) / length
        inverse_z = torch.polar(torch.ones_like(angle), -angle)
        resolvent = inverse_z.unsqueeze(-1) * cauchy_matrix(eigenvalues, inverse_z)  # 1 / (1 - z lambda)
        left, right = C.to(V.dtype) @ V, B.to(V.dtype) @ inverse.mT
        q_left, p_right = (q.to(V.dtype).unsqueeze(-2) @ V), (p.to(V.dtype).unsqueeze(-2) @ inverse.mT)
        CB, Cp, qB, qp = (
            (x * y) @ resolvent.mT for x, y in ((left, right), (left, p_right), (q_left, right), (q_left, p_right))
        )
        values = CB + Cp * qB / (inverse_z - qp)
        return torch.fft.ifft(values, dim=-1).real

    # the three forms ------------------------------------------------------------------------------------------------

    def _first_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        shape = (batch, self.num_heads, self.head_dim, self.state_size)
        return {"h": torch.zeros(shape, dtype=dtype, device=device)}

    def map_flops_per_token(self) -> int:
        """See `RecurrentMixer`; B u, C h and the skip are 2 per weight."""
        return super().map_flops_per_token() + 2 * (self.B.numel() + self.C.numel() + self.skip.numel())

    def recurrence_flops_per_token(self) -> int:
        """Per state of a channel: l h, and p (q^T h)."""
        return 5 * self.num_heads * self.head_dim * self.state_size

    def _features(self, x: Tensor) -> Tensor:
        return self.v_proj(x)

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        return {"u": features.to(wide(x.dtype)).unflatten(-1, (self.num_heads, self.head_dim))}

    def _recur(self, inputs: Inputs, state: State, call: Call) -> tuple[Tensor, State]:
        u, h = inputs["u"], state["h"]
        B, C, skip = (x.to(u.dtype) for x in (self.B, self.C, self.skip))
        if call.form == "parallel":
            return self._convolved(u, h, call) + skip * u, {"h": self._last(u, h, call) if call.keeps_state else h}
        if call.form == "step":
            states = (self._move(h) + B * u[:, 0].unsqueeze(-1)).unsqueeze(1)
        else:
            A = self.dense(u.dtype)
            states = scan_reference(lambda _, h: h @ A.mT, B * u.unsqueeze(-1), h)
        return (C * states).sum(-1) + skip * u, {"h": call.last(states)}

    def _move(self, h: Tensor) -> Tensor:
        """A h in O(n): a gather and one dot product."""
        l, p, q = (x.unsqueeze(1) for x in self.coefficients(h.dtype))
        index = self.index.unsqueeze(1).expand_as(h)
        return (l * h).gather(-1, index) + p * (q * h).sum(-1, keepdim=True)

    def _convolved(self, u: Tensor, h: Tensor, call: Call) -> Tensor:
        length = u.size(1)
        y = causal_convolution(self.kernel(length, u.dtype).movedim(-1, 0), u)
        if call.fresh:
            return y
        A = self.dense(u.dtype)
        rows = krylov(A.mT.unsqueeze(1), self.C.to(u.dtype) @ A, length)  # C A^{t+1}
        return y + torch.einsum("hptn,bhpn->bthp", rows, h)

    def _last(self, u: Tensor, h: Tensor, call: Call) -> Tensor:
        """A^T h + sum_j A^j B u_{T-1-j}, with each sequence's own T."""
        A = self.dense(u.dtype)
        lengths = call.lengths
        if lengths is None:
            lengths = torch.full((u.size(0),), u.size(1), device=u.device)
        place = lengths.unsqueeze(1) - 1 - torch.arange(u.size(1), device=u.device)
        backwards = u.gather(1, place.clamp(min=0)[..., None, None].expand_as(u)) * (place >= 0)[..., None, None]
        columns = krylov(A.unsqueeze(1), self.B.to(u.dtype), u.size(1))
        return power_apply(A, h, lengths) + torch.einsum("hptn,bthp->bhpn", columns, backwards)


@register("dplr_lti")
class CyclicDPLR(PlainDPLR):
    """A = P L + p q^T with a random permutation P per head."""

    permuted = True


@register("dplr_similarity")
class SimilarDPLR(PlainDPLR):
    """A = P (L + p q^T) P^T: the tie."""

    relabelled = True
