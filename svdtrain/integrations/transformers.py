"""Adaptive SVD in `transformers.Trainer`: one callback, saved and resumed with the trainer's own checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from svdtrain.adaptive.attach import AttachedSVD, attach
from svdtrain.config import SVDConfig

STATE_FILE = "svdtrain.pt"
log = logging.getLogger(__name__)


class SVDCallback(TrainerCallback):
    """`Trainer(..., callbacks=[SVDCallback()])`.

    Attaches to the trainer's own optimizer when training begins, with the shadow adapter: groups, state and
    checkpoints of the trainer keep their format. The state of the method is written beside each checkpoint as
    svdtrain.pt and read back when training resumes from it. The trainer does not tell where it resumes from: that is
    taken to be in its own output_dir, or `TrainingArguments(resume_from_checkpoint=...)`. `svd` is the attached method
    while training runs. Raises ValueError for svd_adapter=reregister, which the trainer's checkpoints do not fit.
    """

    def __init__(self, config: SVDConfig | None = None) -> None:
        self.config = config
        self.svd: AttachedSVD | None = None
        if config is not None and config.svd_adapter == "reregister":
            raise ValueError("svd_adapter=reregister does not work in the loop of transformers; leave it at auto")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach; where the trainer resumed, load the state saved with the checkpoint."""
        if self.svd is not None:  # an earlier train() ended in an exception, and the trainer keeps its optimizer
            self.svd.detach()
        self.svd = attach(kwargs["model"], kwargs["optimizer"], self.config, log=log.info)
        if state.global_step > 0:
            named = str(args.resume_from_checkpoint)
            self._load(Path(named) if Path(named).is_dir() else _checkpoint(args, state), self.svd)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the metrics of the last analysis to the trainer's own log entry."""
        if self.svd is not None and logs is not None:
            logs.update(self.svd.metrics())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write svdtrain.pt into the checkpoint that was just saved."""
        if self.svd is None or not state.is_world_process_zero:
            return
        if _checkpoint(args, state).is_dir():
            torch.save(self.svd.state_dict(), _checkpoint(args, state) / STATE_FILE)
        else:  # a trial of a hyperparameter search, which are not resumed
            log.warning("%s is not where the checkpoint is: it gets no %s", _checkpoint(args, state), STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach: the model is plain again, with the merged weights it has had all along."""
        if self.svd is not None:
            self.svd.detach()
            self.svd = None

    def _load(self, checkpoint: Path, svd: AttachedSVD) -> None:
        path = checkpoint / STATE_FILE
        if path.exists():
            svd.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            log.warning("%s has no %s: every matrix goes on in full mode", checkpoint, STATE_FILE)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
