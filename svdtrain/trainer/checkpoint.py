"""Checkpoints that survive a kill at any moment, and loading that never unpickles code.

    checkpoints/step_000500/
      model.safetensors       plain merged weights: any other program can load them
      optimizer_rank0.pt      tensors and primitives, torch.load(weights_only=True); the same on all ranks, so once
      state_rank0.pt          hooks, counters, random generators; one file a rank
      manifest.json           sizes and sha256 of the files above, and its own; written last
    checkpoints/latest        name of the newest durable checkpoint

A save writes to `step_000500.tmp`, flushes every file to the disk, renames the directory, then moves `latest`. A
directory without a manifest that verifies is no checkpoint; loading falls back to the newest that verifies and says so.
A step that is saved again steps aside as `step_000500.old` until its successor is in place.
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
NO_CHECKPOINT, NONE_WHOLE = -1, 1 << 50  # what rank 0 tells the others instead of a step


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory. `model` and `optimizer` are rank 0's to write, `state` is this rank's own."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    world_size: int = 1
    """Number of ranks that wrote it. A different number now: `state` is rank 0's."""


class CheckpointStore:
    """The checkpoints of one run.

    `at_stage` is called with the name of each stage of a save as it begins: the fault drills kill there.
    """

    def __init__(self, path: Path, *, rank: int = 0, world_size: int = 1, keep: int = 2) -> None:
        self.path = path
        self.rank = rank
        self.world_size = world_size
        self.keep = keep
        self.at_stage: Callable[[str], None] = lambda name: None
        self._known_whole: set[int] = set()

    def directory(self, step: int) -> Path:
        """Where a step's checkpoint is (or will be); the copy that stepped aside if a kill left only that one."""
        path = self.path / f"step_{step:06d}"
        aside = _aside(path)
        return aside if aside.exists() and not path.exists() else path

    def save(self, checkpoint: Checkpoint, *, any_rank: Callable[[bool], bool] = bool) -> Path:
        """Write a checkpoint; every rank calls this. Durable and read back when it returns.

        `any_rank` tells each rank whether any of them failed; with several ranks it also keeps them in step.
        Raises CheckpointError on every rank where the disk of one is full or not writable; older checkpoints stay.
        """
        final = self.path / f"step_{checkpoint.step:06d}"
        temporary = final.with_name(final.name + ".tmp")
        stages: list[Callable[[], None]] = [
            lambda: self._on_main(lambda: self._make_room(temporary)),
            lambda: self._write_files(temporary, checkpoint),  # the directory exists before any rank writes into it
            lambda: self._on_main(lambda: self._publish(temporary, final)),  # all files are there: list them
        ]
        for stage in stages:
            error = _error_of(stage)
            if any_rank(error is not None):
                self._on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
                what = (error.strerror or error) if error is not None else "another rank could not write"
                raise CheckpointError(
                    f"cannot save checkpoint {final}: {what}; free space or choose another --run-dir"
                ) from error
        self.at_stage("prune")
        self._on_main(self._prune)
        return final

    def _on_main(self, work: Callable[[], None]) -> None:
        if self.rank == 0:
            work()

    def _make_room(self, temporary: Path) -> None:
        self.at_stage("directory")
        for leftover in self.path.glob("step_*.tmp"):  # of saves that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        for aside in self.path.glob("step_*.old"):  # a kill left only the older copy: it takes its place again
            if not aside.with_suffix("").exists():
                os.replace(aside, aside.with_suffix(""))
        if len(self.steps()) > self.keep:  # a full disk kept the last save from doing it, and may still be full
            self._prune()
        temporary.mkdir(parents=True)

    def _write_files(self, directory: Path, checkpoint: Checkpoint) -> None:
        if self.rank == 0:
            self.at_stage("model")
            tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.model.items()}
            _write_safetensors(tensors, directory / "model.safetensors")
            self.at_stage("optimizer")
            _write_torch(checkpoint.optimizer, directory / "optimizer_rank0.pt")
        self.at_stage("state")
        _write_torch(checkpoint.state, directory / f"state_rank{self.rank}.pt")

    def _publish(self, temporary: Path, final: Path) -> None:
        """The manifest, then the directory's own name, then `latest`. A kill between any two leaves a whole one."""
        step = int(final.name[5:])
        self.at_stage("manifest")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT_VERSION, "step": step, "world_size": self.world_size, "files": files}
        atomic_write_text(temporary / "manifest.json", _manifest_text(manifest))
        self.at_stage("aside")
        if final.exists():
            shutil.rmtree(_aside(final), ignore_errors=True)
            os.replace(final, _aside(final))
        self.at_stage("rename")
        os.replace(temporary, final)
        fsync_directory(self.path)
        self.at_stage("latest")
        self._known_whole.discard(step)
        problem = self.verify(step)
        if problem:
            raise OSError(None, f"what was written does not read back: {problem}")
        self._known_whole.add(step)
        atomic_write_text(self.path / "latest", final.name + "\n")

    def _prune(self) -> None:
        """Remove what is older than the newest `keep` that verify; damaged ones do not count as kept."""
        num_whole = 0
        for step in reversed(self.steps()):
            directory = self.directory(step)
            if num_whole >= self.keep:
                shutil.rmtree(directory, ignore_errors=True)
            elif step in self._known_whole or not self.verify(step):
                self._known_whole.add(step)
                num_whole += 1
                shutil.rmtree(_aside(directory), ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint directory, ascending, verified or not."""
        found = self.path.glob("step_*") if self.path.is_dir() else []
        names = {p.name.removesuffix(".old")[5:] for p in found}
        return sorted(int(name) for name in names if name.isdigit())

    def verify(self, step: int) -> str:
        """Empty if the checkpoint is whole, else what is wrong with it. Raises CheckpointError for a newer format."""
        directory = self.directory(step)
        manifest = _read_manifest(directory)
        if manifest is None:
            return "its manifest is missing or damaged"
        for name, expected in manifest["files"].items():
            path = directory / name
            if not path.exists() or path.stat().st_size != expected["bytes"]:
                return f"{name} is missing or cut short"
            if _sha256(path) != expected["sha256"]:
                return f"{name} is damaged (sha256 differs)"
        return ""

    def newest_whole(self) -> int:
        """Step of the newest checkpoint that verifies, NO_CHECKPOINT if the run has none at all.

        Warns where it passes over a damaged one. Raises CheckpointError if there are some but none verifies: training
        never restarts at step 0 in silence.
        """
        steps = self.steps()
        for step in reversed(steps):
            problem = self.verify(step)
            if not problem:
                return step
            warnings.warn(f"checkpoint {self.directory(step)} is passed over: {problem}", stacklevel=3)
        if steps:
            raise CheckpointError(f"no checkpoint in {self.path} is whole; restore one or start with another --run-dir")
        return NO_CHECKPOINT

    def load_latest(self, *, from_main: Callable[[int], int] = int) -> Checkpoint | None:
        """The newest checkpoint that verifies; None if the run has none. Raises and warns as `newest_whole`.

        Rank 0 looks and `from_main` gives its answer to all ranks.
        """
        step, error = NO_CHECKPOINT, None
        if self.rank == 0:
            try:
                step = self.newest_whole()
            except CheckpointError as caught:
                step, error = NONE_WHOLE, caught
        step = from_main(step)
        if step == NONE_WHOLE:
            raise error or CheckpointError(f"no checkpoint in {self.path} can be used; rank 0 says why")
        return None if step == NO_CHECKPOINT else self.load(step)

    def load(self, step: int) -> Checkpoint:
        """Load one checkpoint onto the CPU. Written by another number of ranks, every rank gets rank 0's state."""
        directory = self.directory(step)
        manifest = _read_manifest(directory)
        if manifest is None:
            raise CheckpointError(f"{directory} is not visible here or its manifest is damaged; is --run-dir shared?")
        world_size = manifest["world_size"]
        rank = self.rank if world_size == self.world_size else 0
        options = {"map_location": "cpu", "weights_only": True}
        return Checkpoint(
            step=step,
            model=load_file(directory / "model.safetensors"),
            optimizer=torch.load(directory / "optimizer_rank0.pt", **options),
            state=torch.load(directory / f"state_rank{rank}.pt", **options),
            world_size=world_size,
        )


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _error_of(work: Callable[[], None]) -> OSError | None:
    try:
        work()
    except OSError as error:
        return error
    return None


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """None if it is missing or damaged: it holds the sha256 of its own contents, and nothing else is in the file."""
    try:
        text = (directory / "manifest.json").read_text()
        manifest = json.loads(text)
        claimed = manifest.pop("manifest_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if claimed == _manifest_digest(manifest) and manifest["format"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} was written by a newer version (format {manifest['format']}, known {FORMAT_VERSION}); "
            "update svdtrain"
        )
    return manifest if text == _manifest_text(manifest) else None


def _manifest_text(manifest: dict[str, Any]) -> str:
    return json.dumps({**manifest, "manifest_sha256": _manifest_digest(manifest)}, indent=2) + "\n"


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
