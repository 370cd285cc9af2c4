"""What goes wrong with re-registration in a loop that is not ours, and what shadow does instead."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adaptive_toy import Toy, backward, batch, make_toy
from torch import Tensor, fx

from svdtrain.adaptive.attach import AttachedSVD, attach
from svdtrain.config import SVDConfig

Q = "h.0.attn.c_q"
ADAPTERS = ["reregister", "shadow"]


def attached(adapter: str, lr: float = 0.05) -> tuple[Toy, torch.optim.Optimizer, AttachedSVD]:
    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    svd = attach(model, optimizer, SVDConfig(svd_preset="off", svd_adapter=adapter))  # type: ignore[arg-type]
    svd.set_mode(Q, 6)
    return model, optimizer, svd


def expected_update(svd: AttachedSVD, G: Tensor, lr: float) -> Tensor:
    """W after one SGD step of B and A under G, from the definitions."""
    factors = svd.targets[Q].factors
    assert factors is not None
    B, A = factors.B.detach(), factors.A.detach()
    return factors.W_p + (B - lr * G @ A.T) @ (A - lr * B.T @ G)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_zero_grad_of_the_optimizer_is_enough(adapter: str) -> None:
    """Re-registered, W is not in the optimizer, so its zero_grad misses W.grad, which would add up for ever."""
    model, optimizer, svd = attached(adapter)
    W = svd.targets[Q].W
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        fresh = copy.deepcopy(model)
        fresh.zero_grad()
        backward(fresh, step)
        assert torch.equal(W.grad, fresh.h[0].attn.c_q.weight.grad)
        optimizer.step()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_accumulated_micro_batches_are_one_step(adapter: str) -> None:
    model, optimizer, svd = attached(adapter)
    for step in (0, 3):
        optimizer.zero_grad()
        for micro in range(3):
            x, y = batch(step + micro)
            ((model(x) - y).square().mean() / 3).backward()
        G = svd.targets[Q].W.grad.clone()
        wanted = expected_update(svd, G, 0.05)
        optimizer.step()
        torch.testing.assert_close(svd.targets[Q].W.detach(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_clipping_over_the_models_parameters_reaches_the_factors(adapter: str) -> None:
    model, optimizer, svd = attached(adapter)
    backward(model, 0)
    G = svd.targets[Q].W.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert float(norm) > 0.02
    wanted = expected_update(svd, G * (0.01 / (norm + 1e-6)), 0.05)
    optimizer.step()
    torch.testing.assert_close(svd.targets[Q].W.detach(), wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_with_shadow(unscale: bool, fused: bool) -> None:
    """Scaled gradients give the update of unscaled ones; fused optimizers unscale inside their kernel."""
    results = []
    for scaled in (False, True):
        model = make_toy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        svd = attach(model, optimizer, SVDConfig(svd_preset="off"))
        svd.set_mode(Q, 6)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for step in range(4):
            optimizer.zero_grad()
            x, y = batch(step)
            scaler.scale((model(x) - y).square().mean()).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach().clone() for p in model.parameters()])
        assert svd.step == 4
    for plain, scaled_one in zip(*results, strict=True):
        torch.testing.assert_close(scaled_one, plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_an_overflow(fused: bool) -> None:
    model = make_toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    svd = attach(model, optimizer, SVDConfig(svd_preset="off"))
    svd.set_mode(Q, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(1)
    scaler.scale((model(x) - y).square().mean()).backward()
    model.head.bias.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**3


def test_grad_scaler_with_reregister_is_refused_instead_of_stepping_scaled_gradients() -> None:
    model, optimizer, _svd = attached("reregister")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(backward_loss(model)).backward()
    with pytest.raises(RuntimeError, match="use svd_adapter=shadow"):
        scaler.step(optimizer)


def backward_loss(model: Toy) -> Tensor:
    x, y = batch(0)
    return (model(x) - y).square().mean()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("keyword", [False, True])
def test_closure_that_runs_backward_inside_the_step(adapter: str, keyword: bool) -> None:
    model, optimizer, svd = attached(adapter)
    reference, reference_optimizer, _ = attached(adapter)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward_loss(model)
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    reference_loss = backward_loss(reference)
    reference_loss.backward()
    reference_optimizer.step()
    assert torch.equal(loss, reference_loss)
    assert svd.step == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_compiled_model_never_recompiles(adapter: str) -> None:
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def counting(graph: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = make_toy(depth=1)
    compiled = torch.compile(model, backend=counting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    svd = attach(compiled, optimizer, SVDConfig(svd_preset="off", svd_adapter=adapter))  # type: ignore[arg-type]
    for step in range(10):
        optimizer.zero_grad()
        backward(compiled, step)
        optimizer.step()
        for name in svd.targets:
            svd.set_mode(name, (8, 6, None)[step % 3])
    assert len(graphs) == 1
    assert sum(target.num_switches for target in svd.targets.values()) >= 20
    torch._dynamo.reset()


def test_optimizer_state_alone_does_not_load_into_the_wrong_layout() -> None:
    _, optimizer, svd = attached("reregister")
    saved = copy.deepcopy((svd.state_dict(), optimizer.state_dict()))
    other = make_toy()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    with pytest.raises(ValueError, match="doesn't match the size"):
        other_optimizer.load_state_dict(saved[1])
    other_svd = attach(other, other_optimizer, SVDConfig(svd_preset="off", svd_adapter="reregister"))
    other_svd.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_detach_restores_plain_training(adapter: str) -> None:
    model, optimizer, svd = attached(adapter)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    plain = make_toy()
    plain.load_state_dict(model.state_dict())
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    svd.detach()
    optimizer.zero_grad()
    for step in range(3, 6):
        for each, its_optimizer in ((model, optimizer), (plain, plain_optimizer)):
            its_optimizer.zero_grad()
            backward(each, step)
            its_optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
