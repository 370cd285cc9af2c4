"""Two processes under DistributedDataParallel stay identical and equal one process with both batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adaptive_toy import batch, make_toy
from torch import multiprocessing, nn

from svdtrain.adaptive.attach import attach
from svdtrain.config import SVDConfig

Q = "h.0.attn.c_q"
STEPS = 6
CASES = ("reregister", "shadow", "averaging host")


class Averaging(torch.optim.AdamW):
    """Averages the gradients over the ranks inside its own step; before it, every rank has its own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if dist.is_initialized():
            for group in self.param_groups:
                for p in group["params"]:
                    dist.all_reduce(p.grad)
                    p.grad.div_(dist.get_world_size())
        super().step(closure)


def train(model: nn.Module, parts: list[int], case: str) -> list[str]:
    """Train on the named halves of each step's batch; switch by hand at step 2 and by the policy at 4."""
    inside = case == "averaging host"
    optimizer = (Averaging if inside else torch.optim.AdamW)(model.parameters(), lr=0.01)
    adapter = "reregister" if case == "reregister" else "shadow"
    config = SVDConfig(svd_adapter=adapter, svd_interval=4, svd_warmup=0, svd_rule="original")
    svd = attach(model, optimizer, config, average_gradients=inside)
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
        for case in CASES:
            plain = make_toy()
            model = plain if case == "averaging host" else nn.parallel.DistributedDataParallel(plain)
            changes = train(model, [rank], case)
            torch.save((plain.state_dict(), changes), f"{directory}/{case}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_ranks_agree_and_equal_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for case in CASES:
        (first, changes_0), (second, changes_1) = (torch.load(tmp_path / f"{case}-{rank}.pt") for rank in (0, 1))
        assert changes_0 == changes_1, case
        assert all(torch.equal(first[name], second[name]) for name in first), case
        model = make_toy()
        changes = train(model, [0, 1], case)
        assert changes == changes_0, case
        for name, p in model.state_dict().items():
            torch.testing.assert_close(first[name], p, rtol=0, atol=1e-4)
