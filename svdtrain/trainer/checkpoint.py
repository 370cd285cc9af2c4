"""Checkpoints that survive a kill at any moment, and loading that never unpickles code.

    checkpoints/step_000500/
      model.safetensors       plain merged weights: any other program can load them
      optimizer_rank0.pt      tensors and primitives, torch.load(weights_only=True)
      state_rank0.pt          hooks, counters, random generators
      manifest.json           sizes and sha256 of the files above, written last
    checkpoints/latest        name of the newest durable checkpoint

A save writes to `step_000500.tmp`, flushes every file to the disk, renames the directory, then moves `latest`. A
directory without a manifest that verifies is no checkpoint; loading falls back to the newest that verifies and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdtrain.runlog import atomic_write_text, fsync_directory

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory. `optimizer` and `state` are this rank's own."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, path: Path, *, rank: int = 0, world_size: int = 1, keep: int = 2) -> None:
        self.path = path
        self.rank = rank
        self.world_size = world_size
        self.keep = keep

    def directory(self, step: int) -> Path:
        return self.path / f"step_{step:06d}"

    def save(self, checkpoint: Checkpoint, *, barrier: Callable[[], None] = lambda: None) -> Path:
        """Write a checkpoint; every rank calls this. Durable when it returns.

        Raises CheckpointError where the disk is full or not writable; older checkpoints stay as they are.
        """
        final, temporary = self.directory(checkpoint.step), self.path / f"step_{checkpoint.step:06d}.tmp"
        try:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            barrier()  # the directory exists before any rank writes into it
            self._write_files(temporary, checkpoint)
            barrier()  # all files are on disk before the manifest lists them
            if self.rank == 0:
                self._publish(temporary, final, checkpoint.step)
            barrier()  # nobody goes on before the checkpoint is durable
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"cannot save checkpoint {final}: {error.strerror or error}; free space or choose another --run-dir"
            ) from error
        return final

    def _write_files(self, directory: Path, checkpoint: Checkpoint) -> None:
        if self.rank == 0:
            tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.model.items()}
            _write_safetensors(tensors, directory / "model.safetensors")
        _write_torch(checkpoint.optimizer, directory / f"optimizer_rank{self.rank}.pt")
        _write_torch(checkpoint.state, directory / f"state_rank{self.rank}.pt")

    def _publish(self, temporary: Path, final: Path, step: int) -> None:
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT_VERSION, "step": step, "world_size": self.world_size, "files": files}
        atomic_write_text(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        if final.exists():  # the same step saved twice: the older copy steps aside until the new one is in place
            shutil.rmtree(final)
        os.replace(temporary, final)
        fsync_directory(self.path)
        atomic_write_text(self.path / "latest", final.name + "\n")
        self._prune()

    def _prune(self) -> None:
        """Remove the oldest checkpoints beyond `keep`; those that do not verify do not count as kept."""
        steps = sorted(self.steps(), reverse=True)
        for step in steps[self.keep :]:
            shutil.rmtree(self.directory(step), ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint directory, ascending, verified or not."""
        found = self.path.glob("step_*") if self.path.is_dir() else []
        return sorted(int(p.name[5:]) for p in found if p.name[5:].isdigit())

    def verify(self, step: int) -> str:
        """Empty if the checkpoint is whole, else what is wrong with it."""
        directory = self.directory(step)
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
        except (OSError, ValueError):
            return "its manifest is missing or unreadable"
        if manifest.get("format", 0) > FORMAT_VERSION:
            return f"it was written by a newer version (format {manifest['format']}, known {FORMAT_VERSION}); update"
        for name, expected in manifest["files"].items():
            path = directory / name
            if not path.exists() or path.stat().st_size != expected["bytes"]:
                return f"{name} is missing or cut short"
            if _sha256(path) != expected["sha256"]:
                return f"{name} is damaged (sha256 differs)"
        return ""

    def load_latest(self) -> Checkpoint | None:
        """Newest checkpoint that verifies; None if the run has none at all.

        Warns where it passes over a damaged one. Raises CheckpointError if there are some but none verifies: training
        never restarts at step 0 in silence.
        """
        steps = self.steps()
        for step in reversed(steps):
            problem = self.verify(step)
            if not problem:
                return self.load(step)
            warnings.warn(f"checkpoint {self.directory(step)} is passed over: {problem}", stacklevel=2)
        if steps:
            raise CheckpointError(f"no checkpoint in {self.path} is whole; restore one or start with another --run-dir")
        return None

    def load(self, step: int) -> Checkpoint:
        """Load one checkpoint onto the CPU."""
        directory = self.directory(step)
        load = {"map_location": "cpu", "weights_only": True}
        return Checkpoint(
            step=step,
            model=load_file(directory / "model.safetensors"),
            optimizer=torch.load(directory / f"optimizer_rank{self.rank}.pt", **load),
            state=torch.load(directory / f"state_rank{self.rank}.pt", **load),
        )


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except Exception as error:  # safetensors reports a full disk as its own error type
        raise OSError(None, str(error)) from error
    _fsync_file(path)


def _write_torch(value: Any, path: Path) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:  # torch reports a full disk as RuntimeError
        raise OSError(None, str(error).splitlines()[0]) from error
    _fsync_file(path)


def _fsync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every random generator, as tensors and primitives."""
    version, internal, gauss = random.getstate()
    numpy_name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [
            numpy_name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
