"""scripts/bench_nanochat.py on two processes of a CPU: a hundred steps with switches, after which the ranks agree."""

import json
from pathlib import Path

import pytest
from real_nanochat import ROOT, Nanochat, real_checkout

pytestmark = [pytest.mark.slow, pytest.mark.dist]
SIZES = {
    "depth": 2, "max-seq-len": 64, "device-batch-size": 2, "total-batch-size": 256, "vocab-size": 512,
    "interval": 12, "block-steps": 12, "warmup-steps": 12, "device-type": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("year", ["2026", "2025"])
def test_ranks_agree_after_a_hundred_steps_with_switches(year: str, tmp_path: Path) -> None:
    nanochat, out = Nanochat(year, real_checkout(year), tmp_path), tmp_path / "figures.json"
    bench = [ROOT / "scripts/bench_nanochat.py", "--nanochat", nanochat.path, "--json", out]
    bench += [f"--{name}={value}" for name, value in SIZES.items()]
    printed = nanochat.run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *bench)
    found = json.loads(out.read_text())
    assert (found["ranks"], found["num_targets"], found["num_changes"]) == (2, 8, 40)
    assert found["num_steps"] >= 100
    assert found["tensors_that_differ_between_ranks"] == []
    assert found["steps_at_which_ranks_differed"] == []
    watched = found["blocks"]["watched"]
    assert (watched["num_blocks"], watched["steps"]) == (2, 24)
    low, high = watched["relative_mean_of_blocks"]
    assert low <= watched["relative_mean"] <= high
    assert f"{watched['relative_mean']:.4f} ({low:.4f}-{high:.4f})" in printed
