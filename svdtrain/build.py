"""The one place where a run is put together from its configuration."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ssm_blocks.adapter import AttentionAdapter, mixer_factory
from ssm_blocks.mixer import non_matrix_parameters
from svdtrain.config import ModelConfig, RunConfig
from svdtrain.data.stream import Batch, PreparedData, ReplayStream, TokenStream, prepare, validation_batches
from svdtrain.evaluation import CoreBundle
from svdtrain.hooks.adaptive_svd import AdaptiveSVDHook
from svdtrain.hooks.alarm import AlarmHook
from svdtrain.hooks.alerts import AlertRules, Notifier
from svdtrain.hooks.console import ConsoleSink
from svdtrain.hooks.core_metric import CoreMetric
from svdtrain.hooks.forgetting import ForgettingHook
from svdtrain.hooks.guards import NonFiniteGuard
from svdtrain.hooks.preemption import Preemption
from svdtrain.hooks.rank_guard import RankGuard
from svdtrain.hooks.sample import SampleText
from svdtrain.hooks.sinks import JsonlSink
from svdtrain.hooks.train_log import TrainLog
from svdtrain.hooks.wandb_sink import WandbSink
from svdtrain.interrupts import leave_lost_rank
from svdtrain.model import GPT, GPTConfig, hardware_dtype
from svdtrain.model.attention import CausalSelfAttention, MixerFactory
from svdtrain.optim.muon_adamw import MuonAdamW
from svdtrain.optim.param_groups import build_param_groups
from svdtrain.optim.schedule import batch_lr_scale
from svdtrain.runlog import RunDirectory
from svdtrain.trainer.distributed import World, check_shared_directory, init_world, main_first
from svdtrain.trainer.evaluation import bits_per_byte_evaluator
from svdtrain.trainer.hooks import Hook
from svdtrain.trainer.loop import Trainer
from svdtrain.trainer.state import TrainState

PROMPTS = {"stdlib": ["def main("]}
DEFAULT_PROMPTS = ["The "]

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bf16 peak of a device whose name contains the key (vendors' datasheets)."""


