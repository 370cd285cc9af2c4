"""Soft-capped cross entropy, plain and in chunks, against float64 written out."""

import pytest
import torch
from torch import Tensor

from svdtrain.model import loss as loss_module
from svdtrain.model.loss import chunked_head_loss, soft_cap, soft_cap_cross_entropy

VOCAB, PADDED = 50, 64


def problem(rows: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = (3 * torch.randn(PADDED, 16, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(-1, VOCAB, (rows,), generator=generator)
    assert (targets == -1).any()
    return x, weight, targets


def naive(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    scores = 15 * torch.tanh((x @ weight.T)[:, :VOCAB] / 15)
    losses = scores.exp().sum(-1).log() - scores[torch.arange(len(x)), targets.clamp_min(0)]
    losses = torch.where(targets == -1, 0, losses)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (targets != -1).sum()}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_plain(reduction: str) -> None:
    x, weight, targets = problem()
    loss = soft_cap_cross_entropy((x @ weight.T)[:, :VOCAB], targets, reduction)
    torch.testing.assert_close(loss, naive(x, weight, targets, reduction))


@pytest.mark.parametrize("on_cpu", [True, False], ids=["in-place", "general"])
@pytest.mark.parametrize("chunk", [64, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunked_loss_and_gradients(reduction: str, chunk: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not on_cpu:  # the form for GPUs and compilers
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, weight, targets = problem()
    loss = chunked_head_loss(x, weight, targets, VOCAB, chunk, reduction)
    expected = naive(x, weight, targets, reduction)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    gradients = torch.autograd.grad(2.5 * loss, (x, weight))
    references = torch.autograd.grad(2.5 * expected, (x, weight))
    torch.testing.assert_close(gradients, references, atol=1e-9, rtol=1e-9)
    assert gradients[1][VOCAB:].abs().max() == 0


def test_bf16_activations_with_fp32_weights() -> None:
    x, weight, targets = problem()
    low, master = x.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    loss = chunked_head_loss(low, master, targets, VOCAB, 64)
    expected = naive(x, weight, targets, "mean")
    assert (loss.dtype, loss.item()) == (torch.float32, pytest.approx(expected.item(), rel=0.01))
    (gradient,) = torch.autograd.grad(loss, master)
    (reference,) = torch.autograd.grad(expected, weight)
    assert gradient.dtype == torch.float32
    assert (gradient - reference).norm() < 0.02 * reference.norm()


def test_chunked_refuses_a_loss_per_token() -> None:
    with pytest.raises(ValueError, match="not 'none'"):
        chunked_head_loss(*problem(), VOCAB, 64, "none")


def test_soft_cap_bounds_and_types() -> None:
    assert soft_cap(torch.tensor([1e4, -1e4])).tolist() == [15, -15]
    assert soft_cap(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert soft_cap(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_exponentials_of_the_in_place_form_cannot_overflow() -> None:
    """Its sum runs over the vocabulary without subtracting the maximum: 65,536 e^15 must fit into fp32."""
    raw = torch.full((2, 65536), 1e4)
    loss = loss_module._in_place(raw, torch.tensor([0, -1]), 65536)
    assert loss.item() == pytest.approx(torch.tensor(65536.0).log().item(), rel=1e-5)
    assert torch.isfinite(raw).all()
