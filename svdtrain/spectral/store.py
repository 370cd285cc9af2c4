"""Where the tracked bases live: one stack per shape and width, so that every lane is a handful of batched products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdtrain.spectral.lanes import Basis, erasure_weights

# A basis is as wide as the next of these above k + oversample, so that few widths share a batch and a falling r does
# not move a matrix at every analysis.
_WIDTHS = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096)
_STACKED = ("U", "S", "V", "spectrum", "reference")


@dataclass
class Row:
    """Host-side bookkeeping of one matrix."""

    index: int
    cut: int
    age: int = 0  # analyses since the last exact one
    analysed_at: int = -1
    valid: bool = False  # a basis is there
    filled: int = 0  # columns of the stack that hold a basis; fewer than its width after k grew
    exact_next: bool = True
    host_spectrum: Tensor | None = None  # float32 [g] on the host

    @property
    def cut_now(self) -> int:
        """k as far as the stored basis reaches."""
        return min(self.cut, self.filled)

    @property
    def usual(self) -> bool:
        """Whether squares stay inside the number range, by the last analysis: many orders of magnitude between."""
        return self.host_spectrum is not None and 1e-8 < float(self.host_spectrum[0]) < 1e8


class Bucket:
    """Stacks of one shape and width: U [rows, m, width] and so on. Row i belongs to names[i]."""

    def __init__(self, names: list[str], like: Tensor, shape: tuple[int, int], width: int) -> None:
        (m, n), rows, device = shape, len(names), like.device
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.names, self.m, self.n, self.width = names, m, n, width
        self.U = torch.zeros(rows, m, width, dtype=dtype, device=device)
        self.S = torch.zeros(rows, width, dtype=dtype, device=device)
        self.V = torch.zeros(rows, n, width, dtype=dtype, device=device)
        self.spectrum = torch.zeros(rows, min(m, n), dtype=dtype, device=device)
        self.reference = torch.zeros(rows, m, n, dtype=like.dtype, device=device)
        self.participation = torch.zeros(2, rows, device=device)  # of G and of dW; 0: not known yet
        self.looks = [0, 0]  # of the fast lane at G and at dW
        self._principal: tuple[Tensor, Tensor, Tensor] | None = None
        self.mask = torch.zeros(rows, width, dtype=dtype, device=device)
        self.max_cut = 0

    def set_cuts(self, cuts: list[int]) -> None:
        """0/1 masks of the principal columns: one small copy from pinned memory, only when a cut changes."""
        self.max_cut = max(cuts)
        columns = torch.arange(self.width, device="cpu")
        mask = (columns < torch.tensor(cuts, device="cpu")[:, None]).to(self.mask.dtype)
        self.mask.copy_(mask.pin_memory() if self.mask.is_cuda else mask, non_blocking=True)
        self.changed()

    def changed(self) -> None:
        """A basis or a cut changed: what was derived from it is void."""
        self._principal = None

    def principal(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """U [rows, m, K], V [rows, n, K] in `dtype` and the weights of the erasure [rows, K] between them, zero where
        not principal; K the largest cut.

        Kept until a basis or a cut changes, because the fast lane asks at every step.
        """
        if self._principal is None or self._principal[0].dtype != dtype:
            k = max(1, self.max_cut)
            mask = self.mask[:, :k]
            U, V = ((X[..., :k] * mask.unsqueeze(-2)).to(dtype) for X in (self.U, self.V))
            self._principal = (U, erasure_weights(self.S[:, :k] * mask), V)
        U, E, V = self._principal
        return U[rows], E[rows], V[rows]

    @property
    def principal_nbytes(self) -> int:
        """Bytes that `principal` keeps."""
        return 0 if self._principal is None else sum(t.nbytes for t in self._principal)

    def gather(self, field: str, rows: list[int]) -> Tensor:
        """A copy of some rows of one stack, without an index tensor (which would make the host wait); in one kernel
        where they are evenly spaced, which is how they are staggered."""
        stack, stride = getattr(self, field), rows[1] - rows[0] if len(rows) > 1 else 1
        if stride > 0 and rows == list(range(rows[0], rows[-1] + 1, stride)):
            return stack[rows[0] : rows[-1] + 1 : stride].clone()
        return torch.stack([stack[i] for i in rows])

    def basis(self, rows: list[int]) -> Basis:
        """Copies of some rows."""
        return Basis(*(self.gather(field, rows) for field in ("U", "S", "V", "spectrum")))


class BasisStore:
    """All rows and buckets of a tracker, and their saved form."""

    def __init__(self, weights: Mapping[str, Tensor], oversample: int, widest_share: float) -> None:
        for name, W in weights.items():
            if W.dim() != 2 or W.numel() == 0:
                raise ValueError(f"{name}: needs a 2-D weight that is not empty, got shape {tuple(W.shape)}")
        self._like = {name: torch.empty(0, dtype=W.dtype, device=W.device) for name, W in weights.items()}
        self.shapes = {name: (W.shape[0], W.shape[1]) for name, W in weights.items()}
        self._oversample, self._widest_share = oversample, widest_share
        self.rows = {name: Row(index, 0) for index, name in enumerate(weights)}
        self.buckets: list[Bucket] = []
        self.where: dict[str, tuple[Bucket, int]] = {}

    def set_cuts(self, cuts: Mapping[str, int]) -> None:
        """Set k of some matrices; a basis that knows fewer directions gets room, which the next analysis fills."""
        self.check_cuts(cuts)
        for name, k in cuts.items():
            self.rows[name].cut = k
        if any(name not in self.where or self._width(name) > self.where[name][0].width for name in self.rows):
            self._build({name: self._width(name) for name in self.rows})
        self.refresh_masks()

    def check_cuts(self, cuts: Mapping[str, int]) -> None:
        """ValueError for a k outside [0, g]."""
        for name, k in cuts.items():
            g = min(self.shapes[name])
            if not 0 <= k <= g:
                raise ValueError(f"{name}: the cut must lie in [0, {g}], got {k}")

    def refresh_masks(self) -> None:
        """Bring the masks of the principal columns in line with the rows' cuts."""
        for bucket in self.buckets:
            bucket.set_cuts([self.rows[name].cut_now for name in bucket.names])

    def too_wide(self, name: str) -> bool:
        """Whether the basis is so wide that iterating saves nothing over the exact decomposition."""
        return self.where[name][0].width > self._widest_share * min(self.shapes[name])

    def write(self, found: Mapping[str, tuple[Basis, Tensor]]) -> bool:
        """Store bases (without a batch dimension; wider ones are cut) and the weights they belong to, as references.
        True: more or fewer columns are filled than before, and `refresh_masks` must follow."""
        into, values, differs = [], [], False
        for name, (basis, weight) in found.items():
            bucket, i = self.where[name]
            width = bucket.width
            into += [getattr(bucket, field)[i] for field in _STACKED]
            values += [basis.U[:, :width], basis.S[:width], basis.V[:, :width], basis.spectrum, weight]
            bucket.changed()
            row = self.rows[name]
            differs |= row.filled != width
            row.valid, row.filled = True, width
        if into:
            torch._foreach_copy_(into, values)
        return differs

    def nbytes(self) -> dict[str, int]:
        """Bytes held: bases, their principal parts as the fast lane wants them, spectra, references."""
        return {
            "principal": sum(b.principal_nbytes for b in self.buckets),
            "bases": sum(b.U.nbytes + b.S.nbytes + b.V.nbytes + b.mask.nbytes for b in self.buckets),
            "spectra": sum(b.spectrum.nbytes for b in self.buckets),
            "references": sum(b.reference.nbytes for b in self.buckets),
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values by name."""
        saved: dict[str, Any] = {}
        for name, row in self.rows.items():
            bucket, i = self.where[name]
            saved[name] = {field: getattr(bucket, field)[i].clone() for field in _STACKED}
            saved[name]["participation"] = bucket.participation[:, i].clone()
            saved[name]["looks"] = list(bucket.looks)
            saved[name] |= {key: value for key, value in vars(row).items() if key != "index"}
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; checks everything before it changes anything. ValueError: other matrices."""
        if set(saved) != set(self.rows):
            differing = sorted(set(saved) ^ set(self.rows))
            raise ValueError(f"the saved tracker watches other matrices; differing names: {differing[:6]}")
        for name, values in saved.items():
            then, now = tuple(values["reference"].shape), self.shapes[name]
            if then != now:
                raise ValueError(f"{name}: saved with shape {then}, now {now}")
        self._build({name: values["S"].shape[0] for name, values in saved.items()})
        for name, values in saved.items():
            bucket, i = self.where[name]
            for field in _STACKED:
                getattr(bucket, field)[i].copy_(values[field])
            bucket.participation[:, i].copy_(values["participation"])
            bucket.looks = list(values["looks"])
            row = Row(self.rows[name].index, **{k: values[k] for k in vars(self.rows[name]) if k != "index"})
            if row.host_spectrum is not None:  # a state that was read onto a GPU
                row.host_spectrum = row.host_spectrum.cpu()
            self.rows[name] = row
        self.refresh_masks()

    def _width(self, name: str) -> int:
        g, needed = min(self.shapes[name]), self.rows[name].cut + self._oversample
        return min(g, next((width for width in _WIDTHS if width >= needed), g))

    def _build(self, widths: Mapping[str, int]) -> None:
        """Lay the stacks out anew where they change, and carry over what there is."""
        old, self.where = self.where, {}
        kept = {(tuple(bucket.names), bucket.width): bucket for bucket in self.buckets}
        self.buckets = []
        groups: dict[tuple, list[str]] = {}
        for name, width in widths.items():
            like = self._like[name]
            groups.setdefault((self.shapes[name], width, like.dtype, like.device), []).append(name)
        moved: list[tuple[str, tuple[Bucket, int]]] = []
        for (shape, width, _, _), names in groups.items():
            bucket = kept.get((tuple(names), width)) or Bucket(names, self._like[names[0]], shape, width)
            self.buckets.append(bucket)
            for i, name in enumerate(names):
                self.where[name] = (bucket, i)
                if name in old and old[name][0] is not bucket:
                    moved.append((name, old[name]))
        self._carry_over(moved)

    def _carry_over(self, moved: list[tuple[str, tuple[Bucket, int]]]) -> None:
        """What the old places of some rows hold, as far as there is room; field by field, for few calls."""
        columns = {name: min(source.width, self.where[name][0].width) for name, (source, _) in moved}
        for field in _STACKED:
            pairs = []
            for name, (source, j) in moved:
                target, i = self.where[name]
                into, values = getattr(target, field)[i], getattr(source, field)[j]
                if field in ("U", "S", "V"):
                    into, values = into[..., : columns[name]], values[..., : columns[name]]
                pairs.append((into, values))
            if pairs:
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        for name, _ in moved:
            self.rows[name].filled = min(self.rows[name].filled, columns[name])
