"""Two processes under a host that averages gradients inside its own step, as nanochat does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from nanochat_patch import ranks
from nanochat_patch.options import Launch, Options
from nanochat_patch.session import Session
from svdtrain.config import SVDConfig
from svdtrain.runlog import read_records

STEPS = 7
CASES = {
    "alone": None,
    "watched": SVDConfig(svd_switching=False, svd_interval=2),
    "switching": SVDConfig(svd_rule="original", svd_interval=2, svd_warmup=1, svd_min_rank=2),
}


class Averaging(torch.optim.SGD):
    """Averages into buffers of its own; p.grad stays this rank's share."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        own = []
        for group in self.param_groups:
            for p in group["params"]:
                own.append((p, p.grad))
                p.grad = p.grad.clone()
                dist.all_reduce(p.grad)
                p.grad.div_(dist.get_world_size())
        super().step(closure)
        for p, gradient in own:
            p.grad = gradient
        self.deal()

    def deal(self) -> None:
        """Every rank does all of the work here."""


class Dealing(Averaging):
    """Has each parameter stepped by one rank, which alone keeps its state and mixes it into p.grad, as nanochat of 2025
    does."""

    def deal(self) -> None:  # not in `step`: torch would run the hooks of both classes' steps
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            owner = number % dist.get_world_size()
            dist.broadcast(p.data, src=owner)
            if owner != dist.get_rank():
                del self.state[p]
            else:
                p.grad.lerp_(self.state[p]["momentum_buffer"], 0.9)


class Net(nn.Module):
    """Four square matrices under nanochat's names, and one that is not watched."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.ModuleDict({name: nn.Linear(24, 24, bias=False) for name in ("c_q", "c_k", "c_v", "c_proj")})
        self.head = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.attn.values():
            x = x + torch.tanh(layer(x))
        return self.head(x)


def train(
    config: SVDConfig | None, rank: int, directory: str, *, tear: bool = False, host: type[Averaging] = Averaging
) -> tuple[Net, list[str]]:
    model = Net()
    optimizer = host(model.parameters(), lr=0.3, momentum=0.8)
    changes: list[str] = []
    session = None
    if config is not None:
        session = Session(
            Options(launch=Launch(nanochat="x", run_dir=f"{directory}/run", rank_check="warn"), svd=config)
        )
        session.optimizer_built(model, "setup_optimizer", optimizer)
    for step in range(STEPS):
        x = torch.randn(32, 24, generator=torch.Generator().manual_seed(10 * step + rank))
        (model(x) - x.roll(1, dims=1)).square().mean().backward()
        optimizer.step()
        if tear and rank == 1 and step == 2:
            model.head.weight.data[3, 3] += 1e-6
        optimizer.zero_grad()
    if session is not None and session.svd is not None:
        changes = [str(change) for change in session.svd.changes] + [str(session.svd.metrics())]
        session.records.end("finished")
    return model, changes


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    import os

    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    try:
        for case, config in CASES.items():
            model, changes = train(config, rank, f"{directory}/{case}")
            assert ranks.differing(dict(model.named_parameters())) == [], case
            torch.save((model.state_dict(), changes), f"{directory}/{case}-{rank}.pt")
        dealt, changes = train(CASES["switching"], rank, f"{directory}/dealt", host=Dealing)
        assert any("low-rank" in change for change in changes)
        assert ranks.differing(dict(dealt.named_parameters())) == []
        torch.save(changes, f"{directory}/dealt-{rank}.pt")
        torn, _ = train(CASES["watched"], rank, f"{directory}/torn", tear=True)
        assert ranks.differing(dict(torn.named_parameters())) == ["head.weight"]
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks(tmp_path: Path) -> None:
    for case in (*CASES, "dealt", "torn"):
        (tmp_path / case).mkdir()
    multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    saved = {case: [torch.load(tmp_path / f"{case}-{rank}.pt") for rank in (0, 1)] for case in CASES}
    for name, value in saved["alone"][0][0].items():
        assert torch.equal(value, saved["watched"][0][0][name]), name
    assert saved["switching"][0][1] == saved["switching"][1][1]
    assert torch.load(tmp_path / "dealt-0.pt") == torch.load(tmp_path / "dealt-1.pt")
    assert any("low-rank" in change for change in saved["switching"][0][1])
    for name, value in saved["switching"][0][0].items():
        assert torch.equal(value, saved["switching"][1][0][name]), name
    alerts = [r for r in read_records(tmp_path / "torn" / "run" / "metrics.jsonl") if r["kind"] == "alert"]
    assert [(alert["rule"], alert["step"], alert["level"]) for alert in alerts] == [
        ("ranks_differ", 5, "CRITICAL"), ("ranks_differ", 7, "CRITICAL"),
    ]  # fmt: skip
    assert not [r for r in read_records(tmp_path / "watched" / "run" / "metrics.jsonl") if r["kind"] == "alert"]


def test_checksums_see_one_bit() -> None:
    a = {"w": torch.randn(5, 7), "b": torch.zeros(3, dtype=torch.bfloat16), "t": torch.randn(4, 6).T}
    b = {name: value.clone() for name, value in a.items()}
    assert torch.equal(ranks.checksums(a), ranks.checksums(b))
    b["w"][2, 3] = torch.nextafter(b["w"][2, 3], torch.tensor(9e9))
    assert (ranks.checksums(a) != ranks.checksums(b)).tolist() == [True, False, False]
    assert ranks.differing(a) == []
