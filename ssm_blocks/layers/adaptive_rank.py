"""018: how much each layer's low-rank coupling matters, how a budget of ranks is shared, and truncation.

All of it works on a trained `OscillatoryDPLR` (A = Lambda - P Q^*, one sign convention) and costs r x r matrices.
With M(z) = Q^* (zI - Lambda)^{-1} P, det(zI - A) = det(zI - Lambda) det(I + M(z)). The points z are the images of the
unit circle under the bilinear map, z = 2i tan(theta / 2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssm_blocks.layers.oscillatory import OscillatoryDPLR
from ssm_blocks.ops.low_rank import hutchinson_trace, largest_remainder
from ssm_blocks.ops.orthogonal import skew

WORKING = torch.float64


class PowerSeries(NamedTuple):
    """Score of the 4-term series; it says nothing where the spectral radius of M reaches 1."""

    score: float
    spectral_radius: float

    @property
    def converges(self) -> bool:
        """Whether the series stands for the logarithm at all."""
        return self.spectral_radius < 1


def circle(num_points: int, device: torch.device | None = None) -> Tensor:
    """z = 2i tan(theta / 2) at num_points evenly spread theta, none of them pi."""
    theta = 2 * torch.pi * (torch.arange(num_points, dtype=WORKING, device=device) + 0.5) / num_points - torch.pi
    return torch.complex(torch.zeros_like(theta), 2 * torch.tan(theta / 2))


@torch.no_grad()
def coupling(mixer: OscillatoryDPLR, num_points: int = 64) -> Tensor:
    """M(z) at all points of the circle: [H, num_points, r, r]."""
    P, Q, resolvent = _system(mixer, num_points)
    return torch.einsum("hnr,hzn,hns->hzrs", Q.conj(), resolvent, P)


def _check_kind(mixer: OscillatoryDPLR) -> None:
    if not isinstance(mixer, OscillatoryDPLR):
        raise ValueError(f"ranks are those of adaptive_dplr and oscillatory_dplr, got a {type(mixer).__name__}")


def _check_coupled(mixer: OscillatoryDPLR) -> None:
    _check_kind(mixer)
    if mixer.rank == 0:
        raise ValueError("this layer has no coupling (rank 0), so there is nothing to truncate")


def _system(mixer: OscillatoryDPLR, num_points: int) -> tuple[Tensor, Tensor, Tensor]:
    """P, Q [H, n, r] and 1 / (z - lambda) [H, num_points, n]."""
    _check_kind(mixer)
    P, Q = mixer.low_rank(WORKING)
    poles = mixer.poles(WORKING)
    return P, Q, 1 / (circle(num_points, poles.device)[:, None] - poles.unsqueeze(1))


@torch.no_grad()
def logdet_score(mixer: OscillatoryDPLR, num_points: int = 64) -> float:
    """Mean over heads and points of |log |det(I + M)||, exactly. Blind to nilpotent coupling, where det(I + M) = 1."""
    M = coupling(mixer, num_points)
    identity = torch.eye(M.size(-1), dtype=M.dtype, device=M.device)
    return torch.linalg.slogdet(identity + M).logabsdet.abs().mean().item()


@torch.no_grad()
def power_series_score(mixer: OscillatoryDPLR, num_points: int = 64) -> PowerSeries:
    """The same by tr M - tr M^2 / 2 + tr M^3 / 3 - tr M^4 / 4, with the radius that tells whether it converges."""
    M = coupling(mixer, num_points)
    power, series = torch.eye(M.size(-1), dtype=M.dtype, device=M.device), torch.zeros((), dtype=M.dtype)
    for order in range(1, 5):
        power = power @ M
        series = series - (-1) ** order * power.diagonal(dim1=-2, dim2=-1).sum(-1) / order
    radius = torch.linalg.eigvals(M).abs().amax().item() if M.size(-1) else 0.0
    return PowerSeries(series.real.abs().mean().item(), radius)


@torch.no_grad()
def frobenius_score(mixer: OscillatoryDPLR, num_points: int = 64) -> float:
    """Root mean square over heads and points of ||(zI - Lambda)^{-1} P Q^*||_F, through r x r Gram matrices."""
    P, Q, resolvent = _system(mixer, num_points)
    moved = resolvent.unsqueeze(-1) * P.unsqueeze(1)
    left, right = moved.mH @ moved, (Q.mH @ Q).unsqueeze(1)
    squared = (left * right.mT).sum((-2, -1)).real  # tr(left right)
    return squared.mean().sqrt().item()


@torch.no_grad()
def hutchinson_traces(
    mixer: OscillatoryDPLR, num_probes: int, generator: torch.Generator, num_points: int = 8
) -> Tensor:
    """Unbiased samples of tr M(z), [H, num_points, num_probes]: a check on the exact traces, from n x n products."""
    P, Q, resolvent = _system(mixer, num_points)
    n = P.size(1)

    def sample(head: int, point: int) -> Tensor:
        def apply(x: Tensor) -> Tensor:
            return resolvent[head, point, :, None] * (P[head] @ (Q[head].mH @ x))

        return hutchinson_trace(apply, n, num_probes, generator, P.dtype)

    heads = [torch.stack([sample(head, point) for point in range(num_points)]) for head in range(P.size(0))]
    return torch.stack(heads)


def allocate_ranks(scores: list[float], budget: int, r_max: int, r_min: int = 1) -> list[int]:
    """Ranks in proportion to the scores, r_min..r_max each, whose sum is the budget exactly.

    Raises ValueError when the budget cannot be met.
    """
    return largest_remainder(scores, budget, r_min, r_max)


@torch.no_grad()
def truncate_layer(mixer: OscillatoryDPLR, rank: int) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Cut the coupling down to `rank`, in place; returns {name: (old, new)} of the parameters that were replaced.

    P Q^* is compressed on the directions that carry most of it, W W^* P Q^* W W^*, so G stays positive semidefinite
    and the layer stable. The closest matrix of that rank, `ops.low_rank.truncate`, need not be. At the full rank
    nothing changes but the basis. Raises ValueError unless 1 <= rank <= the layer's rank.
    """
    _check_coupled(mixer)
    if not isinstance(rank, int) or not 1 <= rank <= mixer.rank:
        raise ValueError(f"the rank after truncation must be within 1..{mixer.rank}, got {rank}")
    P, Q = mixer.low_rank(WORKING)
    basis, R = torch.linalg.qr(P)
    N = R @ (Q.mH @ basis)  # P Q^* seen in the basis
    directions = torch.linalg.eigh(N @ N.mH + N.mH @ N).eigenvectors[..., -rank:]
    small = directions.mH @ N @ directions
    values, vectors = torch.linalg.eigh((small + small.mH) / 2)
    new = {"P": basis @ directions, "X": vectors * values.clamp(min=0).sqrt().unsqueeze(-2), "K": skew(small)}
    replaced = {}
    for name, value in new.items():
        old = getattr(mixer, name)
        parameter = nn.Parameter(torch.view_as_real(value.resolve_conj().contiguous()).to(old.dtype))
        replaced[name] = (old, parameter)
        setattr(mixer, name, parameter)
    return replaced


def reset_optimizer_state(
    optimizer: torch.optim.Optimizer, replaced: dict[str, tuple[nn.Parameter, nn.Parameter]]
) -> None:
    """Hand the new parameters to the optimizer in place of the old; every other parameter's state stays as it is."""
    new_of = {id(old): new for old, new in replaced.values()}
    for group in optimizer.param_groups:
        group["params"] = [new_of.get(id(parameter), parameter) for parameter in group["params"]]
    for old, _ in replaced.values():
        optimizer.state.pop(old, None)
