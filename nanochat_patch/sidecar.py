"""svd_*.pt beside nanochat's model_*.pt: modes, factors, moments, history, mixers. Tensors and primitives only.

nanochat's own files stay exactly as they are without us; W in them is the merged weight.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nanochat_patch.options import ATTENTION, MixerConfig
from svdtrain.adaptive import AttachedSVD

_MOST_SPLIT_ERROR = 1e-3  # W against W_p + B A: rounding gives 1e-7 in fp32 and 4e-3 x 1/sqrt(n) in bf16
_LAYER_WEIGHT = re.compile(r"transformer\.h\.(\d+)\.")
_MIXER_WEIGHT = re.compile(r"transformer\.h\.(\d+)\.attn\.attn_mixer\.")


class SidecarError(ValueError):
    """A sidecar cannot be used; the message says what to do."""


def sidecar_path(checkpoint_dir: str | Path, step: int) -> Path:
    """svd_000500.pt in the directory of nanochat's checkpoints."""
    return Path(checkpoint_dir) / f"svd_{step:06d}.pt"


def save(svd: AttachedSVD, checkpoint_dir: str | Path, step: int, mixer: MixerConfig) -> Path:
    """Write it so that a kill leaves the old one or the new one."""
    path = sidecar_path(checkpoint_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    torch.save({**svd.state_dict(), **dataclasses.asdict(mixer)}, temporary)
    os.replace(temporary, path)
    return path


def load(svd: AttachedSVD, checkpoint_dir: str | Path, step: int) -> bool:
    """Restore modes, factors and moments; False where there is no sidecar.

    Raises SidecarError when it belongs to other settings or to other weights.
    """
    path = sidecar_path(checkpoint_dir, step)
    if not path.exists():
        return False
    device = next(iter(svd.targets.values())).W.device
    state = _read(path, device)
    try:
        svd.load_state_dict(state)
    except ValueError as error:
        raise SidecarError(f"{path}: {error}; or delete it to resume in full mode") from error
    for target in svd.targets.values():
        if target.factors is not None and target.factors.split_error() > _MOST_SPLIT_ERROR:
            raise SidecarError(
                f"{path} belongs to other weights than the checkpoint ({target.name} differs by "
                f"{target.factors.split_error():.2g}): the run was continued without this package, or saved by "
                "another run under the same tag; delete it to resume in full mode"
            )
    return True


def _read(path: Path, device: Any, **options: Any) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=device, weights_only=True, **options)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SidecarError(f"{path} cannot be read, it is damaged; delete it to resume in full mode") from error


def check_mixers(names: Iterable[str], config: MixerConfig, checkpoint_dir: str | Path, step: int) -> None:
    """Whether weights of these names were trained with the mixers that were asked for; the sidecar, where there is
    one, knows their kind. Raises SidecarError that says which flags fit."""
    names = list(names)
    held = sorted({int(found[1]) for name in names if (found := _MIXER_WEIGHT.search(name))})
    num_layers = len({found[1] for name in names if (found := _LAYER_WEIGHT.search(name))})
    kind, pattern = _trained_with(sidecar_path(checkpoint_dir, step))
    if held == config.layers(num_layers) and (kind is None or not held or kind == config.mixer):
        return
    if not held:
        flags = "without --mixer"
    elif kind is None:
        flags = f"with a mixer in layers {held} of {num_layers}"
    else:
        flags = f"with --mixer {kind} --mixer-pattern {pattern}"
    raise SidecarError(f"step {step} in {checkpoint_dir} was trained {flags}: give the same flags")


def _trained_with(path: Path) -> tuple[str | None, str]:
    if not path.exists():
        return None, ""
    state = _read(path, "cpu", mmap=True)
    return state.get("mixer", ATTENTION), state.get("mixer_pattern", "M")
