"""Exact singular value decompositions, batched by shape, that never take training down with them.

The way taken for float32 and bfloat16 input is the float64 eigendecomposition of the smaller Gram matrix. Squaring in
float64 costs no accuracy that a float32 result could show: singular values carry an absolute error below 1e-8 s_1,
under float32's own rounding of s_1. On two CPU cores it takes as long as LAPACK's float32 gesdd for square matrices of
256 to 1024 and half as long for 4:1 shapes, with float64 inside; on an H200 it is about 5 times faster. Float64 input
goes to `torch.linalg.svd`, because there the squaring would show.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.pool import ThreadPool  # unlike an executor it works when the program has ended

import torch
from torch import Tensor

log = logging.getLogger(__name__)
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

_MAX_BATCH_ELEMENTS = 1 << 26  # float64 working copies stay under 512 MiB each
_STREAMS = 4
_NEARLY_ORTHONORMAL = 0.1  # largest entry of X^T X - I for which one Cholesky pass restores float64 orthonormality
_JITTER = 1e-9  # of the largest entry: far below float32 resolution, enough to move a failing iteration


class DecompositionFailed(RuntimeError):
    """No rung of the ladder gave a finite decomposition. The caller keeps its old basis and goes on training.

    `failures` maps the index in the input list to the reason; `results` holds what did succeed, None elsewhere.
    """

    def __init__(self, failures: dict[int, str], results: list[Decomposition | None]) -> None:
        self.failures = failures
        self.results = results
        super().__init__("; ".join(f"matrix {index}: {reason}" for index, reason in failures.items()))


@dataclass(frozen=True, eq=False)
class Decomposition:
    """W = U diag(S) V^T with g = min(m, n): U [..., m, g], S [..., g] descending, V [..., n, g] (columns)."""

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def g(self) -> int:
        """Number of singular values held."""
        return self.S.shape[-1]

    def principal(self, r: int) -> Decomposition:
        """View of the k = g - r leading (protected) directions."""
        return self._columns(0, self._cut(r))

    def minor(self, r: int) -> Decomposition:
        """View of the r trailing (trainable) directions."""
        return self._columns(self._cut(r), self.g)

    def rebuild(self) -> Tensor:
        """U diag(S) V^T, [..., m, n]."""
        return (self.U * self.S.unsqueeze(-2)) @ self.V.mT

    def _cut(self, r: int) -> int:
        if not 0 <= r <= self.g:
            raise ValueError(f"r counts minor directions and must lie in [0, {self.g}], got {r}")
        return self.g - r

    def _columns(self, start: int, stop: int) -> Decomposition:
        return Decomposition(self.U[..., start:stop], self.S[..., start:stop], self.V[..., start:stop])


def decompose(W: Tensor) -> Decomposition:
    """Exact decomposition of one matrix [m, n]; float32 for float32 and 16-bit input, float64 for float64.

    Deterministic signs: the largest component of every left vector is positive. Singular values are within 1e-7 s_1
    of float64 LAPACK. Raises DecompositionFailed (non-finite input, or every rung failed) and ValueError (not 2-D).
    """
    return decompose_many([W])[0]


def decompose_many(matrices: Sequence[Tensor]) -> list[Decomposition]:
    """Decompose a list of matrices, batched by shape, dtype and device; results in the order of the input.

    Raises DecompositionFailed after all of them were tried; its `results` holds those that succeeded.
    """
    results: list[Decomposition | None] = [None] * len(matrices)
    failures: dict[int, str] = {}
    for indices in _buckets(matrices):
        stack = torch.stack([matrices[i].detach() for i in indices])
        finite = torch.isfinite(stack).flatten(1).all(dim=1).tolist()
        failures.update({i: "not finite" for i, ok in zip(indices, finite, strict=True) if not ok})
        keep = [position for position, ok in enumerate(finite) if ok]
        if keep:
            stack = stack if len(keep) == len(indices) else stack[keep]
            _decompose_bucket(stack, [indices[position] for position in keep], results, failures)
    if failures:
        raise DecompositionFailed(failures, results)
    return [result for result in results if result is not None]


def decompose_batch(W: Tensor) -> Decomposition:
    """Exact decomposition of finite matrices [..., m, n], no ladder: torch.linalg.LinAlgError passes through."""
    if W.device.type == "mps":  # no float64 there
        result = decompose_batch(W.cpu())
        return Decomposition(result.U.to(W.device), result.S.to(W.device), result.V.to(W.device))
    exact = lapack_svd if W.dtype == torch.float64 else gram_svd
    result = _fix_signs(exact(W))
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    return Decomposition(result.U.to(dtype), result.S.to(dtype), result.V.to(dtype))


def gram_svd(W: Tensor) -> Decomposition:
    """SVD through the float64 eigendecomposition of the smaller Gram matrix; float64 result.

    W [..., m, n] -> U, S, V. The other side is W V (or W^T U) orthonormalised in descending order, which keeps it
    orthonormal for singular values down to zero. Signs are not fixed.
    """
    W = W.double()
    if W.shape[-2] < W.shape[-1]:
        flipped = gram_svd(W.mT)
        return Decomposition(flipped.V, flipped.S, flipped.U)
    V = _eigenvectors(W.mT @ W).flip(-1)
    X = W @ V
    S = torch.linalg.vector_norm(X, dim=-2)
    S, order = S.sort(dim=-1, descending=True, stable=True)  # rounding can swap values that are zero or equal
    V = torch.take_along_dim(V, order.unsqueeze(-2), dim=-1)
    X = torch.take_along_dim(X, order.unsqueeze(-2), dim=-1)
    # Divide by the smallest normal, not by zero: a zero column stays zero and is completed below.
    X = X / S.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-2)
    return Decomposition(_orthonormal_columns(X), S, V)


_loading = threading.Lock()


@lru_cache
def _load_library(device: torch.device) -> None:
    torch.linalg.eigh(torch.eye(2, device=device))


def load_library(device: torch.device) -> None:
    """The first call into a GPU's linear algebra loads a library, which must not happen in two threads at once."""
    with _loading:
        _load_library(device)


