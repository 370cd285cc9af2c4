"""One vector for many parameters: the same steps as for each alone, on one rank and on several."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from nanochat_patch.flat import FlatParameters

SHAPES = ((7, 3), (5,), (2, 2, 2), (1,))
GROUP = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {f"p{i}": nn.Parameter(torch.randn(shape, generator=generator)) for i, shape in enumerate(SHAPES)}


def set_gradients(found: dict[str, nn.Parameter], step: int, rank: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    for p in found.values():
        p.grad = torch.randn(p.shape, generator=generator)


def expected(num_steps: int, num_ranks: int = 1) -> list[Tensor]:
    found = parameters()
    optimizer = torch.optim.AdamW(found.values(), **GROUP)
    for step in range(num_steps):
        grads = []
        for rank in range(num_ranks):
            set_gradients(found, step, rank)
            grads.append([p.grad for p in found.values()])
        for p, own in zip(found.values(), zip(*grads, strict=True), strict=True):
            p.grad = torch.stack(list(own)).mean(0)
        optimizer.step()
    return [p.detach() for p in found.values()]


def test_the_same_steps_as_for_each_alone() -> None:
    found = parameters()
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    flat = FlatParameters(found)
    flat.add_to(optimizer, GROUP)
    for step in range(4):
        set_gradients(found, step)
        optimizer.step()
        assert flat.vector.grad is None
    for p, want in zip(found.values(), expected(4), strict=True):
        torch.testing.assert_close(p.detach(), want)


def test_a_parameter_without_gradient_rests() -> None:
    found = parameters()
    before = {name: p.detach().clone() for name, p in found.items()}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    FlatParameters(found).add_to(optimizer, GROUP)
    set_gradients(found, 0)
    found["p1"].grad = None
    optimizer.step()
    assert [torch.equal(before[name], p) for name, p in found.items()] == [False, True, False, False]


def test_weights_may_change_between_steps() -> None:
    """As they do when a checkpoint is loaded."""
    found = parameters()
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    FlatParameters(found).add_to(optimizer, {**GROUP, "lr": 0.0})
    with torch.no_grad():
        found["p0"].fill_(3.0)
    set_gradients(found, 0)
    optimizer.step()
    assert torch.equal(found["p0"], torch.full((7, 3), 3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_types_that_do_not_fit_are_named(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="odd is"):
        FlatParameters({**parameters(), "odd": nn.Parameter(torch.zeros(2, dtype=dtype))})


class Sharded(torch.optim.Optimizer):
    """Each rank steps its part of dimension 0, as nanochat's distributed AdamW does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad is not None
                assert p.shape[0] % num_ranks == 0
                gradient = p.grad.clone()
                dist.all_reduce(gradient)
                mine = slice(rank * (len(p) // num_ranks), (rank + 1) * (len(p) // num_ranks))
                part = self.state[p].setdefault("part", nn.Parameter(p[mine].clone()))
                adamw = self.state[p].setdefault("adamw", torch.optim.AdamW([part], **GROUP))
                part.grad = gradient[mine] / num_ranks
                adamw.step()
                parts = [torch.empty_like(part) for _ in range(num_ranks)]
                dist.all_gather(parts, part.detach())
                p.copy_(torch.cat(parts))


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    try:
        found = parameters()
        optimizer = Sharded([nn.Parameter(torch.zeros(2))])
        optimizer.param_groups.clear()
        flat = FlatParameters(found, num_ranks=2)
        assert sum(p.numel() for p in found.values()) == 35
        assert flat.vector.numel() == 36
        flat.add_to(optimizer, GROUP)
        for step in range(4):
            set_gradients(found, step, rank)
            optimizer.step()
        for p, want in zip(found.values(), expected(4, num_ranks=2), strict=True):
            torch.testing.assert_close(p.detach(), want)
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_that_share_the_work(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
