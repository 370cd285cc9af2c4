"""One run of the planned shift, in a process of its own: `python shift_job.py JOB.json`. See shift.py."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console

from svdtrain.adaptive.targets import select_targets
from svdtrain.build import build_trainer
from svdtrain.config import RunConfig
from svdtrain.data.shift import ShiftStream
from svdtrain.data.stream import Batch, PreparedData, TokenStream, prepare, validation_batches
from svdtrain.trainer.hooks import Hook
from svdtrain.trainer.state import TrainState

TRUTH_EVERY = 5
TRUTH_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does. Text A is the configuration's `data`."""

    run: str
    config: dict[str, Any]
    after: str
    """Text B."""
    onset: int
    ramp_steps: int
    stop_at_onset: bool = False
    """Train on A only and save: the run that every arm goes on from."""
    lr_factor: float = 1.0
    """On every learning rate, from the onset on."""
    replay_share: float = 0.0
    """Of first-seen rows, from the onset to the end, whatever the alarm says."""
    resume: bool = False


class Watch(Hook):
    """The truth beside the alarm: losses on A and B every few steps, ||dW|| / ||W|| at every step. Only looks."""

    name = "shift_watch"

    def __init__(self, rows: dict[str, Batch], onset: int) -> None:
        self.rows = rows
        self.onset = onset
        self._before: list[Tensor] = []

    def on_train_start(self, state: TrainState) -> None:
        targets = select_targets(state.model, "all")
        self._weights = list(targets.values())
        first = state.stream.first_rows(TRUTH_ROWS)  # type: ignore[attr-defined]
        self.rows = {"first_seen": first, **self.rows}
        self.rows = {name: (x.to(state.device), y.to(state.device)) for name, (x, y) in self.rows.items()}

    def on_step_start(self, state: TrainState) -> None:
        self._before = [W.detach().clone() for W in self._weights]

    @torch.no_grad()
    def on_step_end(self, state: TrainState) -> None:
        moved = torch.stack(torch._foreach_norm(torch._foreach_sub(self._weights, self._before))).norm()
        size = torch.stack(torch._foreach_norm(self._weights)).norm()
        numbers = {"shift/update_size": float(moved / size)}
        if state.step % TRUTH_EVERY == 0 or state.step == state.num_iterations:
            numbers |= {f"shift/loss_{name}": self._loss(state, rows) for name, rows in self.rows.items()}
        state.log("shift", numbers)

    def _loss(self, state: TrainState, rows: Batch) -> float:
        size = state.config.train.device_batch_size
        state.model.eval()
        chunks = zip(rows[0].split(size), rows[1].split(size), strict=True)
        parts = [state.model(x, y, loss_reduction="none").double().mean() for x, y in chunks]
        state.model.train()
        weights = torch.tensor([len(x) for x in rows[0].split(size)], dtype=torch.float64, device=parts[0].device)
        return float((torch.stack(parts) * weights).sum() / weights.sum())


class FromOnset(Hook):
    """What an arm does without an alarm: another learning rate, or constant replay; or the end, for the base run."""

    name = "shift_arm"

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_train_start(self, state: TrainState) -> None:
        if self.job.replay_share:
            keep_out = max(state.config.svd.svd_probe_rows, TRUTH_ROWS)
            state.stream.replay(self.job.onset, self.job.replay_share, keep_out=keep_out)  # type: ignore[attr-defined]

    def on_step_start(self, state: TrainState) -> None:
        if state.step >= self.job.onset and self.job.lr_factor != 1:
            for group in state.optimizer.param_groups:
                group["lr"] *= self.job.lr_factor

    def on_step_end(self, state: TrainState) -> None:
        if self.job.stop_at_onset and state.step == self.job.onset:
            state.control.request_stop("onset")


def run_job(job: Job) -> None:
    """Train. Raises what `build_trainer` raises."""
    config = RunConfig.from_dict(job.config)
    after = prepare_text(config, job.after)
    before = prepare_text(config, config.data.data)

    def wrap(stream: TokenStream) -> ShiftStream:
        fresh = TokenStream(after.train, batch_size=stream.batch_size, seq_len=stream.seq_len, seed=stream.seed)
        return ShiftStream(stream, fresh, onset=job.onset, ramp_steps=job.ramp_steps)

    rows = {"a": held_out(config, before), "b": held_out(config, after)}
    hooks = [FromOnset(job), Watch(rows, job.onset)]
    trainer = build_trainer(config, Path(job.run), Console(), extra_hooks=hooks, wrap_stream=wrap)
    trainer.fit(resume=job.resume)


def prepare_text(config: RunConfig, spec: str) -> PreparedData:
    """Tokenised text; the tokenizer is that of the whole corpus."""
    return prepare(
        spec,
        vocab_size=config.model.vocab_size,
        cache_dir=config.data.cache_dir or None,
        max_train_tokens=config.data.max_train_tokens,
    )


def held_out(config: RunConfig, data: PreparedData) -> Batch:
    """Up to 64 rows of the validation text."""
    seq_len = config.model.max_seq_len
    num_rows = min(2 * TRUTH_ROWS, data.val.num_rows(seq_len))
    return validation_batches(data.val, num_rows, seq_len, num_tokens=num_rows * seq_len)[0]


if __name__ == "__main__":
    values = json.loads(Path(sys.argv[1]).read_text())
    known = {f.name for f in dataclasses.fields(Job)}
    run_job(Job(**{key: value for key, value in values.items() if key in known}))
