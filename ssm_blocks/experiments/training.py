"""The training loop of all experiments: AdamW, warmup and cosine, clipped gradients, a curriculum over length.

A run whose loss says that the task is solved ends early, after a short cool-down: most arms either solve a task soon or
never. Nothing is read back from the device between checks, so a GPU is never waited for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_blocks.mixer import non_matrix_parameters
from ssm_blocks.tasks.task import IGNORED

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """lengths: the curriculum, the last one is what is trained for. Raises ValueError for impossible values.

    A stage of the curriculum ends when the mean loss of a check is below `advance_loss`, or with its share of the
    first half of the steps. The last stage is solved when the mean loss is below `solved_loss`; then `cooldown` steps
    bring the learning rate to zero.
    """

    steps: int = 1500
    batch: int = 256
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.0
    clip: float = 1.0
    lengths: tuple[int, ...] = (20,)
    advance_loss: float = 0.3
    solved_loss: float = 1e-3
    cooldown: int = 100
    check_every: int = 50

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch, self.warmup, self.cooldown, self.check_every, *self.lengths)
        if min(counts) < 1 or not self.lengths or self.lr <= 0:
            raise ValueError(f"steps, batch, warmup, cooldown, lengths and lr must be positive, got {self}")


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """Steps made, seconds for them, mean loss of the last check, and how it ended: solved, steps or diverged."""

    steps: int
    seconds: float
    loss: float
    ended: str


class Schedule:
    """Linear warmup, then a cosine to zero; `finish_by` brings its end forward without a jump."""

    def __init__(self, peak: float, warmup: int, end: int) -> None:
        self.height, self.warmup, self.start, self.end = peak, warmup, 0, end

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        phase = min(1.0, (step - self.start) / (self.end - self.start))
        return min(1.0, (step + 1) / self.warmup) * self.height * 0.5 * (1 + math.cos(math.pi * phase))

    def finish_by(self, step: int, end: int) -> None:
        """From `step` on, fall from the present rate to zero at `end` if that is earlier than planned."""
        if end < self.end:
            self.height, self.start, self.end = self.rate(step), step, end


class Curriculum:
    """Which length is trained on."""

    def __init__(self, training: Training) -> None:
        self.training, self.stage = training, 0

    @property
    def length(self) -> int:
        """Tokens per sequence now."""
        return self.training.lengths[self.stage]

    @property
    def is_last(self) -> bool:
        """Whether this is the length that counts."""
        return self.stage == len(self.training.lengths) - 1

    def update(self, step: int, loss: float) -> None:
        """Go on where this stage is learnt or has had its share."""
        share = self.training.steps / (2 * len(self.training.lengths))
        if not self.is_last and (loss < self.training.advance_loss or step >= share * (self.stage + 1)):
            self.stage += 1


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the scored positions; logits [B, T, C], targets [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; what is no matrix does not decay."""
    special = {id(parameter) for parameter in non_matrix_parameters(model).values()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in special], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) in special], "weight_decay": 0.0},
    ]
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.99), fused=on_cuda)


def train(
    model: nn.Module, batch_at: Callable[[int, int], Batch], training: Training, loss_of: Loss = token_loss
) -> TrainingReport:
    """Train `model` in place on batch_at(step, length) -> (inputs, targets); it ends with its best weights."""
    optimizer = make_optimizer(model, training.lr, training.weight_decay)
    schedule, curriculum = Schedule(training.lr, training.warmup, training.steps), Curriculum(training)
    best, window, ended, step = Best(model), [], "steps", 0
    began = time.perf_counter()
    model.train()
    while step < schedule.end and ended != "diverged":
        batch = batch_at(step, curriculum.length)
        window.append(_update(model, optimizer, batch, schedule.rate(step), training, loss_of))
        step += 1
        if step % training.check_every == 0 or step == schedule.end:
            loss, window = torch.stack(window).mean().item(), []
            if not math.isfinite(loss):
                ended = "diverged"
            elif curriculum.is_last:
                best.see(loss)
                if loss < training.solved_loss and ended != "solved":
                    ended = "solved"
                    schedule.finish_by(step, step + training.cooldown)
            curriculum.update(step, loss)
    best.restore()
    model.eval()
    return TrainingReport(steps=step, seconds=time.perf_counter() - began, loss=best.loss, ended=ended)


class Best:
    """The weights after the check with the lowest training loss.

    A small model that has solved its task may still be thrown off it by a late step: Adam's steps do not shrink with
    the gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.loss, self.weights = model, math.nan, None

    def see(self, loss: float) -> None:
        """Keep the present weights if they are the best so far."""
        if self.weights is None or loss <= self.loss:
            self.loss = loss
            self.weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def restore(self) -> None:
        """Put them back, if there were any."""
        if self.weights is not None:
            self.model.load_state_dict(self.weights)


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float, training: Training, loss_of: Loss
) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = lr
    inputs, targets = batch
    loss = loss_of(model(inputs), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    optimizer.step()
    return loss.detach()


def ms_per_step(
    model: nn.Module, batch: Batch, loss_of: Loss = token_loss, *, repeats: int = 20, rounds: int = 3
) -> float:
    """Milliseconds of one training step on `batch`: the fastest of `rounds` means over `repeats`."""
    training, optimizer = Training(lr=1e-6), make_optimizer(model, 1e-6, 0.0)
    times = []
    for _ in range(rounds + 1):  # the first warms up
        _wait(batch[0].device)
        began = time.perf_counter()
        for _ in range(repeats):
            _update(model, optimizer, batch, 1e-6, training, loss_of)
        _wait(batch[0].device)
        times.append(1000 * (time.perf_counter() - began) / repeats)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