def _eigenvectors(H: Tensor) -> Tensor:
    """Of symmetric H [..., n, n], eigenvalues ascending. On a GPU a batch is shared by threads with a stream each: one
    problem of this size leaves most of the device idle, and the library takes them one after the other."""
    batch = H.shape[:-2].numel()
    if not H.is_cuda or batch < 2:
        return torch.linalg.eigh(H).eigenvectors
    load_library(H.device)
    here = torch.cuda.current_stream(H.device)

    def solve(part: Tensor) -> Tensor:
        stream = torch.cuda.Stream(H.device)
        stream.wait_stream(here)
        with torch.no_grad(), torch.cuda.stream(stream):
            vectors = torch.linalg.eigh(part).eigenvectors
        vectors.record_stream(here)
        here.wait_stream(stream)
        return vectors

    with ThreadPool(_STREAMS) as pool:
        parts = pool.map(solve, H.flatten(0, -3).chunk(_STREAMS))
    return torch.cat(parts).view_as(H)


def lapack_svd(W: Tensor) -> Decomposition:
    """`torch.linalg.svd` in float64, V as columns. Signs are not fixed."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return Decomposition(U, S, Vh.mT)


def _orthonormal_columns(X: Tensor) -> Tensor:
    """Orthonormalise unit columns in order: Cholesky where they nearly are orthonormal, Householder elsewhere."""
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    gram = X.mT @ X
    good = (gram - identity).abs().amax(dim=(-2, -1)) < _NEARLY_ORTHONORMAL
    safe_gram = torch.where(good[..., None, None], gram, identity)
    L, info = torch.linalg.cholesky_ex(safe_gram)
    good = good & (info == 0)
    Q = torch.linalg.solve_triangular(L.mT, X, upper=True, left=False)
    if bool(good.all()):
        return Q
    return torch.where(good[..., None, None], Q, _householder(X))


def _householder(X: Tensor) -> Tensor:
    """Q of X with Q_j . x_j >= 0; also completes zero columns to an orthonormal set."""
    Q, R = torch.linalg.qr(X)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)


def _fix_signs(result: Decomposition) -> Decomposition:
    largest = result.U.abs().argmax(dim=-2, keepdim=True)
    sign = torch.where(torch.take_along_dim(result.U, largest, dim=-2) < 0, -1.0, 1.0).to(result.U.dtype)
    return Decomposition(result.U * sign, result.S, result.V * sign)


def _buckets(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices of equal shape, dtype and device, cut so that a working copy fits in memory."""
    groups: dict[tuple, list[int]] = {}
    for index, W in enumerate(matrices):
        if W.dim() != 2 or W.numel() == 0:
            raise ValueError(f"matrix {index} must be 2-D and not empty, got shape {tuple(W.shape)}")
        groups.setdefault((tuple(W.shape), W.dtype, W.device), []).append(index)
    chunks: list[list[int]] = []
    for (shape, _, _), indices in groups.items():
        size = max(1, _MAX_BATCH_ELEMENTS // (shape[0] * shape[1]))
        chunks.extend(indices[start : start + size] for start in range(0, len(indices), size))
    return chunks


def _decompose_bucket(
    stack: Tensor, indices: list[int], results: list[Decomposition | None], failures: dict[int, str]
) -> None:
    """Fill `results` for one shape: all at once, and one by one down the ladder only if that failed."""
    try:
        batch = decompose_batch(stack)
        finite = torch.isfinite(batch.S).all(dim=-1).tolist()
    except LinAlgError:
        batch, finite = None, [False] * len(indices)
    for position, index in enumerate(indices):
        if batch is not None and finite[position]:
            # Clones, so that keeping one basis does not keep the whole batch in memory.
            parts = (batch.U[position], batch.S[position], batch.V[position])
            results[index] = (
                Decomposition(*(part.clone() for part in parts)) if len(indices) > 1 else Decomposition(*parts)
            )
            continue
        outcome = _ladder(stack[position])
        if isinstance(outcome, Decomposition):
            results[index] = outcome
        else:
            failures[index] = outcome


def _ladder(W: Tensor) -> Decomposition | str:
    """Jitter, then float64 LAPACK, then the CPU. Returns the reason when all of them fail."""
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    rungs: list[tuple[str, Callable[[], Decomposition]]] = [
        ("jitter", lambda: decompose_batch(_jittered(W))),
        ("float64 SVD", lambda: lapack_svd(W)),
        ("CPU", lambda: lapack_svd(W.cpu())),
    ]
    reasons = []
    for name, attempt in rungs:
        try:
            result = _fix_signs(attempt())
        except (LinAlgError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
            continue
        if bool(torch.isfinite(result.S).all()):
            log.warning("a decomposition of shape %s needed the fallback %r; its result is exact", tuple(W.shape), name)
            return Decomposition(*(part.to(W.device, dtype) for part in (result.U, result.S, result.V)))
        reasons.append(f"{name}: result not finite")
    return ", ".join(reasons)


def _jittered(W: Tensor) -> Tensor:
    """W plus a fixed pseudo-random matrix of relative size 1e-9, in float64."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(W.shape, generator=generator, dtype=torch.float64, device="cpu").to(W.device)
    return W.double() + _JITTER * W.double().abs().amax() * noise
