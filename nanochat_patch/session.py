"""One training run: attach when nanochat builds its optimizer, then records and checkpoints as they come."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nanochat_patch import ranks, sidecar
from nanochat_patch.compat import split_optimizers, uses_fp8
from nanochat_patch.options import Options, is_main_process
from nanochat_patch.records import RunRecords
from nanochat_patch.shield import GradientShield
from svdtrain.adaptive import AttachedSVD, attach
from svdtrain.adaptive.attach import register_first_post_hook

logger = logging.getLogger(__name__)


class Session:
    """What the patches call. One per process; `svd` is None until nanochat has built its optimizer."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.records = RunRecords(options.run_path, options.svd, options.mixer, writable=is_main_process())
        self.svd: AttachedSVD | None = None
        self._model: nn.Module | None = None
        self._resume_from: tuple[str, int] | None = None
        self._num_changes_seen = 0
        # nanochat shows INFO. Its optimizer state cannot be mapped to B and A, which would be said at every switch.
        logging.getLogger("svdtrain.adaptive.shadow").setLevel(logging.WARNING)

    # --- what the patches report ---

    def checkpoint_loaded(self, checkpoint_dir: str, step: int) -> None:
        """nanochat reads a checkpoint with its optimizer state: it is resuming."""
        self._resume_from = (checkpoint_dir, step)

    def check_mixers(self, checkpoint_dir: str, step: int, model_data: Mapping[str, Any]) -> None:
        """nanochat read these weights. Raises SidecarError if they were trained with other mixers."""
        sidecar.check_mixers(model_data, self.options.mixer, checkpoint_dir, step)

    def optimizer_built(self, model: nn.Module, setup_name: str, result: Any) -> None:
        """Attach to the optimizer of the matrices. Raises UnsupportedNanochat, or ValueError for settings that cannot
        work on this model."""
        if uses_fp8(model) and self.options.svd.svd_switching:
            raise ValueError(
                "fp8 layers quantise the weights that low-rank mode would write, which nobody has validated: add "
                "--no-svd-switching to watch only, or train without --fp8"
            )
        if self._resume_from is None and is_main_process() and self.records.holds_a_run:
            raise ValueError(
                f"--run-dir {self.records.path} already holds a run; choose another, or go on with nanochat's own "
                "--resume-from-step"
            )
        optimizers = split_optimizers(setup_name, result)
        optimizer = optimizers[-1]  # of two, the second is the one of the matrices
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._model = model
        optimizer.register_step_pre_hook(self._before_step)
        self.svd = self._attach(model, optimizer, shielded=distributed or len(optimizers) > 1, average=distributed)
        optimizer.register_step_post_hook(self._after_step)
        self._restore(self.svd)
        self.records.check_writable()
        doing = f"watching {len(self.svd.targets)} matrices" if self.svd.watching else "watching nothing"
        _say(f"{doing}; run directory {self.records.path}")

    def checkpoint_saved(self, checkpoint_dir: str, step: int) -> None:
        """nanochat saves a checkpoint: ours goes beside it, from one rank, as all hold the same."""
        if self.svd is not None and is_main_process():
            self.records.checkpoint(step, sidecar.save(self.svd, checkpoint_dir, step, self.options.mixer))

    # --- hooks of the step ---

    def _attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, shielded: bool, average: bool
    ) -> AttachedSVD:
        """The shield's hooks lie around those of `attach`, of which the post hook puts itself first."""
        shield = GradientShield({}, self._looks_at_gradients)
        if shielded:
            optimizer.register_step_pre_hook(shield.enter)
        svd = attach(model, optimizer, self.options.svd, log=_say, average_gradients=average)
        if shielded:
            optimizer.register_step_pre_hook(shield.leave)
            register_first_post_hook(optimizer, shield.show)  # before attach's own, which looks at the gradients
            shield.targets = {name: target.W for name, target in svd.targets.items()}
        return svd

    def _looks_at_gradients(self) -> bool:
        """The tracked engine looks between decisions, too: at every step, or where `attach` averages for it."""
        svd = self.svd
        assert svd is not None
        if svd.config.svd_engine == "exact":
            return svd.watching and svd.step % svd.config.svd_interval == 0
        return svd.watching and svd.gradients_agree(svd.step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.records.step_begins()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        svd = self.svd
        assert svd is not None
        step = svd.step  # steps completed, this one included; analyses go by the number before it
        for change in svd.changes[self._num_changes_seen :]:
            self.records.changed(step, change)
        self._num_changes_seen = len(svd.changes)
        for event in svd.events():
            self.records.alert(step, event["level"], "svd", f"{event['name']}: {event['message']}")
        if svd.watching and (step - 1) % svd.config.svd_interval == 0:
            self.records.analysed(step, svd.metrics())
            self._check_ranks(step)

    def _check_ranks(self, step: int) -> None:
        mode = self.options.launch.rank_check
        if mode == "off":
            return
        assert self._model is not None
        torn = ranks.differing(dict(self._model.named_parameters()))
        if not torn:
            return
        message = f"the ranks hold different weights in {len(torn)} tensors, e.g. {torn[0]}"
        logger.warning("step %d: %s", step, message)
        self.records.alert(step, "CRITICAL", "ranks_differ", message)
        if mode == "stop":
            raise RuntimeError(f"step {step}: {message}; restart from the last checkpoint (--rank-check warn goes on)")

    # --- resuming ---

    def _restore(self, svd: AttachedSVD) -> None:
        if self._resume_from is None:
            return
        checkpoint_dir, step = self._resume_from
        self.records.resumed_from = step
        if sidecar.load(svd, checkpoint_dir, step):
            _say(f"resumed at step {step} with {svd.summary()['num_lowrank']} of {len(svd.targets)} matrices low-rank")
            return
        svd.step = step
        path = sidecar.sidecar_path(checkpoint_dir, step)
        message = f"no sidecar {path.name} in {Path(checkpoint_dir)}: every matrix starts in full mode"
        logger.warning(message)
        self.records.alert(step, "WARNING", "no_sidecar", message)


def _say(line: str) -> None:
    if is_main_process():
        print(f"svd | {line}", flush=True)
