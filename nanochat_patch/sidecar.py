"""svd_*.pt beside nanochat's model_*.pt: modes, factors, moments and history. Tensors and primitives only.

nanochat's own files stay exactly as they are without us; W in them is the merged weight.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from svdtrain.adaptive import AttachedSVD

_MOST_SPLIT_ERROR = 1e-3  # W against W_p + B A: rounding gives 1e-7 in fp32 and 4e-3 x 1/sqrt(n) in bf16


class SidecarError(ValueError):
    """A sidecar cannot be used; the message says what to do."""


def sidecar_path(checkpoint_dir: str | Path, step: int) -> Path:
    """svd_000500.pt in the directory of nanochat's checkpoints."""
    return Path(checkpoint_dir) / f"svd_{step:06d}.pt"


def save(svd: AttachedSVD, checkpoint_dir: str | Path, step: int) -> Path:
    """Write it so that a kill leaves the old one or the new one."""
    path = sidecar_path(checkpoint_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    torch.save(svd.state_dict(), temporary)
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
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
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
