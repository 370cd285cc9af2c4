"""The surface of nanochat that is touched, found by looking at a checkout.

Two forms are known to work, of July 2026 (92d63d4: one optimizer, resumes) and of November 2025 (b399e43: two
optimizers, saves only). Anything that has the same names works; what is missing is named.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SETUP_NAMES = ("setup_optimizer", "setup_optimizers")
ATTENTION_ARGUMENTS = (("x", "ve", "cos_sin", "window_size", "kv_cache"), ("x", "cos_sin", "kv_cache"))


class UnsupportedNanochat(Exception):
    """This checkout lacks something that is needed; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """What is wrapped."""

    gpt: type
    setup_name: str
    """Which of SETUP_NAMES the GPT has."""
    checkpoints: ModuleType
    """nanochat.checkpoint_manager, with save_checkpoint and load_checkpoint."""
    dummy_wandb: type
    wandb: Any
    """The wandb module, with init."""


def enter_checkout(path: Path, script: str = "base_train") -> None:
    """Let `nanochat` and `scripts` be imported from this directory. Raises UnsupportedNanochat if it is no checkout, or
    one without this script."""
    for needed in ("nanochat/gpt.py", "nanochat/checkpoint_manager.py", "nanochat/common.py", "scripts/base_train.py"):
        if not (path / needed).is_file():
            raise UnsupportedNanochat(f"{path} is no nanochat checkout: {needed} is missing")
    if not (path / "scripts" / f"{script}.py").is_file():
        raise UnsupportedNanochat(f"--script {script}: this nanochat has no scripts/{script}.py")
    sys.path.insert(0, str(path))
    # A package called nanochat on the index is a stranger's; one imported before this point would shadow the checkout.
    for name in ("nanochat", "scripts"):
        spec = importlib.util.find_spec(name)
        where = list(spec.submodule_search_locations or []) if spec is not None else []
        if not where or Path(where[0]).resolve() != (path / name).resolve():
            raise UnsupportedNanochat(f"`import {name}` finds {where or 'nothing'} instead of {path / name}")


def find_surface() -> Surface:
    """Import what will be wrapped and check that it looks as expected. Raises UnsupportedNanochat."""
    gpt = _attribute(_import("nanochat.gpt"), "GPT")
    setup_names = [name for name in SETUP_NAMES if callable(getattr(gpt, name, None))]
    if len(setup_names) != 1:
        raise UnsupportedNanochat(
            f"nanochat.gpt.GPT must have one of {' and '.join(SETUP_NAMES)}, it has {setup_names}"
        )
    checkpoints = _import("nanochat.checkpoint_manager")
    for name in ("save_checkpoint", "load_checkpoint"):
        _require_parameters(_attribute(checkpoints, name), f"{checkpoints.__name__}.{name}", "checkpoint_dir", "step")
    dummy = _attribute(_import("nanochat.common"), "DummyWandb")
    for name in ("log", "finish"):
        _attribute(dummy, name)
    wandb = _import("wandb")
    _attribute(wandb, "init")
    return Surface(gpt=gpt, setup_name=setup_names[0], checkpoints=checkpoints, dummy_wandb=dummy, wandb=wandb)


@dataclass(frozen=True, kw_only=True)
class MixerSurface:
    """What is wrapped beside it where mixers take the place of attention."""

    gpt: type
    """GPT, with init_weights."""
    setup_name: str
    linear: type | None
    """The class of the matrices that GPT.num_matmul_params counts; None where there is no such count."""
    cache: type
    """nanochat.engine.KVCache, with prefill and reset, and `advance` or a number `pos`."""


def find_mixer_surface(surface: Surface) -> MixerSurface:
    """Check what mixers need of a checkout. Raises UnsupportedNanochat."""
    _attribute(surface.gpt, "init_weights")
    counts = hasattr(surface.gpt, "num_matmul_params")
    linear = _attribute(_import("nanochat.gpt"), "Linear") if counts else None
    cache = _attribute(_import("nanochat.engine"), "KVCache")
    for name in ("prefill", "reset", "get_pos"):
        _attribute(cache, name)
    if not hasattr(cache, "advance"):
        _check_lazy_cache(cache)
    if getattr(_import("nanochat.common"), "COMPUTE_DTYPE", None) is torch.float16:
        raise UnsupportedNanochat(
            "mixers do not run in float16: its loss scaling does not reach all of their gradients, and their states "
            "outgrow it; unset NANOCHAT_DTYPE, or set it to bfloat16 or float32"
        )
    return MixerSurface(gpt=surface.gpt, setup_name=surface.setup_name, linear=linear, cache=cache)


