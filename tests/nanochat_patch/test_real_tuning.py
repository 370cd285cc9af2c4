"""nanochat's fine-tuning: by itself on a model that switched, and through the launcher on a model with mixers."""

import math
import re
from pathlib import Path

import pytest
import torch
from real_nanochat import SWITCHED_STEPS, TAG, VOCAB_SIZE, Nanochat
from real_tasks import write_tasks
from test_real_training import records

pytestmark = pytest.mark.slow
MIXED = ["--mixer", "neg_deltanet", "--mixer-pattern", "MA"]
STEPS = 4


def tuning(nanochat: Nanochat) -> list[tuple[str, str, list[str]]]:
    """(script, where it saves, flags) of each stage from a base model under TAG to one that chats."""
    if nanochat.year == "2026":
        sizes = {"max-seq-len": 256, "device-batch-size": 2, "total-batch-size": 512, "eval-tokens": 512}
        settings = {**sizes, "model-tag": TAG, "num-iterations": STEPS + 1, "chatcore-every": -1, "device-type": "cpu"}
        return [("chat_sft", "chatsft_checkpoints", [f"--{name}={value}" for name, value in settings.items()])]
    middle = {"model_tag": TAG, "max_seq_len": 64, "device_batch_size": 2, "total_batch_size": 128, "eval_tokens": 256}
    end = {"device_batch_size": 2, "target_examples_per_step": 2, "eval_steps": 2, "eval_metrics_max_problems": 4}
    both = {"num_iterations": STEPS + 1, "device_type": "cpu"}
    return [
        ("mid_train", "mid_checkpoints", [f"--{name}={value}" for name, value in {**middle, **both}.items()]),
        ("chat_sft", "chatsft_checkpoints", [f"--{name}={value}" for name, value in {**end, **both}.items()]),
    ]


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"(?:\| loss|Training loss): ([\d.]+|nan)", printed)]


def tuned(nanochat: Nanochat, directory: str) -> dict[str, torch.Tensor]:
    return torch.load(nanochat.base / directory / TAG / f"model_{STEPS:06d}.pt", weights_only=True)


@pytest.fixture
def with_tasks(nanochat: Nanochat, tmp_path: Path) -> Nanochat:
    """The checkout with a base directory of its own: text and tokenizer as before, and fine-tuning's data."""
    base = tmp_path / "base"
    write_tasks(base)
    for name in ("base_data", "base_data_climbmix", "tokenizer"):
        (base / name).symlink_to(nanochat.base / name)
    return Nanochat(nanochat.year, nanochat.path, base)


def test_a_switched_model_is_tuned_without_this_package(with_tasks: Nanochat, switched: tuple[Nanochat, Path]) -> None:
    (with_tasks.base / "base_checkpoints").symlink_to(switched[0].base / "base_checkpoints")
    before = switched[0].weights(TAG, SWITCHED_STEPS)
    for script, directory, flags in tuning(with_tasks):
        found = losses(with_tasks.alone(script, *flags))
        assert len(found) == STEPS
        assert all(0 < loss < 2 * math.log(VOCAB_SIZE) for loss in found), found  # a few steps teach nothing
        after = tuned(with_tasks, directory)
        assert list(after) == list(before)
        assert not torch.equal(after["transformer.h.0.attn.c_q.weight"], before["transformer.h.0.attn.c_q.weight"])
        assert not list((with_tasks.base / directory / TAG).glob("svd_*"))
        before = after
    answered = with_tasks.alone("chat_cli", "-i", "sft", "-g", TAG, "-p", "The", "--device-type", "cpu")
    assert "Assistant:" in answered


def test_a_model_with_mixers_is_tuned_through_the_launcher(with_tasks: Nanochat, tmp_path: Path) -> None:
    with_tasks.train_patched(tmp_path / "base-run", MIXED, num_iterations=6, eval_every=6, model_tag=TAG)
    for script, directory, flags in tuning(with_tasks):
        run_dir = tmp_path / script
        ours = [*MIXED, "--svd-interval", "2", "--run-dir", str(run_dir)]
        found = losses(with_tasks.patched(script, ours, *flags))
        assert len(found) == STEPS
        recorded = [record["train/loss"] for record in records(run_dir, "train")]
        assert recorded == pytest.approx(found, abs=1e-6)
        assert [record["step"] for record in records(run_dir, "svd")] == [1, 3]
        held = tuned(with_tasks, directory)
        assert any(".attn_mixer." in name for name in held)
        assert (with_tasks.base / directory / TAG / f"svd_{STEPS:06d}.pt").exists()
    said = ("-i", "sft", "-g", TAG, "-p", "The", "--device-type", "cpu")
    assert "Assistant:" in with_tasks.patched("chat_cli", MIXED, *said)
    scored = with_tasks.patched("chat_eval", MIXED, "-i", "sft", "-g", TAG, "-a", "MMLU", "-x", "8")
    assert re.search(r"MMLU accuracy: [\d.]+%", scored)
