"""Batches as pure functions of seed and step: any step, in any order, on any number of ranks, without state to save."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from svdtrain.data.errors import DataError
from svdtrain.data.prepare import PreparedData, default_cache_dir, prepare
from svdtrain.data.token_files import Batch, TokenFiles

__all__ = [
    "Batch",
    "PreparedData",
    "ReplayStream",
    "TokenFiles",
    "TokenStream",
    "ValidationBatches",
    "default_cache_dir",
    "epoch_order",
    "mixed_batch",
    "prepare",
    "to_device",
    "validation_batches",
]


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_rows), int64, that depends on nothing else.

    From the legacy RandomState on purpose: NumPy keeps its output the same in every version (NEP 19), and a resumed
    run must see the same rows.
    """
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch & 0xFFFFFFFF]
    return np.random.RandomState(words).permutation(num_rows)


class TokenStream:
    """Training rows, shuffled anew in each epoch (`shuffle=False`: in the order of the text).

    Args:
        files: tokens of one split; TokenFiles says how documents fill rows.
        batch_size: rows per step, over all ranks.
        seq_len: tokens per row, T.
        seed: any integer; with the step it decides every batch.

    Raises:
        DataError: the text has fewer rows than one batch.
    """

    def __init__(self, files: TokenFiles, *, batch_size: int, seq_len: int, seed: int, shuffle: bool = True) -> None:
        _require_rows(files, batch_size, seq_len)
        self.files, self.batch_size, self.seq_len = files, batch_size, seq_len
        self.seed, self.shuffle = seed, shuffle
        self.rows_per_epoch = files.num_rows(seq_len)
        self.tokens_per_epoch = self.rows_per_epoch * seq_len
        self._orders: dict[int, np.ndarray] = {}

    def epoch(self, step: int) -> int:
        """Epoch of the first row of a step, from 0. A batch may reach into the next one."""
        return step * self.batch_size // self.rows_per_epoch

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Inputs and targets of one rank, int64 [batch_size / world_size, T] each, on the CPU.

        The ranks' batches in order of rank are the batch of a single rank.
        """
        return self.rows_seen(step * self.batch_size + _rank_slots(self.batch_size, rank, world_size))

    def first_rows(self, num_rows: int) -> Batch:
        """The rows that training sees first: those of step 0, then of step 1, ... int64 [num_rows, T] each."""
        if not 0 < num_rows <= self.rows_per_epoch:
            raise ValueError(f"num_rows must be from 1 to {self.rows_per_epoch} (one epoch), got {num_rows}")
        return self.rows_seen(np.arange(num_rows))

    def rows_seen(self, positions: np.ndarray) -> Batch:
        """Rows by their place in the order of training, counted over all steps and epochs."""
        epochs, places = np.divmod(np.asarray(positions), self.rows_per_epoch)
        indices = places
        if self.shuffle:
            indices = np.empty_like(places)
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                indices[chosen] = self._order(int(epoch))[places[chosen]]
        return self.files.rows(indices, self.seq_len)

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.pop(epoch, None)
        if order is None:
            order = epoch_order(self.rows_per_epoch, self.seed, epoch)
        self._orders[epoch] = order  # newest last; three: the two that a batch touches, and epoch 0 for replay
        while len(self._orders) > 3:
            del self._orders[next(iter(self._orders))]
        return order


def mixed_batch(
    stream: TokenStream,
    step: int,
    *,
    replay_share: float,
    replay_rows: int,
    replay: TokenStream | None = None,
    first_replayed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """`stream.batch(step)` with a share of its rows replaced by old ones; a pure function of its arguments.

    The old rows are the first `replay_rows` that `replay` (default: `stream` itself) gave to training, leaving out the
    first `first_replayed`, over and over in that order, evenly spread over the batch. The other rows are those of the
    batch without replay, so runs with and without it compare step by step. A share that is no whole number of rows is
    kept on average over steps.
    """
    old = stream if replay is None else replay
    if not 0.0 <= replay_share <= 1.0:
        raise ValueError(f"replay_share must lie in [0, 1], got {replay_share}")
    if not 0 <= first_replayed < replay_rows <= old.rows_per_epoch:
        raise ValueError(
            f"replay_rows must be from {first_replayed + 1} to {old.rows_per_epoch} (one epoch), got {replay_rows}"
        )
    if old.seq_len != stream.seq_len:
        raise ValueError(f"replayed rows have {old.seq_len} tokens, fresh ones {stream.seq_len}: make them equal")
    replayed = _replayed(stream.batch_size, step, replay_share)
    inputs, targets = stream.batch(step, rank, world_size)
    for local, slot in enumerate(_rank_slots(stream.batch_size, rank, world_size)):
        if int(slot) in replayed:
            place = first_replayed + replayed[int(slot)] % (replay_rows - first_replayed)
            old_inputs, old_targets = old.rows_seen(np.array([place]))
            inputs[local], targets[local] = old_inputs[0], old_targets[0]
    return inputs, targets


def _replayed(batch_size: int, step: int, share: float) -> dict[int, int]:
    """Slot in the batch -> how many rows were replayed before it since step 0."""
    before = math.floor(step * share * batch_size)
    count = math.floor((step + 1) * share * batch_size) - before
    return {(2 * n + 1) * batch_size // (2 * count): before + n for n in range(count)}


class ReplayStream:
    """A stream that mixes in first-seen rows from one step to another; a pure function of step and `schedule`.

    schedule: (first step, share, first row, end of the rows that are replayed), in ascending order of steps. Whoever
    calls `replay` saves it and puts it back on a resume.
    """

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream
        self.schedule: list[tuple[int, float, int, int]] = []

    @property
    def batch_size(self) -> int:
        """Rows per step, over all ranks."""
        return self.stream.batch_size

    @property
    def rows_per_epoch(self) -> int:
        """Rows that `first_rows` can give."""
        return self.stream.rows_per_epoch

    def first_rows(self, num_rows: int) -> Batch:
        """See `TokenStream.first_rows`."""
        return self.stream.first_rows(num_rows)

    def replay(self, from_step: int, share: float, *, keep_out: int = 0) -> None:
        """From a step on, fill `share` of the rows with the first half of all that were seen until then; 0 ends it.

        The first `keep_out` rows stay out, so that a probe made of them measures no training on itself. Where nothing
        has been seen yet, nothing is replayed.
        """
        stop = min(from_step * self.batch_size // 2, self.rows_per_epoch)
        self.schedule = [entry for entry in self.schedule if entry[0] < from_step]
        self.schedule.append((from_step, share if stop > keep_out else 0.0, keep_out, stop))

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """See `TokenStream.batch` and `mixed_batch`."""
        in_force = next((entry for entry in reversed(self.schedule) if entry[0] <= step), None)
        if in_force is None or in_force[1] == 0:
            return self.stream.batch(step, rank, world_size)
        _, share, first, stop = in_force
        return mixed_batch(
            self.stream, step, replay_share=share, replay_rows=stop, first_replayed=first,
            rank=rank, world_size=world_size,
        )  # fmt: skip


class ValidationBatches:
    """A fixed sequence of batches: every pass gives the same ones. Made by `validation_batches`."""

    def __init__(self, files: TokenFiles, rows: np.ndarray, seq_len: int) -> None:
        self.files, self.rows, self.seq_len = files, rows, seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Batch:
        return self.files.rows(self.rows[number], self.seq_len)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))


def validation_batches(
    files: TokenFiles, batch_size: int, seq_len: int, num_tokens: int, rank: int = 0, world_size: int = 1
) -> ValidationBatches:
    """About `num_tokens` tokens, spread evenly over the split, the same at every evaluation.

    Whole batches only (at least one, at most what the split has), so every batch has the same shape:
    [batch_size / world_size, seq_len]. `batch_size` counts the rows of all ranks.

    Raises:
        DataError: the split has fewer rows than one batch.
    """
    _require_rows(files, batch_size, seq_len)
    available = files.num_rows(seq_len)
    num_batches = max(1, min(num_tokens // (batch_size * seq_len), available // batch_size))
    wanted = num_batches * batch_size
    rows = (np.arange(wanted) * available // wanted).reshape(num_batches, batch_size)
    return ValidationBatches(files, rows[:, _rank_slots(batch_size, rank, world_size)], seq_len)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Inputs and targets on `device`; to a GPU through pinned memory, without waiting."""
    inputs, targets = batch
    if torch.device(device).type != "cuda":
        return inputs.to(device), targets.to(device)
    return inputs.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)


def _rank_slots(batch_size: int, rank: int, world_size: int) -> np.ndarray:
    if batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} does not divide by the number of ranks {world_size}")
    assert 0 <= rank < world_size, (rank, world_size)
    share = batch_size // world_size
    return np.arange(rank * share, (rank + 1) * share)


def _require_rows(files: TokenFiles, batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size and seq_len must be at least 1, got {batch_size} and {seq_len}")
    if files.num_rows(seq_len) < batch_size:
        what = "training" if files.split == "train" else "validation"
        raise DataError(
            f"the {what} text is too small: {files.num_tokens} tokens, but one batch takes {batch_size} rows of "
            f"{seq_len}; give more text, or lower --max-seq-len or the batch size"
        )
