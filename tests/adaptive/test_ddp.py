"""Two processes under DistributedDataParallel stay identical and equal one process with both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adaptive_toy import batch, make_toy
from torch import multiprocessing

from svdtrain.adaptive.attach import attach
from svdtrain.config import SVDConfig

Q = "h.0.attn.c_q"
STEPS = 6
ADAPTERS = ("reregister", "shadow")


def train(model: torch.nn.Module, parts: list[int], adapter: str) -> list[str]:
    """Train on the named halves of each step's batch; switch by hand at step 2 and by the policy at 4."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = SVDConfig(svd_adapter=adapter, svd_interval=4, svd_warmup=0, svd_rule="original")  # type: ignore[arg-type]
    svd = attach(model, optimizer, config)
    for step in range(STEPS):
        if step == 2:
            svd.set_mode(Q, 9)
        x, y = batch(step)
        x, y = (torch.cat([t.chunk(2)[part] for part in parts]) for t in (x, y))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return [str(change) for change in svd.changes]


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    try:
        for adapter in ADAPTERS:
            model = torch.nn.parallel.DistributedDataParallel(make_toy())
            changes = train(model, [rank], adapter)
            torch.save((model.module.state_dict(), changes), f"{directory}/{adapter}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_ranks_agree_and_equal_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for adapter in ADAPTERS:
        (first, changes_0), (second, changes_1) = (torch.load(tmp_path / f"{adapter}-{rank}.pt") for rank in (0, 1))
        assert changes_0 == changes_1
        assert all(torch.equal(first[name], second[name]) for name in first)
        model = make_toy()
        changes = train(model, [0, 1], adapter)
        assert changes == changes_0
        for name, p in model.state_dict().items():
            torch.testing.assert_close(first[name], p, rtol=0, atol=1e-4)
