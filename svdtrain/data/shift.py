"""A planned shift: training text A up to a known step, text B from there on. The ground truth an alarm is judged by."""

from __future__ import annotations

import numpy as np

from svdtrain.data.stream import TokenStream
from svdtrain.data.token_files import Batch


class ShiftStream(TokenStream):
    """Batches of A, then of B, whose rows replace A's evenly over the batch, in a share that grows over `ramp_steps`.

    A pure function of the step, like any stream; first rows and epochs are those of A. Row k of B is used once before
    any is used again, whatever the ramp.
    """

    def __init__(self, before: TokenStream, after: TokenStream, *, onset: int, ramp_steps: int = 0) -> None:
        """`onset`: first step with rows of B. Raises ValueError unless both have the same shape and tokenizer."""
        if (before.batch_size, before.seq_len) != (after.batch_size, after.seq_len):
            raise ValueError("both texts of a shift need the same batch size and sequence length")
        if before.files.bos_id != after.files.bos_id:
            raise ValueError("both texts of a shift need the same tokenizer: filter one corpus with ?source=")
        super().__init__(
            before.files, batch_size=before.batch_size, seq_len=before.seq_len, seed=before.seed, shuffle=before.shuffle
        )
        self.after, self.onset, self.ramp_steps = after, onset, ramp_steps

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """See `TokenStream.batch`."""
        inputs, targets = super().batch(step, rank, world_size)
        first, count = self._rows_after(step)
        slots = {(2 * n + 1) * self.batch_size // (2 * count): first + n for n in range(count)}
        start = rank * self.batch_size // world_size
        mine = [(slot - start, row) for slot, row in slots.items() if 0 <= slot - start < len(inputs)]
        if mine:
            places = [place for place, _ in mine]
            inputs[places], targets[places] = self.after.rows_seen(np.array([row for _, row in mine]))
        return inputs, targets

    def _rows_after(self, step: int) -> tuple[int, int]:
        """Rows of B used before this step, and in it."""
        before, after = self._total_after(step), self._total_after(step + 1)
        return before, after - before

    def _total_after(self, step: int) -> int:
        """Rows of B in all steps below `step`: the n-th step of the ramp has the share n / ramp_steps."""
        steps = max(0, step - self.onset)
        ramp = min(steps, self.ramp_steps)
        full = steps - ramp
        return (ramp * (ramp + 1) * self.batch_size) // (2 * max(1, self.ramp_steps)) + full * self.batch_size
