"""Time one training step for several attention kernels and forms of the loss, and print one table.

    python scripts/bench_train_step.py --depth 12 --batch 32 --seq 2048                       on a GPU
    python scripts/bench_train_step.py --depth 4 --batch 1 --seq 512 --vocab 4096 --no-compile    on a CPU

Needs torch and numpy. Every row is measured by itself, so one kernel that is missing or fails costs only its row.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svdtrain.config import OptimConfig
from svdtrain.model import GPT, GPTConfig, hardware_dtype
from svdtrain.optim import MuonAdamW, build_param_groups

GPU_BACKENDS = ("auto", "flash", "flash+cudnn", "flex", "flex+cudnn", "sdpa")
CPU_BACKENDS = ("auto", "sdpa")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(kw_only=True)
class Row:
    """One measurement; `error` is empty when it worked. Times are medians."""

    backend: str
    loss_chunk: int | None
    forward_backward_ms: float = float("nan")
    tokens_per_s: float = float("nan")
    mfu: float = float("nan")
    optimizer_ms: float = float("nan")
    peak_memory_gib: float = float("nan")
    first_step_s: float = float("nan")
    loss: float = float("nan")
    error: str = ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=12, help="number of blocks; width = 64 x depth")
    add("--batch", type=int, default=32, help="sequences per forward pass")
    add("--seq", type=int, default=2048, help="tokens per sequence")
    add("--vocab", type=int, default=32768)
    add("--variant", choices=("2026", "2025"), default="2026")
    add("--window-pattern", default="SSSL")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("auto", *DTYPES), default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    add("--backends", nargs="+", default=None, help="attention kernels; A+B: A for windows, B for full layers")
    add("--loss-chunks", nargs="+", type=int, default=None, help="rows of logits per chunk; 0: all; -1: the default")
    add("--steps", type=int, default=20, help="timed steps per row")
    add("--warmup", type=int, default=5, help="steps before timing, the compiling one included")
    add("--peak-tflops", type=float, default=989.0, help="what 100 percent MFU means")
    add("--mode", default=None, help="torch.compile mode, for example max-autotune-no-cudagraphs")
    add("--no-optimizer", action="store_true", help="skip the optimizer's timing")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    add("--out", type=Path, default=None, help="write the rows as JSON to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    on_gpu = torch.device(arguments.device).type == "cuda"
    backends = arguments.backends or (GPU_BACKENDS if on_gpu else CPU_BACKENDS)
    chunks = arguments.loss_chunks or ([0, 8192] if on_gpu else [-1, 0])
    # Every kernel with the first form of the loss, then the other forms with the first kernel.
    cases = [(backend, chunks[0]) for backend in backends] + [(backends[0], chunk) for chunk in chunks[1:]]
    rows = []
    print(describe(arguments), flush=True)
    print(HEADER, flush=True)
    for backend, chunk in cases:
        rows.append(measure(arguments, backend, None if chunk < 0 else chunk))
        print(format_row(rows[-1]), flush=True)
        if arguments.out:
            write_json(arguments, rows)


def measure(arguments: argparse.Namespace, backend: str, loss_chunk: int | None) -> Row:
    """One row; an exception becomes its `error`."""
    row = Row(backend=backend, loss_chunk=loss_chunk)
    torch._dynamo.reset()
    if torch.device(arguments.device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        fill(row, arguments)
    except Exception as error:  # any failure of a kernel or of the compiler belongs into the table
        row.error = f"{type(error).__name__}: {error}".replace("\n", " ")
    return row


def fill(row: Row, arguments: argparse.Namespace) -> None:
    """Build model and optimizer, time them, and write the figures into `row`."""
    device = torch.device(arguments.device)
    model = build_model(arguments, row, device)
    optimizer = MuonAdamW(build_param_groups(model, OptimConfig()))
    step: nn.Module = model
    if arguments.compile:
        step = torch.compile(model, dynamic=False, mode=arguments.mode)  # type: ignore[assignment]
    torch.manual_seed(0)
    tokens = torch.randint(0, arguments.vocab, (arguments.batch, arguments.seq + 1)).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def forward_backward() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = step(inputs, targets)
        loss.backward()
        return loss.detach()

    start = time.perf_counter()
    row.loss = float(forward_backward())
    row.first_step_s = time.perf_counter() - start
    row.forward_backward_ms = median_ms(forward_backward, arguments, device)
    num_tokens = inputs.numel()
    row.tokens_per_s = num_tokens / row.forward_backward_ms * 1e3
    row.mfu = row.tokens_per_s * model.estimate_flops_per_token() / (arguments.peak_tflops * 1e12)
    if device.type == "cuda":
        row.peak_memory_gib = torch.cuda.max_memory_allocated() / 2**30
    if not arguments.no_optimizer:
        row.optimizer_ms = median_ms(optimizer.step, arguments, device)


def build_model(arguments: argparse.Namespace, row: Row, device: torch.device) -> GPT:
    config = GPTConfig.from_depth(
        arguments.depth,
        vocab_size=arguments.vocab,
        sequence_len=arguments.seq,
        variant=arguments.variant,
        window_pattern=arguments.window_pattern,
    )
    dtype = hardware_dtype(device) if arguments.dtype == "auto" else DTYPES[arguments.dtype]
    with torch.device("meta"):
        model = GPT(config, dtype, attention_backend=row.backend, loss_chunk_tokens=row.loss_chunk)
    model.to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model


def median_ms(function: Callable[[], object], arguments: argparse.Namespace, device: torch.device) -> float:
    """Median milliseconds of one call after warm-up; on a GPU between events, so the host runs ahead as in training."""
    for _ in range(arguments.warmup):
        function()
    if device.type != "cuda":
        return statistics.median(_wall_ms(function) for _ in range(arguments.steps))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(arguments.steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:]))  # noqa: B905, RUF007


def _wall_ms(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


HEADER = (
    f"{'backend':<14}{'chunk':>7}{'fwd+bwd ms':>12}{'tokens/s':>12}{'MFU %':>8}{'optim ms':>10}"
    f"{'peak GiB':>10}{'1st step s':>12}{'loss':>9}  error"
)


def format_row(row: Row) -> str:
    chunk = "auto" if row.loss_chunk is None else str(row.loss_chunk)
    return (
        f"{row.backend:<14}{chunk:>7}{row.forward_backward_ms:>12.2f}{row.tokens_per_s:>12,.0f}{100 * row.mfu:>8.2f}"
        f"{row.optimizer_ms:>10.2f}{row.peak_memory_gib:>10.2f}{row.first_step_s:>12.1f}{row.loss:>9.4f}"
        f"  {row.error[:300]}"
    )


def describe(arguments: argparse.Namespace) -> str:
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return (
        f"torch {torch.__version__}, {name}; depth {arguments.depth}, {arguments.batch} x {arguments.seq} tokens, "
        f"vocabulary {arguments.vocab}, variant {arguments.variant}, windows {arguments.window_pattern}, "
        f"{'compiled' if arguments.compile else 'eager'}"
    )


def write_json(arguments: argparse.Namespace, rows: list[Row]) -> None:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    report = {"machine": describe(arguments), "settings": settings, "rows": [asdict(row) for row in rows]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
