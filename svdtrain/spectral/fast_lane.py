"""The fast lane: one look at every gradient and every applied update of a bucket, in few kernels and few bytes.

On a GPU the stack is rounded to bfloat16 once, when it is built, and everything after runs on tensor cores with
float32 accumulation. Rounding entries at random moves an energy by 2^-18 of itself and a participation ratio, which
enters z through a square root only, by less than a per cent; both are tested. On the CPU it stays in float32.

Bytes of one look at b matrices of m x n float32 on a GPU, per entry: 10 for the update (weight and reference read, 2
written) or 6 for the gradient, then 2 to read for each of: largest entry, norm, U^T X, X V, Gram; 4 to rescale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svdtrain.spectral.lanes import FAST_COLUMNS, fast_statistics, in_range, participation_of
from svdtrain.spectral.store import Bucket

_UPDATE, _GRADIENT = 1, 0  # rows of Bucket.participation
_PARTICIPATION_EVERY_ON_CPU = 32


class FastLane:
    """Buffers and settings of the fast lane; one instance serves every bucket of a tracker."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype | None, participation_every: int | None, right_side: bool | None
    ) -> None:
        """None: what suits the device. See `TrackerSettings` for the meaning."""
        on_gpu = device.type == "cuda"
        self._dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
        self._every = participation_every or (1 if on_gpu else _PARTICIPATION_EVERY_ON_CPU)
        self._gradient_right_side = on_gpu if right_side is None else right_side
        self._scratch: dict[tuple[int, ...], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that are kept between steps."""
        return sum(buffer.nbytes for buffer in self._scratch.values())

    def observe(
        self,
        bucket: Bucket,
        rows: slice,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        updates: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """FAST_COLUMNS of the update, then of the gradient if there are any, for some rows: float32 [rows, 6 or 12]."""
        X = self._stack(bucket, rows, weights if updates is None else updates, minus_reference=updates is None)
        tables = [self._look(bucket, rows, _UPDATE, X)]
        if gradients is not None:
            tables.append(
                self._look(bucket, rows, _GRADIENT, self._stack(bucket, rows, gradients, minus_reference=False))
            )
        return torch.cat(tables, dim=-1)

    def _stack(self, bucket: Bucket, rows: slice, tensors: Mapping[str, Tensor], *, minus_reference: bool) -> Tensor:
        """The named tensors (minus their references) [b, m, n], valid until the next call; zeros for a missing one.

        In a buffer that is kept: fresh megabytes cost more in page faults than the copy itself.
        """
        names, reference = bucket.names[rows], bucket.reference[rows]
        shape = tuple(reference.shape[1:])
        if shape not in self._scratch or self._scratch[shape].shape[0] < len(names):
            self._scratch[shape] = torch.empty(reference.shape, dtype=self._dtype, device=reference.device)
        buffer = self._scratch[shape][: len(names)]
        present = [(i, tensors[name].detach()) for i, name in enumerate(names) if tensors.get(name) is not None]
        if len(present) < len(names):
            buffer.zero_()
        if len(present) == len(names) and not buffer.is_cuda and {t.dtype for _, t in present} == {self._dtype}:
            torch.stack([tensor for _, tensor in present], out=buffer)  # on the CPU few calls count for more than bytes
            if minus_reference:
                buffer.sub_(reference)
        elif minus_reference:
            for i, tensor in present:  # the difference is taken in the weights' type, then rounded
                torch.sub(tensor, reference[i], out=buffer[i])
        elif present:
            torch._foreach_copy_([buffer[i] for i, _ in present], [tensor for _, tensor in present])
        return buffer

    def _look(self, bucket: Bucket, rows: slice, which: int, X: Tensor) -> Tensor:
        X, unit, total = in_range(X)
        participation = self._participation(bucket, rows, which, X, total)
        U, E, V = bucket.principal(rows, self._dtype)
        right_side = which == _UPDATE or self._gradient_right_side
        table = fast_statistics(X, unit, total, U, E, V, participation, right_side=right_side)
        assert table.shape[-1] == len(FAST_COLUMNS)
        return table

    def _participation(self, bucket: Bucket, rows: slice, which: int, X: Tensor, total: Tensor) -> Tensor:
        """The participation ratios, renewed for the matrices whose turn it is: all of them at the first look."""
        cache, every = bucket.participation[which], self._every
        looks = bucket.looks[which]
        if rows.stop >= len(bucket.names):
            bucket.looks[which] += 1
        if every == 1 or looks == 0:
            cache[rows] = participation_of(X, total)
            return cache[rows]
        for i in range(rows.start, rows.stop):
            if (looks + i) % every == 0:
                j = i - rows.start
                cache[i : i + 1] = participation_of(X[j : j + 1], total[j : j + 1])
        return cache[rows]
