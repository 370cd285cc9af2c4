"""What a layer's inputs look like on reference text: their second moment, its subspaces, and projections on them.

C = E[x x^T] is collected with forward pre-hooks on the *uncompiled* modules during a forward without gradients, so a
compiled graph is never touched:

    with collect_input_covariances({"h.0.attn.c_q": model.h[0].attn.c_q}) as collector, torch.no_grad():
        model(reference_batch)
    covariances = collector.result()

Protecting what was learned means keeping updates out of the leading eigenvectors of C.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class InputCovariance:
    """C = E[x x^T] (not centred), float32 [n, n], over `num_rows` input vectors."""

    C: Tensor
    num_rows: int


class CovarianceCollector:
    """Running sums of x^T x per layer. Made by `collect_input_covariances`."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self._sums = {name: _zeros(name, layer) for name, layer in layers.items()}
        self._rows = dict.fromkeys(layers, 0)
        self._last: tuple[Tensor, Tensor] | None = None

    def hook(self, layer: nn.Module, arguments: tuple) -> None:
        """Forward pre-hook: add this input. Input vectors are the last dimension."""
        name, x = self._names[layer], arguments[0]
        total = self._sums[name]
        if x.shape[-1] != total.shape[0]:
            raise ValueError(f"{name}: the input has {x.shape[-1]} features, the weight takes {total.shape[0]}")
        with torch.no_grad():
            total += self._product(x)
        self._rows[name] += x.numel() // x.shape[-1]

    def _product(self, x: Tensor) -> Tensor:
        """x^T x in float32. Query, key and value projections share one input: multiply once."""
        if self._last is None or self._last[0] is not x:
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            self._last = (x, rows.mT @ rows)
        return self._last[1]

    def finish(self) -> None:
        """Forget the last input, which would keep an activation in memory."""
        self._last = None

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Add up over the ranks of `group`; every rank must have collected the same layers."""
        for name in sorted(self._sums):
            rows = torch.tensor(float(self._rows[name]), dtype=torch.float64, device=self._sums[name].device)
            torch.distributed.all_reduce(self._sums[name], group=group)
            torch.distributed.all_reduce(rows, group=group)
            self._rows[name] = int(rows)

    @property
    def unreached(self) -> list[str]:
        """Layers that saw no input: the forward used their weights without calling them, or did not run."""
        return [name for name, rows in self._rows.items() if rows == 0]

    def result(self, *, skip_unreached: bool = False) -> dict[str, InputCovariance]:
        """Covariances by name. Raises ValueError for non-finite input, and for a layer that saw none, unless those are
        to be left out."""
        unreached = self.unreached
        if unreached and not skip_unreached:
            raise ValueError(f"no input reached {unreached}: did the forward run inside the context, on these modules?")
        sums = {name: total for name, total in self._sums.items() if name not in unreached}
        broken = [name for name, total in sums.items() if not bool(torch.isfinite(total).all())]
        if broken:
            raise ValueError(f"the inputs of {broken} are not finite")
        return {name: InputCovariance(total / self._rows[name], self._rows[name]) for name, total in sums.items()}


@contextmanager
def collect_input_covariances(layers: Mapping[str, nn.Module]) -> Iterator[CovarianceCollector]:
    """Collect E[x x^T] of named layers (nn.Linear, or anything with a 2-D `weight` [out, in]) while inside.

    Run the forward on the plain modules, not on their compiled wrapper. Raises ValueError for a layer without a 2-D
    weight or given under two names.
    """
    if len(set(layers.values())) != len(layers):
        raise ValueError("one module is given under two names")
    collector = CovarianceCollector(layers)
    handles = [layer.register_forward_pre_hook(collector.hook) for layer in layers.values()]
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()
        collector.finish()


def _zeros(name: str, layer: nn.Module) -> Tensor:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"{name}: needs a module with a 2-D weight [out, in], got {type(layer).__name__}")
    if type(layer).__name__ == "Conv1D":  # of transformers' GPT-2: nothing else tells it apart where it is square
        raise ValueError(f"{name}: Conv1D keeps its weight as [in, out]; its inputs cannot be protected")
    return torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)


@dataclass(frozen=True, eq=False)
class InputBasis:
    """Eigenvectors Q [..., n, n] (columns) of C with their eigenvalues [..., n], descending and not negative."""

    Q: Tensor
    eigenvalues: Tensor

    def top(self, k: int) -> Tensor:
        """The k leading eigenvectors, [..., n, k]."""
        n = self.Q.shape[-1]
        if not 0 <= k <= n:
            raise ValueError(f"the number of protected directions must lie in [0, {n}], got {k}")
        return self.Q[..., :k]

    def count_for_energy(self, share: float) -> int:
        """Smallest number of eigenvectors that hold `share` (0..1] of the trace (of one matrix)."""
        if not 0 < share <= 1:
            raise ValueError(f"the share of energy must lie in (0, 1], got {share}")
        cumulative = self.eigenvalues.cumsum(-1)
        if float(cumulative[-1]) == 0:
            return 0
        return int((cumulative < share * cumulative[-1] * (1 - 1e-12)).sum()) + 1


def input_basis(C: Tensor) -> InputBasis:
    """Eigendecomposition of C [..., n, n] in float64 (on the CPU for MPS); float32 eigenvectors, float64 values."""
    work = C.cpu() if C.device.type == "mps" else C
    values, vectors = torch.linalg.eigh(work.double())
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    dtype = torch.float64 if C.dtype == torch.float64 else torch.float32
    return InputBasis(vectors.to(C.device, dtype), values if work is not C else values.to(C.device))


def remove_inputs(X: Tensor, P: Tensor) -> Tensor:
    """X (I - P P^T): what of X [..., m, n] does not act on span(P [..., n, k]). The hard projection."""
    P = P.to(X.dtype)
    return X - (X @ P) @ P.mT


def shrink_matrix(C: Tensor, strength: float) -> Tensor:
    """(I + strength C / mean lambda)^-1 = Q diag(1 / (1 + strength lambda / mean lambda)) Q^T, [..., n, n].

    Right-multiply an update with it: the soft projection. By Cholesky, so it needs no eigenvectors; float64 inside.
    Identity for C = 0. Raises ValueError for a negative strength.
    """
    if strength < 0:
        raise ValueError(f"the strength of the soft projection must not be negative, got {strength}")
    work = C.double()
    mean = work.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(C.shape[-1], dtype=work.dtype, device=C.device)
    relative = work / torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.cholesky_inverse(torch.linalg.cholesky(identity + strength * relative)).to(C.dtype)


def soft_projection(basis: InputBasis, strength: float) -> Tensor:
    """The same matrix from eigenvectors that are there already, [..., n, n]."""
    mean = basis.eigenvalues.mean(-1, keepdim=True)
    relative = basis.eigenvalues / torch.where(mean > 0, mean, torch.ones_like(mean))
    factors = (1 / (1 + strength * relative)).to(basis.Q.dtype)
    return (basis.Q * factors.unsqueeze(-2)) @ basis.Q.mT


def outside_share(C: Tensor, P: Tensor) -> Tensor:
    """Share of the input energy outside span(P): 1 - tr(P^T C P) / tr C, [...]; 0 for C = 0."""
    total = C.diagonal(dim1=-2, dim2=-1).sum(-1)
    inside = (P * (C.to(P.dtype) @ P)).sum((-2, -1))
    positive = total > 0
    share = 1 - inside / torch.where(positive, total, torch.ones_like(total))
    return torch.where(positive, share.clamp(0, 1), torch.zeros_like(share))
