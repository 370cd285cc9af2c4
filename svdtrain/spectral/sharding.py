"""One owner per matrix, and its basis for everybody: which also makes the signs agree between ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from svdtrain.spectral.analysis import Job, Part, RowResult
from svdtrain.spectral.lanes import SLOW_COLUMNS, Basis


def own_part(part: Part, indices: list[int], group: Any) -> Part | None:
    """The rows of `part` that this rank owns: row i belongs to rank indices[i] % world. None if there are none."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = [j for j, index in enumerate(indices) if index % world == rank]
    if not mine:
        return None
    old = Basis(part.old.U[mine], part.old.S[mine], part.old.V[mine], part.old.spectrum[mine])
    return Part(
        names=[part.names[j] for j in mine], W=part.W[mine], reference=part.reference[mine], old=old,
        cut=part.cut[mine], max_cut=part.max_cut,
        exact=[part.exact[j] for j in mine], first=[part.first[j] for j in mine],
    )  # fmt: skip


def share_rows(whole: Job, own: dict[str, RowResult], indices: dict[str, int], group: Any) -> dict[str, RowResult]:
    """Every rank's results on every rank: one broadcast a matrix, in the job's order, from the calling thread.

    Reading the numbers on the host waits for the broadcast: with a group an analysis costs one wait a matrix.
    """
    world = dist.get_world_size(group)
    results: dict[str, RowResult] = {}
    for part in whole.parts:
        for j, name in enumerate(part.names):
            owner = indices[name] % world
            source = dist.get_global_rank(group, owner) if group is not dist.group.WORLD else owner
            results[name] = _share_row(part, j, own.get(name), source, group)
    return results


def _share_row(part: Part, j: int, own: RowResult | None, source: int, group: Any) -> RowResult:
    shapes = [t.shape[1:] for t in (part.old.U, part.old.S, part.old.V, part.old.spectrum)]
    dtype, device = part.old.S.dtype, part.old.S.device
    if own is None:
        packed = torch.empty(sum(s.numel() for s in shapes) + len(SLOW_COLUMNS), dtype=dtype, device=device)
    else:
        table = torch.tensor(own.table, dtype=dtype, device=device)
        tensors: list[Tensor] = [own.basis.U, own.basis.S, own.basis.V, own.basis.spectrum, table]
        packed = torch.cat([t.reshape(-1) for t in tensors])
    dist.broadcast(packed, src=source, group=group)
    *pieces, numbers = packed.split([*(s.numel() for s in shapes), len(SLOW_COLUMNS)])
    table = numbers.tolist()
    flags = dict(zip(SLOW_COLUMNS, table, strict=True))
    return RowResult(
        basis=Basis(*(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))),
        weight=part.W[j], table=table, exact=flags["exact"] > 0, ok=flags["ok"] > 0,
        skipped=flags["skipped"] > 0, first=part.first[j],
    )  # fmt: skip
