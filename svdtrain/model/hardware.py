"""Which number type the processor multiplies in hardware."""

from __future__ import annotations

from pathlib import Path

import torch

_BF16_CPU_FLAGS = {"amx_bf16", "avx512_bf16"}


def hardware_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 where `device` multiplies it in hardware, else fp32.

    CUDA: compute capability 8.0 and later. CPU: AMX-BF16 or AVX512_BF16. Elsewhere (MPS) fp32: emulated bf16 is
    slower than fp32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bf16() -> bool:
    """True when torch or /proc/cpuinfo reports bf16 matrix instructions."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, absent in some versions
    if probe is not None and probe():
        return True
    return bool(_BF16_CPU_FLAGS & _cpuinfo_flags(Path("/proc/cpuinfo")))


def _cpuinfo_flags(path: Path) -> set[str]:
    """Feature flags of the first processor listed; empty where the file does not exist (not Linux)."""
    if not path.is_file():
        return set()
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()
