"""Parameters that FSDP2 has sharded over two processes train as whole ones do in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adaptive_toy import batch, make_toy
from torch import multiprocessing, nn

from svdtrain.adaptive.attach import AttachedSVD, attach
from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.config import SVDConfig

Q, V = "h.0.attn.c_q", "h.1.attn.c_v"
STEPS = 9
CONFIG = SVDConfig(svd_interval=4, svd_warmup=0, svd_rule="original")


def start(model: nn.Module) -> tuple[torch.optim.Optimizer, AttachedSVD]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return optimizer, attach(model, optimizer, CONFIG)


def train(model: nn.Module, optimizer: Any, svd: AttachedSVD, parts: list[int], steps: range) -> None:
    """By hand: one matrix to low-rank at step 2, another at 3 and back at 6; the policy decides at 4 and 8."""
    for step in steps:
        for at, name, r in ((2, Q, 9), (3, V, 5), (6, V, None)):
            if step == at:
                svd.set_mode(name, r)
        x, y = batch(step)
        x, y = (torch.cat([t.chunk(2)[part] for part in parts]) for t in (x, y))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def sharded_toy() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_toy()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def other_writes_stay(model: nn.Module, optimizer: Any, svd: AttachedSVD, rank: int) -> bool:
    """A checkpoint loaded into the shards alone: the next merge undid it. Nothing is gathered twice without one."""
    svd.set_mode(Q, 9)
    train(model, optimizer, svd, [rank], range(1))
    assert svd._shards is not None
    assert not svd._shards.stale
    W: Any = svd._shards.sharded[Q]
    with torch.no_grad():
        W.mul_(2)
    doubled = W.detach().full_tensor().clone()
    train(model, optimizer, svd, [rank], range(1))
    return 0 < float((W.detach().full_tensor() - doubled).norm()) < 0.3 * float(doubled.norm())


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().clone() for name, p in model.state_dict().items()}


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    try:
        model = sharded_toy()
        optimizer, svd = start(model)
        train(model, optimizer, svd, [rank], range(STEPS - 2))
        saved = copy.deepcopy((whole_weights(model), optimizer.state_dict(), svd.state_dict()))
        train(model, optimizer, svd, [rank], range(STEPS - 2, STEPS))
        straight = whole_weights(model)

        other, (weights, moments, state) = sharded_toy(), saved
        resumed, svd_2 = start(other)
        with torch.no_grad():
            for name, p in other.named_parameters():
                p.copy_(torch.distributed.tensor.distribute_tensor(weights[name], p.device_mesh, p.placements))
        resumed.load_state_dict(moments)
        svd_2.load_state_dict(state)
        train(other, resumed, svd_2, [rank], range(STEPS - 2, STEPS))
        resumed_weights = whole_weights(other)
        assert other_writes_stay(other, resumed, svd_2, rank)
        with pytest.raises(ValueError, match=r"sharded .* use svdtrain\.attach"):
            AdaptiveSVD(other, torch.optim.AdamW(other.parameters()), CONFIG)
        with pytest.raises(ValueError, match="reregister does not work with sharded"):
            attach(other, torch.optim.AdamW(other.parameters()), SVDConfig(svd_adapter="reregister"))
        found = (straight, resumed_weights, [str(change) for change in svd.changes])
        torch.save(found, f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_shards_train_as_whole_matrices_and_resume(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    (first, resumed, changes_0), (second, _, changes_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert changes_0 == changes_1
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], resumed[name]) for name in first)
    model = make_toy()
    optimizer, svd = start(model)
    train(model, optimizer, svd, [0, 1], range(STEPS))
    assert [str(change) for change in svd.changes] == changes_0
    for name, p in model.state_dict().items():
        torch.testing.assert_close(first[name], p, rtol=0, atol=1e-4)
