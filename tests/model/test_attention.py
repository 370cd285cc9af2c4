"""Every attention kernel against a naive float64 reference, forward and backward."""

import warnings

import pytest
import torch
from torch import Tensor

from svdtrain.model.attention_backends import attend, attend_cached, check_backend, resolve_backend


def naive(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Dense scores, one mask written out; queries are the last q.size(1) positions of k.size(1)."""
    offset, group = k.size(1) - q.size(1), q.size(2) // k.size(2)
    k, v = (torch.stack([x[:, :, head // group] for head in range(q.size(2))], 2) for x in (k, v))
    far = k.size(1) if window is None else window
    seen = [[0 <= t + offset - s <= far for s in range(k.size(1))] for t in range(q.size(1))]
    scores = scale * torch.einsum("bthd,bshd->bhts", q, k)
    scores = scores.masked_fill(~torch.tensor(seen), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def inputs(batch: int, length: int, heads: int, kv_heads: int, total: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, heads), (total or length, kv_heads), (total or length, kv_heads)]
    return [torch.randn(batch, n, h, 8, generator=generator, dtype=torch.float64).requires_grad_() for n, h in shapes]


CASES = [  # batch, length, heads, kv heads, window; blocks of the blocked kernel are 128 rows
    (1, 37, 2, 2, None),
    (2, 150, 2, 1, None),
    (1, 150, 2, 2, 128),
    (2, 290, 2, 1, 128),
    (2, 260, 1, 1, 5),
    (1, 33, 4, 2, 0),
    (2, 40, 2, 2, 100),
]


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_and_their_gradients(backend: str, case: tuple[int, int, int, int, int | None]) -> None:
    batch, length, heads, kv_heads, window = case
    tensors = inputs(batch, length, heads, kv_heads)
    y, expected = attend(*tensors, window, 0.7, backend), naive(*tensors, window, 0.7)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    gradients = torch.autograd.grad(y, tensors, dy)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, tensors, dy), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("window", [None, 20])
def test_flex(window: int | None) -> None:
    """Forward only: flex has no backward pass on CPUs."""
    q, k, v = (x.detach().float() for x in inputs(1, 64, 2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks to be compiled, which this small test does without
        y = attend(q, k, v, window, 0.7, "flex")
    torch.testing.assert_close(y, naive(q, k, v, window, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_flash_has_the_right_shapes_and_a_gradient(window: int | None) -> None:
    """The kernel itself needs a GPU; its signature, layout and differentiability do not."""
    q, k, v = (torch.empty(2, 64, 4, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    y = attend(q, k, v, window, 0.7, "flash")
    assert y.shape == q.shape
    assert y.is_contiguous()
    gradients = torch.autograd.grad(y, (q, k, v), torch.empty_like(y))
    assert [g.shape for g in gradients] == [q.shape] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash", "flex", "sdpa"])
@pytest.mark.parametrize("window", [None, 128])
def test_gpu_kernels_and_their_gradients(backend: str, window: int | None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    low = [
        torch.randn(2, 512, 2, 128, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for _ in range(3)
    ]
    exact = [x.detach().double().requires_grad_() for x in low]
    y, expected = attend(*low, window, 0.1, backend), attend(*exact, window, 0.1, "sdpa")
    gradients = torch.autograd.grad(y, low, torch.ones_like(y))
    references = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    for ours, reference in zip((y, *gradients), (expected, *references), strict=True):
        assert (ours.double() - reference).square().mean().sqrt() < 0.01 * reference.square().mean().sqrt() + 1e-5


@pytest.mark.parametrize("window", [None, 0, 5, 64])
@pytest.mark.parametrize("length", [1, 7, 30])
def test_cached(window: int | None, length: int) -> None:
    q, k, v = (x.detach() for x in inputs(2, length, 4, 2, total=30))
    y = attend_cached(q, k, v, window, 0.7)
    torch.testing.assert_close(y, naive(q, k, v, window, 0.7), atol=1e-10, rtol=1e-10)


def test_a_mask_first_used_in_inference_serves_training() -> None:
    tensors = inputs(1, 41, 1, 1)
    for backend in ("sdpa", "blocked"):
        with torch.inference_mode():
            attend(*tensors, 3, 1.0, backend)
        attend(*tensors, 3, 1.0, backend).sum().backward()


def test_choice_of_backend() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_backend("auto", cpu, torch.float32, windowed=True) == "blocked"
    assert resolve_backend("auto", gpu, torch.float32, windowed=True) == "sdpa"
    assert resolve_backend("flash+cudnn", gpu, torch.bfloat16, windowed=True) == "flash"
    assert resolve_backend("flash+cudnn", gpu, torch.bfloat16, windowed=False) == "cudnn"
    for wrong in ("", "flesh", "flash+flex+sdpa", "auto+sdpa"):
        with pytest.raises(ValueError, match="unknown attention backend"):
            check_backend(wrong)


def test_cudnn_says_that_it_has_no_windows() -> None:
    with pytest.raises(ValueError, match="no sliding windows"):
        attend(*inputs(1, 16, 1, 1), 3, 1.0, "cudnn")
