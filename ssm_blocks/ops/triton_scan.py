"""Recurrences of small states on a GPU as one walk through time per (sequence, head), by Triton kernels of our own.

A scan over n x n matrices does O(n^3) work a token in 2 T small products, and keeps every one for the backward pass.
With many sequences and heads the tokens of one sequence need not be parallel: a program keeps h in registers and walks
through time, one launch. Given matrices that is O(n^2) a token, and 4 n^2 bytes read. Monarch matrices made of
reflections are applied as such, O(n) each, and never formed: for n = b^2 that is 8 b (b + 1) n_h bytes, 160 for b = 4
and n_h = 1, where the blocks of L and R are 8 b^3 = 512 and the matrix 1,024, and none of them is written first.

Triton is imported only when a kernel runs.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_blocks.ops import installed

LARGEST_STATE = 64  # a matrix of 64 x 64 is what 4 warps keep in registers
MOST_REFLECTIONS = 8  # per block; the kernel's text grows with them, and whole matrices cost no more then
STATE_TYPE = torch.float32
OLDEST = (3, 3)  # of triton: the first whose compiler was seen to take the kernels


def use_triton(backend: str, dtype: torch.dtype, device: torch.device, state_size: int) -> bool:
    """Whether to call the kernels. auto: on CUDA, float32 states of at most 64 numbers, if triton >= 3.3 is installed.

    Raises ValueError when backend is "triton" and one of these does not hold. With TRITON_INTERPRET=1, triton's own
    switch, "triton" runs on a CPU as well, for tests.
    """
    if backend not in ("auto", "triton"):
        return False
    obstacle = _obstacle(dtype, device, state_size, may_interpret=backend == "triton")
    lack = "" if obstacle else _lack()
    if backend == "triton" and (obstacle or lack):
        raise ValueError(f"backend='triton' {obstacle or lack}; use backend='auto' or 'torch'")
    if lack:
        _say_once(lack)
    return not (obstacle or lack)


def _obstacle(dtype: torch.dtype, device: torch.device, state_size: int, may_interpret: bool) -> str:
    """What the kernels do not do."""
    interpreted = may_interpret and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"needs a CUDA device, the input is on {device.type}"
    if dtype != STATE_TYPE:
        return f"keeps states in {STATE_TYPE}, these are {dtype}"
    if state_size > LARGEST_STATE:
        return f"takes states of at most {LARGEST_STATE} numbers a head, these have {state_size}"
    return ""


def _lack() -> str:
    """What is wrong with the installation, which the user can mend."""
    version = installed.triton_version()
    if installed.numbers(version) < OLDEST:
        there = f"{version} is installed" if version else "which is not installed"
        return f"needs the package triton >= {'.'.join(map(str, OLDEST))}, {there}"
    return ""


@lru_cache(maxsize=1)
def _say_once(reason: str) -> None:
    warnings.warn(f"the backend of kernels for small states {reason}: running the slower torch form", stacklevel=4)


@torch.compiler.disable
def dense_scan(M: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """All states h_t = M_t h_{t-1} + b_t in float32, [B, T, H, n].

    M [B, T, H, n, n], b [B, T, H, n], h0 [B, H, n] of any floating type; the gradients have theirs.
    """
    return _DenseScan.apply(*(x.to(STATE_TYPE) for x in (M, b, h0)))  # type: ignore[return-value]


@torch.compiler.disable
def monarch_scan(u: Tensor, beta: Tensor, forget: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """All states h_t = forget_t P^T L_t P R_t h_{t-1} + b_t in float32, [B, T, H, b^2]; no block is ever formed.

    u [B, T, H, 2, b, m, b], beta [B, T, H, 2, b, m]: factor 0 is L, 1 is R, and a block is the product
    H_m ... H_1 of I - beta_i u_i u_i^T (`householder.householder_product`). forget [B, T, H], b [B, T, H, b^2],
    h0 [B, H, b^2], all of any floating type. The gradients have theirs.
    """
    return _MonarchScan.apply(*(x.to(STATE_TYPE) for x in (u, beta, forget, b, h0)))  # type: ignore[return-value]


def _padded(size: int, smallest: int) -> int:
    """The next power of two, which is what a block of registers has.

    Fewer than 32 numbers leave lanes of a warp without one, and the compiler then makes layouts that exchange registers
    between lanes at every token: hence at least 8 x 8, or 4 x 8.
    """
    return max(smallest, 1 << (size - 1).bit_length())


def _buffer(b: Tensor, h0: Tensor) -> Tensor:
    """Room for all states [B, T + 1, H, n], the first in its place."""
    batch, length, *shape = b.shape
    states = b.new_empty(batch, length + 1, *shape)
    states[:, 0] = h0
    return states


def _empty_like_first(states: Tensor) -> Tensor:
    return states.new_empty(states.size(0), *states.shape[2:])


def _launch(kernel: Any, tokens: Tensor, arguments: tuple[Tensor, ...], **options: int) -> None:
    """One program per sequence and head of tokens [B, T, H, n]."""
    batch, length, heads, _ = tokens.shape
    with torch.cuda.device_of(tokens):
        kernel[(batch * heads,)](*arguments, T=length, H=heads, **options)


def _dense_options(n: int) -> dict[str, int]:
    """One warp up to 16 x 16 (8 registers a lane): it waits for nobody. Stages in shared memory, at most 16 KB each."""
    return {"n": n, "N": _padded(n, 8), "STAGES": 2 if n > 32 else 4, "num_warps": 1 if n <= 16 else 4}


def _monarch_options(u: Tensor) -> dict[str, int]:
    """A grid is at most 8 x 8: one warp. A token is few bytes, its arithmetic short: six are under way at once."""
    count, size = u.shape[-2:]
    grid = {"size": size, "ROWS": _padded(size, 4), "COLUMNS": _padded(size, 8)}
    return {**grid, "count": count, "STAGES": 6 if count <= 2 else 3, "num_warps": 1}


class _DenseScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, M: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        from ssm_blocks.ops.triton_kernels import dense_forward

        M, b = M.contiguous(), b.contiguous()
        states = _buffer(b, h0)
        _launch(dense_forward, b, (M, b, states), **_dense_options(b.size(-1)))
        ctx.save_for_backward(M, states)
        return states[:, 1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        from ssm_blocks.ops.triton_kernels import dense_backward

        M, states = ctx.saved_tensors
        grad = grad.contiguous()
        dM, db, dh0 = torch.empty_like(M), torch.empty_like(grad), _empty_like_first(states)
        _launch(dense_backward, grad, (M, states, grad, dM, db, dh0), **_dense_options(grad.size(-1)))
        return dM, db, dh0


class _MonarchScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, beta: Tensor, forget: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        from ssm_blocks.ops.triton_kernels import monarch_forward

        u, beta, forget, b = (x.contiguous() for x in (u, beta, forget, b))
        states = _buffer(b, h0)
        _launch(monarch_forward, b, (u, beta, forget, b, states), unit=1, **_monarch_options(u))
        ctx.save_for_backward(u, beta, forget, states)
        return states[:, 1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        from ssm_blocks.ops.triton_kernels import monarch_backward

        u, beta, forget, states = ctx.saved_tensors
        grad = grad.contiguous()
        du, dbeta, dforget, db = (torch.empty_like(x) for x in (u, beta, forget, grad))
        inputs = u, beta, forget, states, grad
        outputs = du, dbeta, dforget, db, _empty_like_first(states)
        _launch(monarch_backward, grad, (*inputs, *outputs), unit=1, **_monarch_options(u))
        return outputs
