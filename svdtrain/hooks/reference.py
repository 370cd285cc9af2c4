"""First-seen text held fixed: the batch whose gradient is taken, the probe set, the control set, and their forwards."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdtrain.config import SVDConfig
from svdtrain.spectral.activations import collect_input_covariances
from svdtrain.trainer.distributed import World, sum_over_ranks
from svdtrain.trainer.state import ReplayableStream, TrainState

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
ControlRows = Callable[[int], Batch]
"""Number of rows -> that many that are never trained on (or all there are), int64 [rows, T] inputs and targets."""

_MOST_PARTS = 8
_BATCH_SHARE = 16  # the reference batch is a sixteenth of the batch


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Sizes of the fixed sets, over all ranks."""

    reference: int
    """Rows whose gradient is taken."""
    parts: int
    """Equal parts of them on each rank, each with a backward pass of its own."""
    probe: int
    """Rows whose loss is followed; the reference rows come first."""


def count_rows(
    config: SVDConfig, *, batch_size: int, micro_batch: int, world_size: int, available: int, compiled: bool
) -> RowCounts:
    """Sizes from the settings, all in rows. Compiled, a part is a micro-batch: another shape would recompile."""
    wanted = config.svd_reference_rows or max(1, batch_size // _BATCH_SHARE)
    if compiled:
        parts = math.ceil(wanted / (micro_batch * world_size))
        reference = parts * micro_batch * world_size
    else:
        per_rank = math.ceil(wanted / world_size)
        parts = min(per_rank, _MOST_PARTS)
        reference = parts * math.ceil(per_rank / parts) * world_size
    if reference > available:
        raise ValueError(
            f"--svd-reference-rows: {reference} rows are needed (rounded up), the training text has {available}"
        )
    probe = min(max(reference, config.svd_probe_rows), available)
    return RowCounts(reference=reference, parts=parts, probe=probe)


class FirstSeen:
    """The fixed sets of one run, on this rank's device. Made when training starts: the compiled forward must exist."""

    def __init__(
        self, state: TrainState, config: SVDConfig, stream: ReplayableStream, control_rows: ControlRows
    ) -> None:
        """Raises ValueError when more rows are asked for than the text has."""
        self._state = state
        self._micro_batch = state.config.train.device_batch_size
        world = state.world
        self.counts = count_rows(
            config,
            batch_size=stream.batch_size,
            micro_batch=self._micro_batch,
            world_size=world.size,
            available=stream.rows_per_epoch,
            compiled=state.forward is not state.model,
        )
        rows = stream.first_rows(self.counts.probe)
        self._reference = _to(_share(rows, self.counts.reference, world), state.device)
        self._probe = _to(rows, state.device)
        self._control = _to(control_rows(self.counts.probe), state.device)
        self._said_unreached = False

    def reference_losses(self) -> list[Callable[[], Tensor]]:
        """One closure a part: the training forward, compiled where training is, on a shape that it knows."""
        parts = zip(*(t.chunk(self.counts.parts) for t in self._reference), strict=True)
        return [lambda x=x, y=y: self._state.forward(x, y) for x, y in parts]

    def probe_losses(self, layers: Mapping[str, nn.Module]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of every probe row, [probe] in nats a token, and E[x x^T] [n, n] of the layers' inputs over all of them:
        one forward of the uncompiled modules without gradients. Layers whose weight is used without calling them are
        left out, which is said once."""
        world = self._state.world
        with collect_input_covariances(layers) as collector:
            losses = self._row_losses(self._probe)
        if world.size > 1:
            collector.all_reduce()
        unreached = collector.unreached
        if unreached and not self._said_unreached:
            self._said_unreached = True
            logger.warning(
                "no input reaches %s: their weights are used without calling the modules, so their inputs are not "
                "measured, and cannot be protected",
                ", ".join(unreached),
            )
        return losses, {name: found.C for name, found in collector.result(skip_unreached=True).items()}

    def control_losses(self) -> Tensor:
        """Loss of every control row, [rows] in nats a token."""
        return self._row_losses(self._control)

    @torch.no_grad()
    def _row_losses(self, rows: Batch) -> Tensor:
        """Mean loss of each row, float64 on the CPU, the same on every rank; each rank runs its share of the rows."""
        model, world = self._state.model, self._state.world
        losses = torch.zeros(len(rows[0]), dtype=torch.float64)
        was_training = model.training
        model.eval()
        for chosen in self._chunks(len(losses), world):
            x, y = rows[0][chosen], rows[1][chosen]
            losses[chosen] = model(x, y, loss_reduction="none").view(len(x), -1).double().mean(1).cpu()
        model.train(was_training)
        return sum_over_ranks(losses, world)

    def _chunks(self, num_rows: int, world: World) -> Iterator[slice]:
        """This rank's rows, at most a micro-batch at a time. With fewer rows than ranks the last ranks repeat none."""
        per_rank = math.ceil(num_rows / world.size)
        start, stop = world.rank * per_rank, min((world.rank + 1) * per_rank, num_rows)
        for first in range(start, stop, self._micro_batch):
            yield slice(first, min(first + self._micro_batch, stop))


def linear_layers(model: nn.Module, targets: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    """The module that holds each target as its weight, by the target's name."""
    owners = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Linear)}
    return {name: owners[id(W)] for name, W in targets.items() if id(W) in owners}


def _share(rows: Batch, num_rows: int, world: World) -> Batch:
    per_rank = num_rows // world.size
    mine = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    return rows[0][mine], rows[1][mine]


def _to(rows: Batch, device: torch.device) -> Batch:
    return rows[0].to(device), rows[1].to(device)