def device_kind(name: str) -> torch.device:
    """The device that a setting names, without touching it. Raises ValueError if this machine has none of its kind."""
    mps = getattr(torch.backends, "mps", None)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": mps is not None and mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is no device; use auto, cpu, cuda, cuda:N or mps") from None
    if not available.get(device.type, False):
        there = [kind for kind, is_there in available.items() if is_there]
        raise ValueError(f"--device {name}: no such device here; available: {', '.join(there)}")
    return device


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Device of this process, made the current one. Raises ValueError if it is not there."""
    device = device_kind(name)
    if device.type == "cuda":
        index, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
        if device.index is None and count == 1 and "SLURM_LOCALID" in os.environ:
            index = 0  # Slurm showed this task its own GPU only (--gpus-per-task, --gpu-bind)
        if index >= count:
            raise ValueError(f"--device {name}: process {index} of this node, but only {count} CUDA device(s) here")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def build_trainer(
    config: RunConfig,
    run_path: Path,
    console: Console,
    *,
    extra_hooks: Sequence[Hook] = (),
    wrap_stream: Callable[[TokenStream], Any] = lambda stream: stream,
) -> Trainer:
    """Everything a run needs, ready for `Trainer.fit`; `extra_hooks` are your own, called after ours of equal priority.

    `wrap_stream` puts a training stream of your own in place of the plain one; it must have what ReplayStream uses.
    Raises ValueError where the configuration cannot work.
    """
    kind = device_kind(config.train.device).type  # without touching a device: not all ranks on the first one
    world = init_world(kind, on_loss=leave_lost_rank)
    device = resolve_device(config.train.device, world.local_rank)
    _set_arithmetic(device)
    _check_batch(config, world)
    _mixer_factory(config.model)  # what cannot work is said before text is prepared for minutes
    data = prepare_data(config, world, console)
    model = build_model(config, data.tokenizer.vocab_size, device)
    stream = TokenStream(
        data.train,
        batch_size=config.train.total_batch_size // config.model.max_seq_len,
        seq_len=config.model.max_seq_len,
        seed=config.train.seed,
    )
    state = TrainState(
        config=config,
        model=model,
        run=RunDirectory(run_path, writable=world.is_main),
        world=world,
        device=device,
        stream=ReplayStream(wrap_stream(stream)),
        tokenizer=data.tokenizer,
        num_iterations=config.train.num_iterations,
    )
    check_shared_directory(run_path, world)
    if world.is_main:
        data.tokenizer.save(state.run.tokenizer_path)  # so that a run can be moved without its cache
    _describe(state, model, data, console)
    trainer = Trainer(
        state,
        [*build_hooks(config, model, device, world, console, data), *extra_hooks],
        build_optimizer=_optimizer_builder(config, world),
        evaluate=_evaluator(config, data, state),
        compile_model=_compiler(config, device),
    )
    state.run.write_config(config.to_dict())
    return trainer


def build_model(config: RunConfig, vocab_size: int, device: torch.device) -> GPT:
    """The GPT with freshly drawn weights on its device; equal seeds give equal weights."""
    gpt_config = GPTConfig.from_depth(
        config.model.depth,
        vocab_size=vocab_size,
        sequence_len=config.model.max_seq_len,
        variant=config.model.variant,
        window_pattern=config.model.window_pattern,
    )
    dtypes = {"auto": hardware_dtype(device), "bf16": torch.bfloat16, "fp32": torch.float32}
    torch.manual_seed(config.train.seed)
    model = GPT(gpt_config, compute_dtype=dtypes[config.train.dtype], mixer_factory=_mixer_factory(config.model))
    model.init_weights()
    return model.to(device)


def _mixer_factory(config: ModelConfig) -> MixerFactory:
    """Attention, or what `ssm_blocks.mixer.mixer_class` knows by that name."""
    if config.mixer == "attention":
        return CausalSelfAttention
    return mixer_factory(config.mixer, CausalSelfAttention, config.mixer_pattern)


def build_hooks(
    config: RunConfig, model: GPT, device: torch.device, world: World, console: Console, data: PreparedData
) -> list[Hook]:
    """The hooks of a run, in registration order."""
    hooks: list[Hook] = [Preemption(), NonFiniteGuard()]
    if world.size > 1 and config.train.check_ranks_every:
        hooks.append(RankGuard(config.train.check_ranks_every))
    if config.svd.svd_preset != "off":
        svd = AdaptiveSVDHook(config.svd)
        if config.svd.svd_interference_every:
            forgetting = ForgettingHook(config.svd, svd, _control_rows(config, data))
            hooks += [forgetting, AlarmHook(config.svd, forgetting, svd)]  # before svd: see AlarmHook
        hooks.append(svd)
    peak_flops = world.size * _peak_flops(device)
    hooks.append(TrainLog(flops_per_token=model.estimate_flops_per_token(), peak_flops=peak_flops))
    log = config.log
    notifier = Notifier(command=log.alert_command, webhook=log.alert_webhook, level=log.alert_level)
    hooks.append(AlertRules(notifier if log.alert_command or log.alert_webhook else None))
    prompts = PROMPTS.get(config.data.data, DEFAULT_PROMPTS)
    hooks.append(SampleText(prompts, every=config.train.sample_every))
    if config.data.core_bundle:
        bundle = CoreBundle.read(Path(config.data.core_bundle).expanduser(), config.train.core_max_per_task)
        hooks.append(CoreMetric(bundle, every=config.train.core_every))
    hooks.append(JsonlSink())
    if log.wandb != "disabled":
        hooks.append(WandbSink(log.wandb, project=log.wandb_project, entity=log.wandb_entity))
    if world.is_main:
        hooks.append(ConsoleSink(console))
    return hooks


def prepare_data(config: RunConfig, world: World, console: Console) -> PreparedData:
    """Rank 0 tokenises into the cache, the others then find it there."""

    def run() -> PreparedData:
        return prepare(
            config.data.data,
            vocab_size=config.model.vocab_size,
            cache_dir=Path(config.data.cache_dir) if config.data.cache_dir else None,
            max_train_tokens=config.data.max_train_tokens,
            on_progress=lambda text: console.print(text, highlight=False, markup=False) if world.is_main else None,
        )

    return main_first(run, world)


def _control_rows(config: RunConfig, data: PreparedData) -> Callable[[int], Batch]:
    """Rows that are never trained on, spread over the validation text."""
    seq_len = config.model.max_seq_len

    def rows(num_rows: int) -> Batch:
        num_rows = min(num_rows, data.val.num_rows(seq_len))
        return validation_batches(data.val, num_rows, seq_len, num_tokens=num_rows * seq_len)[0]

    return rows


def _check_batch(config: RunConfig, world: World) -> None:
    rows_tokens = config.train.device_batch_size * config.model.max_seq_len * world.size
    if config.train.total_batch_size % rows_tokens:
        nearest = max(rows_tokens, round(config.train.total_batch_size / rows_tokens) * rows_tokens)
        raise ValueError(
            f"--total-batch-size {config.train.total_batch_size} is no multiple of device_batch_size x max_seq_len x "
            f"devices = {config.train.device_batch_size} x {config.model.max_seq_len} x {world.size} = {rows_tokens}; "
            f"try --total-batch-size {nearest}"
        )


def _optimizer_builder(config: RunConfig, world: World) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        scale = batch_lr_scale(config.train.total_batch_size)
        not_for_muon = {
            f"{prefix}.{name}"
            for prefix, block in model.named_modules()
            if isinstance(block, AttentionAdapter)
            for name in non_matrix_parameters(block)
        }
        groups = build_param_groups(model, config.optim, lr_scale=scale, non_matrices=not_for_muon)
        ranks = torch.distributed.group.WORLD if world.size > 1 else None
        return MuonAdamW(groups, ranks=ranks)

    return build


def _evaluator(config: RunConfig, data: PreparedData, state: TrainState) -> Callable[[nn.Module], dict[str, float]]:
    world = state.world

    def validation() -> Any:
        return validation_batches(
            data.val,
            batch_size=config.train.device_batch_size * world.size,
            seq_len=config.model.max_seq_len,
            num_tokens=config.train.eval_tokens,
            rank=world.rank,
            world_size=world.size,
        )

    return bits_per_byte_evaluator(
        validation,
        data.tokenizer.token_bytes(),
        device=state.device,
        world=world,
        between_batches=state.heed_signals,
    )


def _compiler(config: RunConfig, device: torch.device) -> Callable[[nn.Module], Any]:
    wanted = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    # dynamic=False: training shapes never change, so one graph serves the whole run
    return (lambda model: torch.compile(model, dynamic=False)) if wanted else (lambda model: model)


def _set_arithmetic(device: torch.device) -> None:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32 for what stays in fp32


def _peak_flops(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), 0.0)


def _describe(state: TrainState, model: GPT, data: PreparedData, console: Console) -> None:
    """Say what was derived from the one dial."""
    if not state.world.is_main:
        return
    config, counts = state.config, model.parameter_counts()
    tokens = state.num_iterations * config.train.total_batch_size
    where = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else platform.processor() or "cpu"
    lines = [
        f"model: depth {config.model.depth}, width {model.config.n_embd}, {counts['total']:,} parameters, "
        f"vocabulary {data.tokenizer.vocab_size:,}, {config.model.variant} variant",
        f"data: {config.data.data}, {data.train.num_tokens:,} training tokens, {data.val.num_tokens:,} for validation",
        f"training: {state.num_iterations:,} steps of {config.train.total_batch_size:,} tokens = {tokens:,} tokens, "
        f"on {state.world.size} x {state.device.type} ({where})",
        f"adaptive SVD: {config.svd.svd_preset} on {config.svd.svd_targets}, every {config.svd.svd_interval} steps",
        f"run directory: {state.run.path}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
