"""A GPT-shaped toy: attention and MLP projections under the names that the target selection knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.adaptive.attach import AttachedSVD, attach
from svdtrain.config import SVDConfig

WIDTH = 20
Q = "h.0.attn.c_q"
WATCHED_BY_HAND: dict[str, Any] = {"svd_preset": "off"}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_v = nn.Linear(width, width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(torch.tanh(self.c_q(x)) * self.c_v(x))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(torch.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Toy(nn.Module):
    """Input and target are [batch, WIDTH]; the loss is the mean squared error."""

    def __init__(self, depth: int = 2, width: int = WIDTH) -> None:
        super().__init__()
        self.h = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return self.head(x)


def make_toy(seed: int = 0, *, dtype: torch.dtype = torch.float32, depth: int = 2) -> Toy:
    torch.manual_seed(seed)
    return Toy(depth).to(dtype)


def batch(step: int, *, dtype: torch.dtype = torch.float32, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(2 * x.roll(1, dims=1)).to(dtype)


def backward(model: nn.Module, step: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(step, dtype=dtype)
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def attached(seed: int = 0, **settings: Any) -> tuple[Toy, torch.optim.Optimizer, AttachedSVD]:
    model = make_toy(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, optimizer, attach(model, optimizer, SVDConfig(**{**WATCHED_BY_HAND, **settings}))


def one_step(model: Toy, optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    optimizer.zero_grad()
    backward(model, step)
    optimizer.step()


def relative(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())