def _check_lazy_cache(cache: type) -> None:
    """Of November 2025: a number `pos`, and `kv_cache`, which is None until a layer puts keys in."""
    try:
        probe = cache(batch_size=1, num_heads=1, seq_len=1, head_dim=1, num_layers=1)
    except TypeError as error:
        raise UnsupportedNanochat(f"{cache.__module__}.KVCache has no `advance`, and {error}") from error
    for name in ("pos", "kv_cache"):
        if not hasattr(probe, name):
            raise UnsupportedNanochat(f"{cache.__module__}.KVCache: no attribute 'advance' nor {name!r}")


def advance_cache(cache: Any, num_tokens: int) -> None:
    """Move a cache's position on, as nanochat's attention does in the last layer."""
    if hasattr(cache, "advance"):
        cache.advance(num_tokens)
    else:
        cache.pos += num_tokens


def never_held_keys(cache: Any) -> bool:
    """Whether a cache allocates when the first keys come and none came: all layers are mixers."""
    return getattr(cache, "kv_cache", cache) is None


def blocks_of(model: Any) -> Any:
    """The layers of a GPT, each with `attn` and `mlp`. Raises UnsupportedNanochat."""
    blocks = _attribute(_attribute(model, "transformer"), "h")
    for block in blocks:
        _attribute(block, "attn")
    return blocks


def check_attention(attention: Any) -> None:
    """Whether a mixer can stand in for it. Raises UnsupportedNanochat."""
    names = tuple(inspect.signature(attention.forward).parameters)
    if names not in ATTENTION_ARGUMENTS:
        raise UnsupportedNanochat(
            f"{type(attention).__name__}.forward takes ({', '.join(names)}); known are "
            + " and ".join(f"({', '.join(known)})" for known in ATTENTION_ARGUMENTS)
        )


def adamw_group(setup_name: str, optimizer: Any) -> dict[str, Any]:
    """Settings of a group that this optimizer steps with AdamW. Raises UnsupportedNanochat."""
    for group in optimizer.param_groups:
        if "betas" in group:
            return {key: value for key, value in group.items() if key != "params"}
    raise UnsupportedNanochat(f"GPT.{setup_name}: no group of {type(optimizer).__name__} has betas, so none is AdamW's")


def split_optimizers(setup_name: str, result: Any) -> list[Any]:
    """The optimizers that a setup function returned. Raises UnsupportedNanochat if there are not one or two."""
    optimizers = list(result) if isinstance(result, (list, tuple)) else [result]
    if not 1 <= len(optimizers) <= 2 or not all(hasattr(o, "register_step_pre_hook") for o in optimizers):
        raise UnsupportedNanochat(
            f"GPT.{setup_name} returned {type(result).__name__} of {len(optimizers)}, not optimizers"
        )
    return optimizers


def uses_fp8(model: Any) -> bool:
    """Whether layers of this model multiply in 8 bits (nanochat tells them by the name of their class, too)."""
    return any("Float8" in type(module).__name__ for module in model.modules())


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedNanochat(f"cannot import {name}: {error}") from error


def _attribute(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        holder = owner if isinstance(owner, (ModuleType, type)) else type(owner)
        where = holder.__name__ if isinstance(holder, ModuleType) else f"{holder.__module__}.{holder.__qualname__}"
        raise UnsupportedNanochat(f"{where}: no attribute {name!r}")
    return getattr(owner, name)


def _require_parameters(function: Callable[..., Any], name: str, *wanted: str) -> None:
    missing = set(wanted) - set(inspect.signature(function).parameters)
    if missing:
        raise UnsupportedNanochat(f"{name} has no parameter {', '.join(sorted(missing))}")
