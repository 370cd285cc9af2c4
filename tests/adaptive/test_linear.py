"""The layer for people who build their own modules."""

import pytest
import torch

from svdtrain.adaptive.linear import AdaptiveSVDLinear


def test_forward_and_state_are_dense_in_both_modes() -> None:
    torch.manual_seed(0)
    layer = AdaptiveSVDLinear(12, 10)
    x = torch.randn(4, 12)
    before = layer(x).detach()
    assert layer.mode == "full"
    assert layer.trainable() == [layer.weight]
    layer.switch_to_lowrank(4)
    assert layer.mode == "lowrank"
    assert torch.equal(layer(x), before)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert len(list(layer.parameters())) == 2
    layer.switch_to_full()
    assert layer.mode == "full"


def test_training_the_factors_by_hand() -> None:
    torch.manual_seed(0)
    layer = AdaptiveSVDLinear(12, 10)
    x, y = torch.randn(40, 12), torch.randn(40, 10)
    layer.switch_to_lowrank(4)
    W_p = layer.factors.W_p.clone()
    optimizer = torch.optim.SGD([*layer.trainable(), layer.bias], lr=0.2)
    losses = []
    for _ in range(20):
        loss = (layer(x) - y).square().mean()
        loss.backward()
        layer.project_gradient()
        optimizer.step()
        layer.merge()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert layer.weight.grad is None
    assert torch.linalg.matrix_rank(layer.weight.detach() - W_p, rtol=1e-5) == 4
    layer.switch_to_lowrank(3)
    assert layer.trainable()[0].shape == (10, 3)


def test_tracking() -> None:
    torch.manual_seed(0)
    layer = AdaptiveSVDLinear(24, 20)
    with pytest.raises(ValueError, match="after backward"):
        layer.update_svd_tracking()
    layer(torch.randn(4, 24)).square().mean().backward()
    first = layer.update_svd_tracking()
    assert first.subspace_angle != first.subspace_angle  # nan: nothing to compare with
    with torch.no_grad():
        layer.weight.add_(0.01 * torch.randn_like(layer.weight))
    second = layer.update_svd_tracking()
    assert 0 < second.subspace_angle < 1.6
    assert second.update_size == pytest.approx(0.01 * 480**0.5 / float(layer.weight.detach().norm()), rel=0.2)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        layer.switch_to_lowrank(3)
