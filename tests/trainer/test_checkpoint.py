"""Checkpoints: exact, verified, atomic."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from svdtrain.trainer import checkpoint
from svdtrain.trainer.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    _manifest_digest,
    rng_state,
    set_rng_state,
)


def make(step: int) -> Checkpoint:
    torch.manual_seed(step)
    return Checkpoint(
        step=step,
        model={"w": torch.randn(3, 4), "half": torch.randn(5).bfloat16()},
        optimizer={"state": {0: {"m": torch.randn(3, 4), "step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1}]},
        state={"hooks": {}, "rng": rng_state(torch.device("cpu"))},
    )


def test_round_trip_is_exact(tmp_path) -> None:
    store, saved = CheckpointStore(tmp_path), make(5)
    path = store.save(saved)
    assert path.name == "step_000005"
    assert (tmp_path / "latest").read_text() == "step_000005\n"
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded.step == 5
    for name, tensor in saved.model.items():
        assert loaded.model[name].dtype == tensor.dtype
        assert torch.equal(loaded.model[name], tensor)
    assert torch.equal(loaded.optimizer["state"][0]["m"], saved.optimizer["state"][0]["m"])


def test_no_checkpoint_is_none(tmp_path) -> None:
    assert CheckpointStore(tmp_path / "nowhere").load_latest() is None


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])  # of the manifest that is its last line break: damage all the same


def flip_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer_rank0.pt", "state_rank0.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_bit, lambda path: path.unlink()], ids=["truncate", "flip", "unlink"])
def test_damage_falls_back_to_the_newest_that_verifies(tmp_path, file: str, damage) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make(1))
    store.save(make(2))
    if file == "manifest.json" and damage is flip_bit:
        manifest = json.loads((tmp_path / "step_000002" / file).read_text())
        manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
        (tmp_path / "step_000002" / file).write_text(json.dumps(manifest))
    else:
        damage(tmp_path / "step_000002" / file)
    with pytest.warns(UserWarning, match="step_000002 is passed over"):
        loaded = store.load_latest()
    assert loaded is not None
    assert loaded.step == 1


def test_if_none_verifies_training_does_not_start_over_in_silence(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make(1))
    (tmp_path / "step_000001" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(CheckpointError, match="no checkpoint in"):
        store.load_latest()


def test_a_save_that_was_killed_leaves_no_checkpoint(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make(1))
    killed = tmp_path / "step_000002.tmp"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded.step == 1
    store.save(make(2))  # the leftovers do not disturb the next save
    assert store.verify(2) == ""


def test_only_the_newest_are_kept(tmp_path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        store.save(make(step))
    assert store.steps() == [3, 4]


def test_full_disk_is_one_error_and_older_checkpoints_stay(tmp_path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make(1))

    def full(*_args, **_kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        store.save(make(2))
    monkeypatch.undo()
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded.step == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_what_a_full_disk_left_too_many_of_goes_before_the_next_save(tmp_path, monkeypatch) -> None:
    """The third checkpoint was whole, but neither `latest` nor the pruning behind it was possible any more."""
    store = CheckpointStore(tmp_path)
    store.save(make(1))
    store.save(make(2))

    def full(path: Path, text: str) -> None:
        if path.name == "latest":
            raise OSError(28, "No space left on device")
        path.write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "atomic_write_text", full)
        with pytest.raises(CheckpointError, match="No space left"):
            store.save(make(3))
    assert store.steps() == [1, 2, 3]
    there: list[list[int]] = []
    store.at_stage = lambda name: there.append(store.steps()) if name == "model" else None
    store.save(make(4))
    assert there == [[2, 3]]


def test_a_newer_format_is_named_and_not_passed_over(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make(1))
    store.save(make(2))
    path = tmp_path / "step_000002" / "manifest.json"
    manifest = {**json.loads(path.read_text()), "format": 99}
    del manifest["manifest_sha256"]
    path.write_text(json.dumps({**manifest, "manifest_sha256": _manifest_digest(manifest)}))
    with pytest.raises(CheckpointError, match="newer version"):
        store.load_latest()


STAGES = ("directory", "model", "optimizer", "state", "manifest", "aside", "rename", "latest", "prune")


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("step", [2, 3], ids=["same-step-again", "new-step"])
def test_a_kill_at_any_stage_leaves_a_whole_newest_checkpoint(tmp_path, stage: str, step: int) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make(1))
    store.save(make(2))

    def kill(name: str) -> None:
        if name == stage:
            raise Killed

    store.at_stage = kill
    with pytest.raises(Killed):
        store.save(make(step))
    after = CheckpointStore(tmp_path)
    loaded = after.load_latest()
    assert loaded is not None
    durable = stage in ("latest", "prune")
    assert loaded.step == (step if durable else 2)
    assert torch.equal(loaded.model["w"], make(loaded.step).model["w"])
    after.save(make(4))  # and the run goes on from there
    assert after.verify(4) == ""
    assert len(after.steps()) == 2
    assert {p.suffix for p in tmp_path.glob("step_*")} == {""}  # no .old, no .tmp left


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(make(1))
    store.save(make(2))
    truncate(tmp_path / "step_000002" / "model.safetensors")
    CheckpointStore(tmp_path, keep=2).save(make(3))
    assert store.verify(1) == store.verify(3) == ""


def test_what_does_not_read_back_is_an_error_and_nothing_is_pruned(tmp_path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(make(1))
    store.save(make(2))
    store.at_stage = lambda name: truncate(tmp_path / "step_000003" / "model.safetensors") if name == "latest" else None
    with pytest.raises(CheckpointError, match="does not read back"):
        store.save(make(3))
    assert (tmp_path / "latest").read_text() == "step_000002\n"
    assert store.verify(1) == store.verify(2) == ""


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make(1))
    path = tmp_path / "step_000001" / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        for bit in (1, 64):
            data = bytearray(whole)
            data[position] ^= bit
            path.write_bytes(bytes(data))
            meaning = json.loads(whole)
            try:
                same = json.loads(bytes(data)) == meaning  # white space between the values means nothing
            except ValueError:
                same = False
            assert same or store.verify(1) != "", (position, bit)


def test_random_generators_go_on_where_they_were(tmp_path) -> None:
    device = torch.device("cpu")
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn()  # leaves a cached second gaussian in both
    torch.save(rng_state(device), tmp_path / "rng.pt")

    def draw() -> tuple:
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()

    expected = draw()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True), device)
    assert draw() == expected
