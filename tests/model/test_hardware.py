"""The number type follows the processor."""

from pathlib import Path

import pytest
import torch

from svdtrain.model import hardware, hardware_dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f amx_bf16 amx_tile", torch.bfloat16),
        ("fpu avx512_bf16", torch.bfloat16),
        ("fpu avx512f avx512bw", torch.float32),
        ("fpu notavx512_bf16x", torch.float32),
    ],
)
def test_cpu_flags(flags: str, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\nbugs : none\n")
    monkeypatch.setattr(hardware, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert hardware_dtype("cpu") == expected


def test_torchs_own_probe_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "Path", lambda _: tmp_path / "missing")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert hardware_dtype("cpu") == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert hardware_dtype("cpu") == torch.float32


def test_gpu_by_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((9, 0), torch.bfloat16), ((7, 5), torch.float32)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, value=capability: value)
        assert hardware_dtype("cuda") == expected
    assert hardware_dtype("mps") == torch.float32
