"""flash-linear-attention's kernels behind our shapes. Imported only when used: its import takes half a minute cold."""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_blocks.ops import installed

LARGEST_HEAD = 256  # what its delta-rule kernels take
HOPPER = 9  # major compute capability
WRONG_DECAYS = (3, 4), (3, 7, 1)
"""From the first to before the second of these versions, triton compiles the gradients of decays wrongly for Hopper
GPUs, and fla refuses them (its issue 640)."""


def use_fla(backend: str, dtype: torch.dtype, device: torch.device, head_dim: int, decays: bool = False) -> bool:
    """Whether to call fla. auto: on CUDA, in bf16 or fp16, heads of at most 256, and if it is installed. decays: the
    kernel is one with decays, whose gradients not every triton compiles rightly.

    Raises ValueError when backend is "fla" and one of these does not hold.
    """
    if backend not in ("auto", "fla"):
        return False
    obstacle = _obstacle(dtype, device, head_dim)
    lack = "" if obstacle else _lack(device, decays)
    if backend == "fla" and (obstacle or lack):
        raise ValueError(f"backend='fla' {obstacle or lack}; use backend='auto' or 'torch'")
    if lack:
        _say_once(lack)
    return not (obstacle or lack)


def _obstacle(dtype: torch.dtype, device: torch.device, head_dim: int) -> str:
    """What fla does not do."""
    if device.type != "cuda":
        return f"needs a CUDA device, the input is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, the input is {dtype}"
    if head_dim > LARGEST_HEAD:
        return f"takes heads of at most {LARGEST_HEAD} channels, these have {head_dim}"
    return ""


def _lack(device: torch.device, decays: bool) -> str:
    """What is wrong with the installation, which the user can mend."""
    if importlib.util.find_spec("fla") is None:
        return "needs the package fla-core[cuda], which is not installed"
    return trouble_with_decays(device) if decays else ""


def trouble_with_decays(device: torch.device) -> str:
    """Why gradients of kernels with decays cannot be had here, "" where they can (or none are recorded)."""
    first, mended = WRONG_DECAYS
    version = installed.triton_version()
    if not torch.is_grad_enabled() or not first <= installed.numbers(version) < mended:
        return ""
    if torch.cuda.get_device_capability(device)[0] != HOPPER or importlib.util.find_spec("tilelang") is not None:
        return ""
    return f"has no right gradients of decays on Hopper GPUs with triton {version} (they need >= 3.7.1, or tilelang)"


@lru_cache(maxsize=2)
def _say_once(reason: str) -> None:
    warnings.warn(f"the fast kernels' backend {reason}: running the slower torch form", stacklevel=4)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, S: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`reference.delta_rule_reference` by fla's chunk kernels, in `dtype`.

    With fewer keys than values (32 and 64, fla 0.6.0, triton 3.6.0, H200) they are off by half and more, so keys are
    filled up with zeros, which change nothing.
    """
    keys, lacking = q.size(-1), max(0, v.size(-1) - q.size(-1))
    q, k, S = F.pad(q, (0, lacking)), F.pad(k, (0, lacking)), F.pad(S, (0, 0, 0, lacking))
    common = {"scale": 1.0, "initial_state": S.contiguous(), "output_final_state": True}
    q, k, v, beta = (x.to(dtype).contiguous() for x in (q, k, v, beta))
    if log_decay is None:
        from fla.ops.delta_rule import chunk_delta_rule  # type: ignore[import-not-found]

        o, S = chunk_delta_rule(q=q, k=k, v=v, beta=beta, **common)
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

        o, S = chunk_gated_delta_rule(q=q, k=k, v=v, g=log_decay.float().contiguous(), beta=beta, **common)
    return o.float(), S[:, :, :keys].float()


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, S: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`reference.dplr_reference` without G. fla's transition is D + b a^T: its a reads and its b writes."""
    from fla.ops.generalized_delta_rule.dplr import chunk_dplr_delta_rule  # type: ignore[import-not-found]

    q, k, v, a, b = (x.to(dtype).contiguous() for x in (q, k, v, a, b))
    gk = log_decay.float().contiguous()
    o, S = chunk_dplr_delta_rule(
        q=q, k=k, v=v, a=b, b=a, gk=gk, scale=1.0, initial_state=S.contiguous(), output_final_state=True
    )
    return o.float(), S.float()


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`reference.linear_attention_reference`."""
    from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found]

    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    o, S = chunk_simple_gla(
        q=q,
        k=k,
        v=v,
        g=log_decay.float().contiguous(),
        scale=1.0,
        initial_state=S.contiguous(),
        output_final_state=True,
    )
    return o.float(), S.float()
