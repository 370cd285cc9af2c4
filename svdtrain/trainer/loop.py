"""The training loop. Read `Trainer.fit` and `Trainer._train_step`: they are the documentation of a run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.optim.schedule import apply_schedule
from svdtrain.trainer.checkpoint import Checkpoint, CheckpointError, CheckpointStore, set_rng_state
from svdtrain.trainer.distributed import from_main
from svdtrain.trainer.errors import Preempted
from svdtrain.trainer.gradients import GradientAverager
from svdtrain.trainer.hooks import Hook, HookEngine
from svdtrain.trainer.saving import BackgroundSaver, hook_states, snapshot
from svdtrain.trainer.state import TrainState

Evaluator = Callable[[nn.Module], dict[str, float]]


class Trainer:
    """Trains `state.model` for `state.num_iterations` steps and calls the hooks on the way.

    Args:
        state: model on its device, data, run directory; `optimizer` still None.
        hooks: called in order of priority, then of this sequence.
        build_optimizer: model -> optimizer; called after on_setup, because hooks may replace parameters there.
        evaluate: model -> metrics such as {"val/bpb": 1.2}; the same on all ranks.
        compile_model: model -> the callable that the loop runs; the identity by default.
    """

    def __init__(
        self,
        state: TrainState,
        hooks: Sequence[Hook],
        *,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        evaluate: Evaluator,
        compile_model: Callable[[nn.Module], Any] = lambda model: model,
    ) -> None:
        self.state = state
        self.engine = HookEngine(hooks)
        state.engine = self.engine
        self._build_optimizer = build_optimizer
        self._evaluate = evaluate
        self._compile_model = compile_model
        train, world = state.config.train, state.world
        tokens_per_micro_batch = train.device_batch_size * state.config.model.max_seq_len * world.size
        self.num_micro_batches, remainder = divmod(train.total_batch_size, tokens_per_micro_batch)
        if remainder or self.num_micro_batches == 0:
            raise ValueError(
                f"--total-batch-size {train.total_batch_size} must be a multiple of device_batch_size x max_seq_len x "
                f"devices = {tokens_per_micro_batch}"
            )
        self.store = CheckpointStore(
            state.run.checkpoints_path, rank=world.rank, world_size=world.size, keep=train.keep_checkpoints
        )
        self.saver = BackgroundSaver(self.store, world)
        self._gradients: GradientAverager | None = None
        self._last_saved = -1  # step of the newest durable checkpoint
        self._last_evaluated = -1

    @property
    def saved(self) -> bool:
        """Whether the newest step is in a durable checkpoint."""
        return self._last_saved == self.state.step

    def fit(self, *, resume: bool = False) -> None:
        """Train to the end, or to a requested stop; with `resume`, from the newest checkpoint if there is one."""
        state = self.state
        try:
            self._prepare(resume)
            if state.step == 0 or _due(state.step, state.config.train.eval_every):
                self._run_evaluation()  # the first one, or one that a signal cut short
            self._heed_signal()
            while state.step < state.num_iterations and not state.control.stop:
                self._train_step()
                self._honour_requests()
            self._finish()
        except BaseException as error:
            state.world.let_go()
            self.engine.emit_isolated("on_exception", state, error)
            raise
        finally:
            self.saver.close()
            self.engine.close()

    def _prepare(self, resume: bool) -> None:
        state = self.state
        self.engine.emit("on_setup", state)
        state.optimizer = self._build_optimizer(state.model)
        self._gradients = GradientAverager(state.model.parameters(), state.world)
        checkpoint = self.store.load_latest(from_main=partial(from_main, world=state.world)) if resume else None
        if checkpoint:
            self.engine.load_state_dict(hook_states(checkpoint, state))
        self.engine.emit("on_restore", state)
        if checkpoint:
            self._load(checkpoint)
        state.check_optimizer_owns_trainables()
        state.forward = self._compile_model(state.model)
        self.engine.emit("on_train_start", state)
        if checkpoint:  # last of all, so that nothing above can use up random numbers
            set_rng_state(checkpoint.state["rng"], state.device)

    def _train_step(self) -> None:
        """One optimizer step, as the events in hooks.py tell it."""
        state, engine, optimizer = self.state, self.engine, self.state.optimizer
        started = time.perf_counter()
        state.control.skip_step = ""
        apply_schedule(optimizer, state.step, state.num_iterations, state.config.optim)
        engine.emit("on_step_start", state)
        state.loss = self._forward_backward()
        engine.emit("on_backward_end", state)
        self._clip_gradients()
        engine.emit("on_before_optimizer_step", state)
        engine.agree(state, "skip_step")
        stepped = not state.control.skip_step
        if stepped:
            optimizer.step()
        state.step += 1  # from here on the step counts: analyses, records and checkpoints carry its number
        engine.emit("on_optimizer_step_end", state, stepped)
        optimizer.zero_grad(set_to_none=True)
        state.model.zero_grad(set_to_none=True)  # also reaches weights that the optimizer trains through substitutes
        state.run_seconds += time.perf_counter() - started
        engine.emit("on_step_end", state)

    def _forward_backward(self) -> Tensor:
        """Gradients over all micro-batches and ranks; returns the mean loss of the step, [] on the device, in nats."""
        state = self.state
        inputs, targets = state.stream.batch(state.step, state.world.rank, state.world.size)
        inputs, targets = _to_device(inputs, state.device), _to_device(targets, state.device)
        total = torch.zeros((), device=state.device)
        assert self._gradients is not None
        pairs = zip(inputs.chunk(self.num_micro_batches), targets.chunk(self.num_micro_batches), strict=True)
        for number, (x, y) in enumerate(pairs, start=1):
            if number == self.num_micro_batches:
                self._gradients.arm()
            loss = state.forward(x, y) / self.num_micro_batches
            loss.backward()
            total += loss.detach()
            self.engine.emit_micro_batch_end(state)
        self._gradients.finish(total)
        return total

    def _clip_gradients(self) -> None:
        max_norm = self.state.config.optim.clip_grad_norm
        if max_norm > 0:
            owned = [p for group in self.state.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(owned, max_norm)

    def _honour_requests(self) -> None:
        """Evaluate, save or stop where the schedule or a hook on any rank asks for it."""
        state, train, control = self.state, self.state.config.train, self.state.control
        control.saving = "writing" if self.saver.busy else ""
        self.engine.agree(state, "evaluate", "save", "stop", "saving", "abort")
        if self.saver.uncollected and not control.saving:
            self._collect_save()
        if (control.evaluate or _due(state.step, train.eval_every)) and not control.ending:
            self._run_evaluation()
        if _due(state.step, train.save_every):
            control.request_save("due")
        # Not behind a vetoed step, whose weights may be broken: then behind the next one that is taken.
        if control.save and not (control.skip_step or control.ending or control.abort):
            self.save()
            control.save = ""
        control.evaluate = ""
        self._heed_signal()

    def _heed_signal(self) -> None:
        """A signal to any rank ends the run, but not behind a vetoed step, whose weights may be broken: the next step
        is taken, or the guard gives up."""
        control = self.state.control
        if control.ending and not control.skip_step:
            control.request_stop(f"preempted by signal {signal.Signals(control.ending).name}")

    def _finish(self) -> None:
        state = self.state
        if not state.control.stop:
            self._run_evaluation()
            self._heed_signal()
        state.stop_reason = state.control.stop or "finished"
        if self.saver.uncollected:
            self._collect_save()
        if self._last_saved != state.step and not (state.control.skip_step or state.control.abort):
            self.save(wait=True)
        self.engine.emit("on_stop", state)

    def _run_evaluation(self) -> None:
        """Evaluate once a step at most; cut short by a signal it leaves no trace and is done again after the resume."""
        state = self.state
        if self._last_evaluated == state.step:
            return
        state.model.eval()
        try:
            metrics = self._evaluate(state.model)
        except Preempted:
            return
        finally:
            state.model.train()
        self._last_evaluated = state.step
        state.log("eval", dict(metrics))
        self.engine.emit("on_evaluate_end", state, metrics)

    def save(self, *, wait: bool = False) -> None:
        """Begin to save a checkpoint of this moment; `wait`: until it is durable.

        A full disk raises an alert, not an error, as long as training goes on with the older ones.
        """
        state = self.state
        if self.saver.uncollected:
            self._collect_save()
        state.run.sync()
        self.saver.start(snapshot(state, evaluated=self._last_evaluated == state.step))
        if wait or not state.config.train.async_save:
            self._collect_save(last_chance=wait)

    def _collect_save(self, *, last_chance: bool = False) -> None:
        """Wait for the save that was started and tell how it went: the same on every rank at the same step."""
        state = self.state
        try:
            step, path = self.saver.collect()
        except CheckpointError as error:
            state.alert("CRITICAL", "checkpoint_failed", str(error))
            if last_chance:
                raise  # this work is lost: the user must see it
            return
        self._last_saved = step
        self.engine.emit("on_checkpoint_saved", state, str(path))

    def _load(self, checkpoint: Checkpoint) -> None:
        state = self.state
        state.model.load_state_dict(checkpoint.model)
        state.optimizer.load_state_dict(checkpoint.optimizer)
        state.step = state.resumed_from = checkpoint.step
        state.run_seconds = checkpoint.state["run_seconds"]
        state.metrics = dict(checkpoint.state["metrics"])
        self._last_saved = checkpoint.step
        self._last_evaluated = checkpoint.step if checkpoint.state["evaluated"] else -1


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a batch; from pinned memory and without waiting on a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
