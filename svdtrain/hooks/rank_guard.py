"""All ranks hold the same weights: checked, because nothing else would notice before the run is ruined."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from svdtrain.trainer.distributed import agree_max
from svdtrain.trainer.hooks import Hook, Priority
from svdtrain.trainer.state import TrainState

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RankGuard(Hook):
    """Every `every` steps: a checksum of all trained parameters, compared over ranks. A difference stops the run.

    The checksum is the sum of the bits read as integers, so one flipped bit shows. What is compared first has the same
    size whatever the ranks hold: ranks that have decided differently do not get into each other's way.
    """

    name = "rank_guard"
    priority = Priority.CONTROL

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, state: TrainState) -> None:
        if state.step % self.every == 0:
            self.check(state)

    def check(self, state: TrainState) -> None:
        """Compare now; every rank calls this."""
        parameters = state.trainable_parameters()
        sums = checksums(list(parameters.values()))
        layout = zlib.crc32("\n".join(f"{name} {tuple(p.shape)}" for name, p in parameters.items()).encode())
        total = sum(value % _MODULUS for value in sums) % _MODULUS
        if not _differing([float(layout), float(total)], state):
            return
        if _differing([float(layout)], state):
            what = "modes or ranks of matrices"
        else:
            differing = _differing([float(value % _MODULUS) for value in sums], state)
            names = [list(parameters)[index] for index in differing]
            what = f"{len(names)} of {len(parameters)} parameters, e.g. {names[0]}"
        message = f"the ranks disagree in {what}; the run stops, its last checkpoints are from before"
        state.alert("CRITICAL", "ranks_differ", message)
        state.control.request_abort(message)


_MODULUS = (1 << 52) - 47  # float64 holds it exactly


def checksums(parameters: list[nn.Parameter]) -> list[int]:
    """Sum of each parameter's bits, read as integers of its element size. Waits for the device once."""
    return torch.stack([_sum_of_bits(p) for p in parameters]).tolist()


def _sum_of_bits(p: Tensor) -> Tensor:
    return p.detach().contiguous().view(_INTEGER_OF_SIZE[p.element_size()]).sum(dtype=torch.int64)


def _differing(values: list[float], state: TrainState) -> list[int]:
    """Indices of the values that are not the same on all ranks; the same answer on every rank."""
    highest = agree_max([*values, *(-value for value in values)], state.world)
    most, least = highest[: len(values)], highest[len(values) :]
    return [index for index, (high, low) in enumerate(zip(most, least, strict=True)) if high != -low]
