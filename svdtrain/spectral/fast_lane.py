"""The fast lane: one look at every gradient and every applied update of a bucket, in few kernels and few bytes.

On a GPU the stack is rounded to bfloat16 once, when it is built, and everything after runs on tensor cores with
float32 accumulation. Rounding entries at random moves an energy by 2^-18 of itself and a participation ratio, which
enters z through a square root only, by less than a per cent; both are tested. On the CPU it stays in float32.

A GPU copies the stacks at the step and looks at them beside the next one: some loops (nanochat's) wait for the device
at every step, and then what the host needs to launch a hundred kernels would be added to the step.

Bytes of one look at b matrices of m x n float32 on a GPU, per entry: 18 for the update (weight and reference read, the
difference written and read, 2 written) or 6 for the gradient, then 2 to read for each of: largest entry, norm, U^T X,
X V, Gram; 4 to rescale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from svdtrain.spectral.lanes import FAST_COLUMNS, fast_statistics, in_range, participation_of
from svdtrain.spectral.store import Bucket

_UPDATE, _GRADIENT = 1, 0  # rows of Bucket.participation
_PARTICIPATION_EVERY_ON_CPU = 32
_AT_ONCE = 16  # matrices whose difference from their references is in memory at once


class FastLane:
    """Buffers and settings of the fast lane; one instance serves every bucket of a tracker."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        participation_every: int | None,
        right_side: bool | None,
        *,
        beside: bool,
    ) -> None:
        """None: what suits the device. See `TrackerSettings` for the meaning. `beside`: a look is finished by another
        thread, while the caller's tensors change already."""
        on_gpu = device.type == "cuda"
        self._beside = beside
        self._dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
        self._every = participation_every or (1 if on_gpu else _PARTICIPATION_EVERY_ON_CPU)
        self._gradient_right_side = on_gpu if right_side is None else right_side
        self._scratch: dict[tuple[int, ...], Tensor] = {}
        self._in_flight = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that are kept between steps, or are filled at one and read beside the next."""
        return sum(buffer.nbytes for buffer in self._scratch.values()) + self._in_flight

    def look(
        self,
        parts: Iterable[tuple[Bucket, slice]],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        updates: Mapping[str, Tensor] | None,
    ) -> Callable[[], Tensor]:
        """A function that gives FAST_COLUMNS of the update, then of the gradient if there are any, for some rows of
        some buckets, one after the other: float32 [rows, 6 or 12].

        If it is to be called beside the next step, what it reads of the caller's tensors is copied here. Otherwise it
        reads them when it is called, one stack after the other.
        """
        stacks = ((bucket, rows, self._stacks(bucket, rows, weights, gradients, updates)) for bucket, rows in parts)
        if self._beside:
            stacks = [(bucket, rows, list(pair)) for bucket, rows, pair in stacks]
            self._in_flight = sum(X.nbytes for _, _, pair in stacks for _, X in pair)

        def table() -> Tensor:
            tables = [
                torch.cat([self._look(bucket, rows, which, X) for which, X in pair], dim=-1)
                for bucket, rows, pair in stacks
            ]
            self._in_flight = 0
            return torch.cat(tables)

        return table

    def _stacks(
        self,
        bucket: Bucket,
        rows: slice,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        updates: Mapping[str, Tensor] | None,
    ) -> Iterator[tuple[int, Tensor]]:
        if updates is None:
            yield _UPDATE, self._stack(bucket, rows, weights, minus_reference=True)
        else:
            yield _UPDATE, self._stack(bucket, rows, updates, minus_reference=False)
        if gradients is not None:
            yield _GRADIENT, self._stack(bucket, rows, gradients, minus_reference=False)

    def _stack(self, bucket: Bucket, rows: slice, tensors: Mapping[str, Tensor], *, minus_reference: bool) -> Tensor:
        """The named tensors (minus their references) [b, m, n]; zeros for a missing one."""
        names, reference = bucket.names[rows], bucket.reference[rows]
        buffer = self._buffer(reference)
        given = [tensors.get(name) for name in names]
        present = [(i, tensor.detach()) for i, tensor in enumerate(given) if tensor is not None]
        if len(present) < len(names):
            buffer.zero_()
        if len(present) == len(names) and not self._beside and {t.dtype for _, t in present} == {self._dtype}:
            torch.stack([tensor for _, tensor in present], out=buffer)  # on the CPU few calls count for more than bytes
            if minus_reference:
                buffer.sub_(reference)
            return buffer
        into, references = buffer.unbind(), reference.unbind()
        for start in range(0, len(present), _AT_ONCE):
            rows_now, values = zip(*present[start : start + _AT_ONCE], strict=True)
            if minus_reference:  # the difference is taken in the weights' type, then rounded
                values = torch._foreach_sub(values, [references[i] for i in rows_now])
            torch._foreach_copy_([into[i] for i in rows_now], values)
        return buffer

    def _buffer(self, reference: Tensor) -> Tensor:
        """For a stack like `reference`: a new one if the last may still be read, otherwise one for all of a shape:
        fresh megabytes cost more in page faults than the copy itself."""
        if self._beside:
            return torch.empty_like(reference, dtype=self._dtype)
        shape = tuple(reference.shape[1:])
        if shape not in self._scratch or self._scratch[shape].shape[0] < len(reference):
            self._scratch[shape] = torch.empty_like(reference, dtype=self._dtype)
        return self._scratch[shape][: len(reference)]

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
