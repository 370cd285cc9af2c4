"""Low-rank mode takes the path of a plain autograd model that owns B and A."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adaptive_toy import batch, make_toy
from torch import Tensor, nn
from torch.func import functional_call

from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.config import SVDConfig

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
RANKS = {"h.0.attn.c_q": 7, "h.1.attn.c_proj": 3}


class Reference:
    """The same network with W_p + B A in the forward pass and B, A as autograd leaves."""

    def __init__(self, svd: AdaptiveSVD, model: nn.Module) -> None:
        self.model = model
        self.frozen: dict[str, Tensor] = {}
        self.factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name in RANKS:
            factors = svd.targets[name].factors
            assert factors is not None
            self.frozen[name] = factors.W_p.clone()
            self.factors[name] = (nn.Parameter(factors.B.detach().clone()), nn.Parameter(factors.A.detach().clone()))

    def parameters(self) -> list[nn.Parameter]:
        plain = [p for name, p in self.model.named_parameters() if name.removesuffix(".weight") not in RANKS]
        return plain + [factor for pair in self.factors.values() for factor in pair]

    def dense(self, name: str) -> Tensor:
        B, A = self.factors[name]
        return self.frozen[name] + B @ A

    def __call__(self, x: Tensor) -> Tensor:
        return functional_call(self.model, {f"{name}.weight": self.dense(name) for name in RANKS}, (x,))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_twenty_steps_equal_autograd_on_b_and_a(kind: str) -> None:
    model = make_toy(dtype=torch.float64)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    svd = AdaptiveSVD(model, optimizer, SVDConfig(svd_preset="off"))
    for name, r in RANKS.items():
        svd.set_mode(name, r)
    reference = Reference(svd, make_toy(dtype=torch.float64))
    reference_optimizer = OPTIMIZERS[kind](reference.parameters())

    for step in range(20):
        x, y = batch(step, dtype=torch.float64)
        (model(x) - y).square().mean().backward()
        svd.project_gradients()
        optimizer.step()
        svd.after_step(step)
        optimizer.zero_grad()
        (reference(x) - y).square().mean().backward()
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        reference.model.zero_grad()

    own = dict(model.named_parameters())
    for name, p in reference.model.named_parameters():
        short = name.removesuffix(".weight")
        expected = reference.dense(short) if short in RANKS else p
        torch.testing.assert_close(own[name], expected, rtol=0, atol=1e-10)
    for name, (B, A) in reference.factors.items():
        factors = svd.targets[name].factors
        assert factors is not None
        torch.testing.assert_close(factors.B, B, rtol=0, atol=1e-10)
        torch.testing.assert_close(factors.A, A, rtol=0, atol=1e-10)
        # it moved, and only in the plane of B and A
        start = dict(make_toy(dtype=torch.float64).named_parameters())[f"{name}.weight"]
        assert float((own[f"{name}.weight"] - start).detach().norm()) > 1e-3
