"""Adaptive SVD in Lightning: one callback, saved and resumed inside Lightning's own checkpoints."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from svdtrain.adaptive.attach import AttachedSVD, attach
from svdtrain.config import SVDConfig

log = logging.getLogger(__name__)


class SVDCallback(Callback):
    """`Trainer(callbacks=[SVDCallback()])`; logs the metrics of each analysis through the module's logger.

    Raises ValueError for a module with several optimizers: attach to the right one yourself; and for
    svd_adapter=reregister, under which the trainer's clipping would miss low-rank matrices. `svd` is the attached
    method while training runs.
    """

    def __init__(self, config: SVDConfig | None = None) -> None:
        self.config = config
        self.svd: AttachedSVD | None = None
        self._saved: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        """What a checkpoint gets that is saved after `fit`."""
        if config is not None and config.svd_adapter == "reregister":
            raise ValueError("svd_adapter=reregister does not work in Lightning's loop; leave it at auto")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizer; where Lightning resumed, take up the saved state."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"SVDCallback works with one optimizer, this module has {len(trainer.optimizers)}; "
                "call svdtrain.attach in on_train_start for the one you mean"
            )
        if self.svd is not None:  # an earlier fit ended in an exception
            self.svd.detach()
        self.svd, self._last = attach(pl_module, trainer.optimizers[0], self.config), {}
        if self._saved is not None:
            self.svd.load_state_dict(self._saved)
            self._saved = None
        elif trainer.global_step > 0:
            log.warning("training goes on without a state of the method: every matrix starts in full mode")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the last analysis whenever the trainer logs."""
        if self.svd is not None and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(self.svd.metrics())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach: the model is plain again."""
        if self.svd is not None:
            self._last = self.svd.state_dict()
            self.svd.detach()
            self.svd = None

    def state_dict(self) -> dict[str, Any]:
        """Saved by Lightning inside its checkpoint."""
        return self.svd.state_dict() if self.svd is not None else self._last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts: the optimizer does not exist yet."""
        self._saved = state_dict or None
