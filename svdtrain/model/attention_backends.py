"""Causal attention with an optional sliding window, by several kernels that compute the same thing.

All take q [B, T, H, D] and k, v [B, T, H_kv, D] and return [B, T, H, D]. `window` is how many earlier positions a
query sees besides itself; None means all of them. So query i attends to keys j with i - window <= j <= i.

| backend | full layers | sliding windows | runs on |
|---|---|---|---|
| sdpa    | torch's fused causal kernel | the same with a boolean mask: no work saved | all |
| blocked | as sdpa | plain matrix products over the visible blocks only (`blocked_attention`) | all; made for CPUs |
| flash   | flash attention 2 inside torch | its own window arguments: skips blocks | CUDA, bf16/fp16 |
| cudnn   | cuDNN's fused causal kernel | not available: raises | CUDA, bf16/fp16 |
| flex    | flex_attention | block mask: skips blocks | CUDA; CPU for tests |

`A+B` takes A for sliding windows and B for full layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from svdtrain.model.attention_masks import remembered, window_mask
from svdtrain.model.blocked_attention import BlockedAttention

Attend = Callable[[Tensor, Tensor, Tensor, "int | None", float], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, backend: str = "auto") -> Tensor:
    """Causal attention of q [B, T, H, D] over k, v [B, T, H_kv, D]; see the module's table for `backend`.

    Raises ValueError for an unknown backend.
    """
    if window is not None and window >= q.size(1) - 1:
        window = None  # the window reaches the start from every query
    name = resolve_backend(backend, q.device, q.dtype, windowed=window is not None)
    return _BACKENDS[name](q, k, v, window, scale)


def check_backend(backend: str) -> str:
    """Return `backend` unchanged; ValueError unless it is `auto`, a known name, or two known names joined by `+`."""
    names = backend.split("+")
    if backend != "auto" and not (len(names) <= 2 and set(names) <= set(_BACKENDS)):
        raise ValueError(f"unknown attention backend {backend!r}; choose auto, one of {sorted(_BACKENDS)}, or A+B")
    return backend


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, *, windowed: bool) -> str:
    """The concrete backend for one layer."""
    if backend == "auto":
        half = dtype in (torch.bfloat16, torch.float16)
        backend = "blocked" if device.type == "cpu" else "flash+sdpa" if device.type == "cuda" and half else "sdpa"
    check_backend(backend)
    return backend.split("+")[0 if windowed else -1]


def attend_cached(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Attention of the newest T queries [B, T, H, D] over all S >= T keys and values [B, S, H_kv, D] of a cache."""
    length, total = q.size(1), k.size(1)
    if window is not None and total > length + window:
        k, v = k[:, total - length - window :], v[:, total - length - window :]  # nothing older is visible
        total = k.size(1)
    mask = None if length == 1 else window_mask(length, total, window, q.device)
    return _sdpa(q, k, v, scale, mask=mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2)


def _block_mask(length: int, window: int | None, device: torch.device) -> BlockMask:
    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row - column <= (length if window is None else window))

    return create_block_mask(visible, None, None, length, length, device=str(device))


_window_mask = remembered(window_mask)
_block_mask_for = remembered(_block_mask)


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    if window is None:
        return _sdpa(q, k, v, scale, causal=True)
    return _sdpa(q, k, v, scale, mask=_window_mask(q.size(1), q.size(1), window, q.device))


def _attend_blocked(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    if window is None or torch.compiler.is_compiling():  # its writes into slices do not trace
        return _attend_sdpa(q, k, v, window, scale)
    group = q.size(2) // k.size(2)
    k, v = (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k, v))
    y = BlockedAttention.apply(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), window, scale)
    assert isinstance(y, Tensor)
    return y.unflatten(0, (q.size(0), q.size(2))).transpose(1, 2)


def _attend_cudnn(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    if window is not None:
        raise ValueError("backend cudnn has no sliding windows; use flash+cudnn or flex+cudnn")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v, scale, causal=True)


def _attend_flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """The kernel behind SDPA's flash backend, called directly because SDPA does not pass window sizes on."""
    length = q.size(1)
    left, right = (None, None) if window is None else (window, 0)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, length, length, 0.0, True, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    mask = _block_mask_for(q.size(1), window, q.device)
    kernel = flex_attention if torch.compiler.is_compiling() or q.device.type == "cpu" else _compiled_flex()
    grouped = q.size(2) != k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return kernel(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


_BACKENDS: dict[str, Attend] = {
    "sdpa": _attend_sdpa,
    "blocked": _attend_blocked,
    "cudnn": _attend_cudnn,
    "flash": _attend_flash,
    "flex": _attend_flex,
}
