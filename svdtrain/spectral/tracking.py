"""The tracked engine: look at every matrix at every step, and keep its leading singular subspaces up to date.

    tracker = SubspaceTracker(weights, cuts={"h.0.attn.c_q.weight": 64, ...}, settings=TrackerSettings())
    each step, after the optimizer:  tracker.step(step, weights, gradients)
    whenever it suits:               for report in tracker.poll(): ...

Fast lane (every step): block energies of the gradient and of the update since the last analysis, for all matrices,
batched by shape, against the last basis.
Slow lane (every `interval` steps, staggered over the matrices): warm iterations with oversampling, or the exact
decomposition when the residual, the age or a request asks for it. With a process group each matrix has one owner; the
rest receive its basis.
On CUDA both run beside the next step, in one thread on a side stream, from copies; results are adopted at the start of
the next call that touches the bases, so what is computed never depends on timing, and no step waits.

Memory per matrix beside the weights: one copy (the reference of the update) and (m + n + 1) x width + g numbers; on a
GPU two copies in the fast lane's type while a look is under way, on the CPU one for all matrices of a shape; while an
analysis is under way a snapshot of its matrices (weights, references, bases).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdtrain.spectral.analysis import Job, Part, RowResult, run_job
from svdtrain.spectral.decompose import Decomposition, load_library
from svdtrain.spectral.fast_lane import FastLane
from svdtrain.spectral.lanes import FAST_COLUMNS, SLOW_COLUMNS, Basis, fast_values, slow_values
from svdtrain.spectral.settings import TrackerSettings
from svdtrain.spectral.sharding import own_part, share_rows
from svdtrain.spectral.store import BasisStore, Bucket
from svdtrain.spectral.transfer import Report, Reports, to_host
from svdtrain.spectral.worker import Worker

log = logging.getLogger(__name__)

_STAGGER, _STAGGER_ON_CPU = 4, 2
_ITERATIONS, _ITERATIONS_ON_CPU = 8, 4
_UPDATE, _GRADIENT = "update/", "gradient/"
_RESIDUAL, _UPDATE_RATIO = SLOW_COLUMNS.index("residual"), SLOW_COLUMNS.index("update_ratio")
_MOVED = 0.5  # relative size of an update from which the tail of the spectrum, which is not tracked, has another shape


class SubspaceTracker:
    """See the module's docstring. One instance watches any number of matrices of any shapes on one device."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        cuts: Mapping[str, int],
        settings: TrackerSettings | None = None,
        group: Any = None,
        worker: Worker | None = None,
    ) -> None:
        """`cuts[name]` is k, the number of principal directions; `group`: a process group to share the work over;
        `worker`: who does it (default: what suits the device).

        Raises ValueError for no weights, a weight that is not 2-D, weights without a cut, or a cut outside [0, g].
        """
        if not weights or set(cuts) != set(weights):
            raise ValueError("a tracker needs at least one weight, and a cut for each")
        self.settings = settings or TrackerSettings()
        self._group = group
        self._store = BasisStore(weights, self.settings.oversample, self.settings.widest_share)
        self._store.set_cuts(cuts)
        device = next(iter(weights.values())).device
        on_gpu = device.type == "cuda"
        if on_gpu:
            load_library(device)  # before there are threads
        own = self.settings
        self._stagger = own.stagger or (_STAGGER if on_gpu else _STAGGER_ON_CPU)
        self._max_iterations = own.max_iterations or (_ITERATIONS if on_gpu else _ITERATIONS_ON_CPU)
        self._together = on_gpu if own.exact_together is None else own.exact_together
        self._reports = Reports()
        self._worker = worker or Worker(device)
        self._fast = FastLane(
            device, own.fast_dtype, own.participation_every, own.gradient_right_side, beside=self._worker.beside
        )
        self._new_cuts: dict[str, int] = {}
        self._looking: Future[None] | None = None
        self._analysing: tuple[Job, Future[dict[str, RowResult]]] | None = None

    # --- what a training loop calls ---

    def step(self, step: int, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Both lanes after optimizer step number `step`: observe everything, analyse what is due."""
        self.observe(step, weights, gradients)
        self.analyse(step, weights, self.due(step))

    @torch.no_grad()
    def observe(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None = None,
        updates: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fast lane. Without `updates`, the update is the weight minus the weight of its last analysis.

        Gives a Report of kind "fast" with values[name]["update/share"] and so on (see `fast_values`), and
        "gradient/..." with gradients. Matrices without a basis yet are left out.
        """
        self.settle()
        parts: list[tuple[Bucket, slice]] = []
        named: list[tuple[str, bool, int, int, int]] = []
        for bucket in self._store.buckets:
            for start in range(0, len(bucket.names), self.settings.chunk):
                names = bucket.names[start : start + self.settings.chunk]
                rows = [self._store.rows[name] for name in names]
                if any(row.valid for row in rows):
                    parts.append((bucket, slice(start, start + len(names))))
                    for name, row in zip(names, rows, strict=True):
                        named.append((name, row.valid, bucket.m, bucket.n, row.cut_now))
        if not parts:
            return
        table = self._fast.look(parts, weights, gradients, updates)
        self._looking = self._worker.submit(lambda: self._reports.put(Report("fast", step, _name_fast(table(), named))))

    def due(self, step: int) -> list[str]:
        """Matrices whose analysis falls on this step: staggered, and the same on every rank."""
        names, rows = [], self._store.rows
        for name, row in rows.items():
            interval = self.settings.interval
            if self._store.too_wide(name):
                interval *= self.settings.exact_interval_factor
            groups = min(self._stagger, len(rows), interval)
            turn = step + self.settings.offset + row.index % groups * interval // groups
            # A basis that was installed just now, out of turn, is left to age for a while.
            if row.analysed_at < 0 or (turn % interval == 0 and step - row.analysed_at >= interval // 2):
                names.append(name)
        return names

    @torch.no_grad()
    def analyse(self, step: int, weights: Mapping[str, Tensor], names: Iterable[str] | None = None) -> None:
        """Slow lane for `names` (default: all) from a snapshot of their weights; gives a Report of kind "slow".

        Adopted at once on the CPU, at the next call that touches the bases on a GPU.
        """
        self._adopt_analysis()
        chosen = set(self._store.rows if names is None else names)
        if not chosen:
            return
        job = self._snapshot(step, chosen, weights)
        own = job if self._group is None else self._own(job)
        self._analysing = (job, self._worker.submit(lambda: run_job(own)))
        if not self._worker.beside:
            self.settle()

    def settle(self) -> None:
        """Adopt what is under way, waiting for it if need be."""
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.result()
        if self._analysing is not None:
            (job, future), self._analysing = self._analysing, None
            self._adopt(job, future.result())
        new, self._new_cuts = self._new_cuts, {}
        if any(self._store.rows[name].cut != k for name, k in new.items()):
            self._store.set_cuts(new)

    def _adopt_analysis(self) -> None:
        """`settle`, where an analysis is under way; a look alone concerns no basis and is not waited for."""
        if self._analysing is not None:
            self.settle()

    def poll(self) -> list[Report]:
        """Finished reports, oldest first; never waits. Kinds "fast" and "slow"."""
        return self._reports.take(math.inf)

    def take(self, before: int) -> list[Report]:
        """The reports of steps before `before`, waiting for what is under way: what comes depends on no timing."""
        self.settle()
        return self._reports.take(before)

    def flush(self) -> list[Report]:
        """All reports, waiting for what is under way."""
        self.settle()
        return self._reports.take(math.inf)

    # --- what a controller asks and sets ---

    def basis(self, name: str) -> Decomposition:
        """The tracked basis U [m, width], S [width], V [n, width] as views; LookupError while there is none."""
        self.settle()
        if not self._store.rows[name].valid:
            raise LookupError(f"{name} has no basis yet")
        bucket, i = self._store.where[name]
        return Decomposition(bucket.U[i], bucket.S[i], bucket.V[i])

    def spectrum(self, name: str) -> Tensor:
        """All g singular values: tracked ones first, then the tail of the last exact analysis at today's energy."""
        self.settle()
        bucket, i = self._store.where[name]
        return bucket.spectrum[i]

    def host_spectrum(self, name: str) -> Tensor:
        """`spectrum` as it was adopted, float32 on the host, without waiting for the device."""
        self._adopt_analysis()
        S = self._store.rows[name].host_spectrum
        if S is None:
            raise LookupError(f"{name} has no basis yet")
        return S

    def analysed_at(self, name: str) -> int:
        """Step of the last analysis; -1 before the first."""
        self._adopt_analysis()
        return self._store.rows[name].analysed_at

    def request_exact(self, names: Iterable[str]) -> None:
        """The next analysis of these is exact."""
        for name in names:
            self._store.rows[name].exact_next = True

    def set_cuts(self, cuts: Mapping[str, int]) -> None:
        """Set k of some matrices. A basis with fewer columns than the new k gets the rest at the next analysis."""
        self._store.check_cuts(cuts)
        self._new_cuts |= cuts
        if self._looking is None:  # what is looked at now is looked at with the old ones
            self.settle()

    def install(self, decompositions: Mapping[str, Decomposition], weights: Mapping[str, Tensor], step: int) -> None:
        """Adopt exact full decompositions made elsewhere (at a switch) as these matrices' bases and references."""
        self.settle()
        spectra = to_host({name: found.S.float() for name, found in decompositions.items()})
        for name in decompositions:
            row = self._store.rows[name]
            row.age, row.analysed_at, row.exact_next = 0, step, False
            row.host_spectrum = spectra[name]
        self._write(
            {
                name: (Basis(found.U, found.S, found.V, found.S), weights[name].detach())
                for name, found in decompositions.items()
            }
        )

    def _write(self, found: dict[str, tuple[Basis, Tensor]]) -> None:
        with torch.no_grad():
            if self._store.write(found):
                self._store.refresh_masks()

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held per kind: bases, their principal part as the fast lane wants it, spectra, references, scratch."""
        return self._store.nbytes() | {"scratch": self._fast.nbytes}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: safe for torch.load(weights_only=True), exact when loaded.

        Reports that were not polled are not part of it: flush first.
        """
        self.settle()
        return {"version": 1, "rows": self._store.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ValueError when it belongs to other matrices."""
        self.settle()
        self._store.load_state_dict(state["rows"])

    # --- slow lane ---

    def _snapshot(self, step: int, chosen: set[str], weights: Mapping[str, Tensor]) -> Job:
        """Copies of everything the analysis reads, so that training may go on."""
        parts = []
        for bucket in self._store.buckets:
            rows = [i for i, name in enumerate(bucket.names) if name in chosen]
            for start in range(0, len(rows), self.settings.chunk):
                parts.append(self._part(bucket, rows[start : start + self.settings.chunk], weights))
        own = self.settings
        return Job(step, parts, own.ritz, own.skip_tolerance, own.residual_tolerance, self._max_iterations)

    def _part(self, bucket: Bucket, rows: list[int], weights: Mapping[str, Tensor]) -> Part:
        names = [bucket.names[i] for i in rows]
        host = [self._store.rows[name] for name in names]
        return Part(
            names=names,
            W=torch.stack([weights[name].detach() for name in names]),
            reference=bucket.gather("reference", rows),
            old=bucket.basis(rows),
            # From the masks on the device: a new tensor from a Python list would make the host wait.
            cut=bucket.gather("mask", rows).sum(-1).long(),
            max_cut=bucket.max_cut,
            exact=self._exact_now(names),
            first=[not row.valid for row in host],
            filled=[row.filled for row in host],
            wanted=[min(row.cut, bucket.width) for row in host],
            usual=all(row.usual for row in host),
        )

    def _exact_now(self, names: list[str]) -> list[bool]:
        """Which are to be exact; those of unusual size, zero above all, always are. A GPU decomposes many in little
        more than the time of one: those that would be due before long join."""
        rows, limit = [self._store.rows[name] for name in names], self.settings.exact_every
        due = [
            row.exact_next or row.age + 1 >= limit or not row.usual or self._store.too_wide(name)
            for name, row in zip(names, rows, strict=True)
        ]
        if self._together and any(due):
            due = [is_due or row.age + 1 >= limit // 2 for is_due, row in zip(due, rows, strict=True)]
        return due

    def _own(self, job: Job) -> Job:
        indices = {name: row.index for name, row in self._store.rows.items()}
        parts = [own_part(part, [indices[name] for name in part.names], self._group) for part in job.parts]
        return replace(job, parts=[part for part in parts if part is not None])

    def _adopt(self, job: Job, results: dict[str, RowResult]) -> None:
        if self._group is not None:
            indices = {name: row.index for name, row in self._store.rows.items()}
            with torch.no_grad():
                results = share_rows(job, results, indices, self._group)
        self._write(
            {
                name: (result.basis, result.weight)
                for name, result in results.items()
                if self._note(job.step, name, result)
            }
        )
        sizes = [(self._store.where[name][0].m, self._store.rows[name].cut_now) for name in results]
        table, (m, k) = np.array([result.table for result in results.values()]), np.array(sizes).T
        values = slow_values(table, [result.first for result in results.values()], m, k)
        self._reports.put(Report("slow", job.step, dict(zip(results, values, strict=True))))

    def _note(self, step: int, name: str, result: RowResult) -> bool:
        """What the host keeps of a result; whether its basis is a new one."""
        row = self._store.rows[name]
        row.analysed_at = step
        if not result.ok:
            row.exact_next = True  # the old basis stays, and so does the reference that belongs to it
            log.warning("%s: analysis at step %d failed; the old basis is kept, the next one is exact", name, step)
            return False
        if result.skipped:
            row.age += 1
            return False
        row.host_spectrum = result.host_spectrum
        if result.exact:
            # Where each costs its own time ages start staggered, so that not all fall on the same round.
            row.age = row.index % self.settings.exact_every if result.first and not self._together else 0
            row.exact_next = False
        else:
            row.age += 1
            residual, moved = result.table[_RESIDUAL], result.table[_UPDATE_RATIO]
            row.exact_next = residual > self.settings.residual_tolerance or moved > _MOVED
        return True


def _name_fast(table: Tensor, named: list[tuple[str, bool, int, int, int]]) -> dict[str, dict[str, float]]:
    """Numbers of the update and, where the table is wide enough, of the gradient; `named`: name, known, m, n, k."""
    numbers, width = table.cpu().double().numpy(), len(FAST_COLUMNS)
    names, known, *sizes = zip(*named, strict=True)
    m, n, k = (np.array(size) for size in sizes)
    rows = fast_values(numbers[:, :width], m, n, k, _UPDATE)
    if numbers.shape[-1] > width:
        rows = [u | g for u, g in zip(rows, fast_values(numbers[:, width:], m, n, k, _GRADIENT), strict=True)]
    return {name: row for name, is_known, row in zip(names, known, rows, strict=True) if is_known}
