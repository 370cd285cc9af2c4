"""Two processes share the analyses; each must end with the bases a single process finds."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from svdtrain.spectral.activations import collect_input_covariances
from svdtrain.spectral.settings import TrackerSettings
from svdtrain.spectral.tracking import SubspaceTracker
from tests.spectral.reference import gaussian

NAMES = ("a", "b", "c")


def weights(step: int) -> dict[str, torch.Tensor]:
    start = {name: gaussian(24, 20, seed=i).float() for i, name in enumerate(NAMES)}
    return {name: W + 0.01 * step * gaussian(24, 20, seed=9).float() for name, W in start.items()}


def tracked(group) -> tuple[dict, list]:
    tracker = SubspaceTracker(weights(0), dict.fromkeys(NAMES, 3), TrackerSettings(interval=2, oversample=4), group)
    for step in range(6):
        tracker.step(step, weights(step), weights(step + 1))
    return tracker.state_dict(), [(r.kind, r.step, r.values) for r in tracker.flush()]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    state, reports = tracked(dist.group.WORLD)
    layer = torch.nn.Linear(3, 2)
    with collect_input_covariances({"layer": layer}) as collector, torch.no_grad():
        layer(torch.full((2 + rank, 3), float(rank + 1)))
    collector.all_reduce()
    covariance = collector.result()["layer"]
    torch.save((state, reports, covariance.C, covariance.num_rows), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    torch.set_num_threads(1)
    state, reports = tracked(None)
    for rank in range(2):
        got, got_reports, C, num_rows = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert [r[:2] for r in got_reports] == [r[:2] for r in reports]
        for name in NAMES:
            torch.testing.assert_close(got["rows"][name], state["rows"][name])
        assert num_rows == 5
        torch.testing.assert_close(C, torch.full((3, 3), (2 * 1 + 3 * 4) / 5))
