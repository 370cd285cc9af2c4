"""The training loop. Read `Trainer.fit` and `Trainer._train_step`: they are the documentation of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.optim.schedule import apply_schedule
from svdtrain.trainer.checkpoint import Checkpoint, CheckpointError, CheckpointStore, rng_state, set_rng_state
from svdtrain.trainer.distributed import average_gradients, barrier
from svdtrain.trainer.hooks import Hook, HookEngine
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
        self._last_saved = -1
        self._last_evaluated = -1

    def fit(self, *, resume: bool = False) -> None:
        """Train to the end, or to a requested stop; with `resume`, from the newest checkpoint if there is one."""
        state = self.state
        try:
            self._prepare(resume)
            if state.step == 0:
                self._run_evaluation()
            while state.step < state.num_iterations and not state.control.stop:
                self._train_step()
                self._honour_requests()
            self._finish()
        except BaseException as error:
            self.engine.emit_isolated("on_exception", state, error)
            raise
        finally:
            self.engine.close()

    def _prepare(self, resume: bool) -> None:
        state = self.state
        self.engine.emit("on_setup", state)
        state.optimizer = self._build_optimizer(state.model)
        checkpoint = self.store.load_latest() if resume else None
        if checkpoint:
            self.engine.load_state_dict(checkpoint.state["hooks"])
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
        average_gradients(state.model.parameters(), state.world)
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
        """Accumulate gradients over the micro-batches; returns this rank's mean loss, [] on the device, in nats."""
        state = self.state
        inputs, targets = state.stream.batch(state.step, state.world.rank, state.world.size)
        inputs, targets = _to_device(inputs, state.device), _to_device(targets, state.device)
        total = torch.zeros((), device=state.device)
        for x, y in zip(inputs.chunk(self.num_micro_batches), targets.chunk(self.num_micro_batches), strict=True):
            loss = state.forward(x, y) / self.num_micro_batches
            loss.backward()
            total += loss.detach()
            self.engine.emit_micro_batch_end(state)
        return total

    def _clip_gradients(self) -> None:
        max_norm = self.state.config.optim.clip_grad_norm
        if max_norm > 0:
            owned = [p for group in self.state.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(owned, max_norm)

    def _honour_requests(self) -> None:
        """Evaluate, save or stop where the schedule or a hook on any rank asks for it."""
        state, train, control = self.state, self.state.config.train, self.state.control
        self.engine.agree(state, "evaluate", "save", "stop")
        if control.evaluate or _due(state.step, train.eval_every):
            self._run_evaluation()
        if control.save or _due(state.step, train.save_every):
            self.save()
        control.evaluate = control.save = ""

    def _finish(self) -> None:
        state = self.state
        state.stop_reason = state.control.stop or "finished"
        if self._last_evaluated != state.step and not state.control.stop:
            self._run_evaluation()
        if self._last_saved != state.step and not state.control.skip_step:
            self.save()
        self.engine.emit("on_stop", state)

    def _run_evaluation(self) -> None:
        state = self.state
        state.model.eval()
        metrics = self._evaluate(state.model)
        state.model.train()
        self._last_evaluated = state.step
        state.log("eval", dict(metrics))
        self.engine.emit("on_evaluate_end", state, metrics)

    def save(self) -> None:
        """Save a checkpoint now. A full disk raises an alert, not an error: training goes on with the older ones."""
        state = self.state
        checkpoint = Checkpoint(
            step=state.step,
            model=state.model.state_dict(),
            optimizer=state.optimizer.state_dict(),
            state={
                "hooks": self.engine.state_dict(),
                "rng": rng_state(state.device),
                "run_seconds": state.run_seconds,
                "metrics": dict(state.metrics),
            },
        )
        try:
            path = self.store.save(checkpoint, barrier=lambda: barrier(state.world))
        except CheckpointError as error:
            state.alert("CRITICAL", "checkpoint_failed", str(error))
            if state.step >= state.num_iterations or state.control.stop:
                raise  # the last chance to keep this work: the user must see it
            return
        self._last_saved = state.step
        self.engine.emit("on_checkpoint_saved", state, str(path))

    def _load(self, checkpoint: Checkpoint) -> None:
        state = self.state
        state.model.load_state_dict(checkpoint.model)
        state.optimizer.load_state_dict(checkpoint.optimizer)
        state.step = state.resumed_from = checkpoint.step
        state.run_seconds = checkpoint.state["run_seconds"]
        state.metrics = dict(checkpoint.state["metrics"])
        self._last_saved = self._last_evaluated = checkpoint.step


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a batch; from pinned memory and without waiting on a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
