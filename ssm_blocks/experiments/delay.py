"""005: is a hierarchically semi-separable state as good as a dense one five times its size, and how much faster?"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssm_blocks.experiments.counting import OperationCounter
from ssm_blocks.experiments.experiment import Arm, Column, Criterion, Row, at_length, criterion, rows_of, values_of
from ssm_blocks.experiments.linear_attention import DENSE, POSITIONED
from ssm_blocks.experiments.timing import median_ms, tensor_cores
from ssm_blocks.experiments.token_experiment import TokenExperiment, accuracy_columns, model_config, number
from ssm_blocks.experiments.training import Training
from ssm_blocks.mixer import Mixer, build
from ssm_blocks.tasks.delay import Delay
from ssm_blocks.tasks.task import Task

WIDTH, SPEED_WIDTH = 64, 1024
SPEED_LENGTHS = (8192, 16384)
MAIN, LONG = "16 tokens ago, T = 64", "32 tokens ago, T = 128"
SPEED = "Forward and backward of one layer, d = 1024, one head"
LENGTHS = (64, 128, 256)
MIXERS = {"dense": DENSE, "hss": "segmented_hss"}


class DelayExperiment(TokenExperiment):
    """With its own state alone, and told its position, linear attention finds what was read long ago."""

    name = "delay"
    proposal = "005"
    question = "Does linear attention on an HSS state equal dense linear attention at a fifth of its state?"
    training = Training(steps=1500, batch=64, lr=3e-3, lengths=(64,), solved_loss=2e-4)
    lengths = LENGTHS
    columns = (
        *accuracy_columns(LENGTHS, 64),
        Column(title="token T=128", value=at_length(128, "token")),
        Column(title="fwd + bwd ms", value=lambda row: row.get("ms"), format=".2f"),
        number("tokens/s", "tokens_per_s"),
        number("MiB at peak", "peak_mib"),
        Column(title="kernels", value=lambda row: _count(row, "kernels"), format=",.0f"),
        Column(title="TFLOP in products", value=lambda row: _count(row, "tflop"), format=".2f"),
        Column(title="GB written", value=lambda row: _count(row, "gb"), format=".1f"),
    )

    reasons: ClassVar = {
        f"dense time / HSS time at T={length}": "the maps of the input, which both layers have, are most of "
        "the operations, so there are few to save, and they come in several times as many kernels that write several "
        "times as much (last columns, counted): every node of the tree is a head with queries, keys and values of its "
        "own, where the dense layer is one head of few large products, made for tensor cores. What it saves is state."
        for length in SPEED_LENGTHS
    }
    notes = (
        "Lengths beyond the trained one ask for positions that were never trained, and positions have periods of at "
        "most 128 tokens: what is asked here is whether the two tie, not how far they carry.",
        "hss_auto is what backend='auto' takes: fla's kernels if their gradients are right with this GPU and triton, "
        "else torch, with the same MiB at peak as hss_torch.",
    )

    def task(self, config: Any) -> Task:
        return Delay(config)

    def arms(self) -> list[Arm]:
        arms = [_arm(name, 16, MAIN) for name in MIXERS]
        arms += [_arm(f"{name}_32", 32, LONG, lengths=[128]) for name in MIXERS]
        backends = {"dense": ("torch",), "hss": ("torch", "auto")}
        return arms + [
            _speed_arm(name, backend, length)
            for length in SPEED_LENGTHS
            for name in MIXERS
            for backend in backends[name]
        ]

    def run(self, arm: Arm, seed: int, settings: dict[str, Any], device: torch.device) -> Row:
        if "speed" not in arm.config:
            return super().run(arm, seed, settings, device)
        width, length = (64, 128) if settings["quick"] else (SPEED_WIDTH, arm.config["length"])
        torch.manual_seed(seed)
        mixer = build(MIXERS[arm.config["speed"]], width, num_heads=1, **arm.config["options"]).to(device)
        return {"state_size": mixer.state_numel(), **speed(mixer, length, device, 2 if settings["quick"] else 5)}

    def settings(self, quick: bool) -> dict[str, Any]:
        found = super().settings(quick)
        if quick:  # longer than the delays
            found |= {"training": {**found["training"], "lengths": [40], "batch": 4}, "lengths": [40]}
        return found

    def judge(self, rows: list[Row]) -> list[Criterion]:
        accuracy = at_length(64, "token")
        gains = _gains(rows, "", accuracy)
        late = at_length(128, "token")
        sizes = per_seed(rows, "hss", "dense", lambda hss, dense: _memory(hss) / _memory(dense))
        speeds = [
            criterion(
                f"dense time / HSS time at T={length}",
                per_seed(rows, f"dense_torch_{length}", f"hss_torch_{length}", lambda a, b: a["ms"] / b["ms"]),
                above=1.0,
                format=".2f",
            )
            for length in SPEED_LENGTHS
        ]
        return [
            criterion("dense control, tokens at T=64", values_of(rows, "dense", accuracy), above=0.9),
            criterion("HSS minus dense, tokens at T=64", gains, above=-0.01),
            criterion("32 tokens ago: dense control, tokens at T=128", values_of(rows, "dense_32", late), above=0.9),
            criterion("32 tokens ago: HSS minus dense, tokens at T=128", _gains(rows, "_32", late), above=-0.01),
            criterion("state of HSS / state of dense", sizes, below=0.2),
            *speeds,
        ]


def speed(mixer: Mixer, length: int, device: torch.device, repeats: int) -> Row:
    """Median milliseconds of forward and backward on one sequence (bf16 on CUDA), and the memory at the peak there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(1, length, mixer.dim, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn_like(x)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def once() -> None:
        mixer.zero_grad(set_to_none=True)
        y = mixer(x)
        assert isinstance(y, Tensor)
        (y * weight).sum().backward()

    with tensor_cores():
        ms = median_ms(once, repeats, 2, device)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {"ms": ms, "tokens_per_s": 1000 * length / ms, "peak_mib": peak, "length": length}


def _arm(name: str, delay: int, group: str, lengths: list[int] | None = None) -> Arm:
    inner = MIXERS[name.split("_")[0]]
    model = model_config(POSITIONED, WIDTH, inner=inner, longest=128, num_heads=1, conv_size=0)
    training = {} if lengths is None else {"training": {"lengths": lengths}}
    return Arm(name=name, group=group, config={"task": delay, "model": model, **training})


def _speed_arm(name: str, backend: str, length: int) -> Arm:
    chunk = 256 if name == "dense" else 64  # about what is fastest for heads of 1024 and of 64
    config = {"speed": name, "length": length, "options": {"backend": backend, "chunk": chunk}}
    return Arm(name=f"{name}_{backend}_{length}", group=SPEED, config=config, exclusive=True)


def _memory(row: Row) -> float:
    """Numbers in the state, without the one that counts positions."""
    return row["state_size"] - 1


def _gains(rows: list[Row], kind: str, accuracy: Callable[[Row], float | None]) -> list[float]:
    return per_seed(rows, f"hss{kind}", f"dense{kind}", lambda hss, dense: accuracy(hss) - accuracy(dense))  # type: ignore[operator]


def _count(row: Row, what: str) -> float | None:
    """Of arms that measure speed in torch alone: fla's kernels cannot be looked into."""
    config = row["config"]
    if config.get("options", {}).get("backend") != "torch":
        return None
    return work(config["speed"], config["length"], config["options"]["chunk"])[what]


@lru_cache
def work(name: str, length: int, chunk: int) -> dict[str, float]:
    """What forward and backward of a layer are made of: kernels, TFLOP in products of matrices, GB that are written.

    Counted on the meta device, so that nothing is computed.
    """
    with torch.device("meta"):
        mixer = build(MIXERS[name], SPEED_WIDTH, num_heads=1, backend="torch", chunk=chunk)
        x = torch.randn(1, length, SPEED_WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with OperationCounter() as counter:
        y = mixer(x)
        assert isinstance(y, Tensor)
        y.sum().backward()
    return {"kernels": counter.kernels, "tflop": counter.in_products / 1e12, "gb": counter.written / 1e9}


def per_seed(rows: list[Row], one: str, other: str, value: Callable[[Row, Row], float]) -> list[float]:
    """A number per seed that both arms have."""
    others = {row["seed"]: row for row in rows_of(rows, other)}
    return [value(row, others[row["seed"]]) for row in rows_of(rows, one) if row["seed"] in others]


EXPERIMENT = DelayExperiment()
