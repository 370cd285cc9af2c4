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
        filled=[part.filled[j] for j in mine], wanted=[part.wanted[j] for j in mine], usual=part.usual,
    )  # fmt: skip


def share_rows(whole: Job, own: dict[str, RowResult], indices: dict[str, int], group: Any) -> dict[str, RowResult]:
    """Every rank's results on every rank, from the calling thread: one broadcast a rank that owns something.

    Reading the numbers on the host waits for the broadcasts, once.
    """
    world = dist.get_world_size(group)
    places = [(part, j, indices[name] % world) for part in whole.parts for j, name in enumerate(part.names)]
    received = {}
    for owner in sorted({owner for _, _, owner in places}):
        theirs = [(part, j) for part, j, its_owner in places if its_owner == owner]
        for (part, j), row in zip(theirs, _broadcast(theirs, own, owner, group), strict=True):
            received[part.names[j]] = (part, j, row)
    # spectrum and table of all rows in one copy to the host
    numbers = torch.cat([row[-_num_host(part) :].float() for part, _, row in received.values()]).cpu()
    results, start = {}, 0
    for part, j, row in received.values():
        size = _num_host(part)
        results[part.names[j]] = _unpacked(part, j, row, numbers[start : start + size])
        start += size
    return {part.names[j]: results[part.names[j]] for part, j, _ in places}


def _shapes(part: Part) -> list[torch.Size]:
    return [t.shape[1:] for t in (part.old.U, part.old.S, part.old.V, part.old.spectrum)]


def _num_host(part: Part) -> int:
    """Numbers at the end of a packed row that the host wants: spectrum and table."""
    return part.old.spectrum.shape[-1] + len(SLOW_COLUMNS)


def _broadcast(theirs: list[tuple[Part, int]], own: dict[str, RowResult], owner: int, group: Any) -> list[Tensor]:
    """The packed rows of one owner: U, S, V, spectrum and table of each, one after the other."""
    like = theirs[0][0].old.S
    sizes = [sum(shape.numel() for shape in _shapes(part)) + len(SLOW_COLUMNS) for part, _ in theirs]
    if owner == dist.get_rank(group):
        packed = torch.cat([_packed(own[part.names[j]], like) for part, j in theirs])
    else:
        packed = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
    source = dist.get_global_rank(group, owner) if group is not dist.group.WORLD else owner
    dist.broadcast(packed, src=source, group=group)
    return list(packed.split(sizes))


def _packed(result: RowResult, like: Tensor) -> Tensor:
    table = torch.tensor(result.table, dtype=like.dtype, device=like.device)
    basis = result.basis
    return torch.cat([t.reshape(-1).to(like.dtype) for t in (basis.U, basis.S, basis.V, basis.spectrum, table)])


def _unpacked(part: Part, j: int, row: Tensor, numbers: Tensor) -> RowResult:
    shapes = _shapes(part)
    pieces = row[: -len(SLOW_COLUMNS)].split([shape.numel() for shape in shapes])
    spectrum, table = numbers.split([numbers.numel() - len(SLOW_COLUMNS), len(SLOW_COLUMNS)])
    flags = dict(zip(SLOW_COLUMNS, table.tolist(), strict=True))
    return RowResult(
        basis=Basis(*(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))),
        host_spectrum=spectrum.clone(), weight=part.W[j], table=table.tolist(),
        exact=flags["exact"] > 0, ok=flags["ok"] > 0, skipped=flags["skipped"] > 0, first=part.first[j],
    )  # fmt: skip
