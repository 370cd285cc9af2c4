"""Time the Monarch layer on a CUDA device: our Triton kernel against the scans in torch, in one run.

    python scripts/bench_monarch.py --json monarch.json
    python scripts/bench_monarch.py --mixer monarch_cayley --shapes 32x512x768 --dtype fp32

First the kernel's states and gradients are compared with the scan in torch, both in float32, against float64. Then, for
every shape batch x tokens x width: milliseconds of the layer and of its recurrence alone (making the blocks included),
forward, and forward and backward; and the memory that forward and backward take. Medians. A form that fails, for want
of memory for example, has its error in its row. Exits with 1 where the kernel is off.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from ssm_blocks import build
from ssm_blocks.experiments.timing import median_ms
from ssm_blocks.layers.base import Call
from ssm_blocks.layers.monarch import MonarchGated

LIMIT = 1e-5  # of the RMS of the difference over the RMS of the value, or three times what torch's own float32 is off
SHAPES = ((256, 20, 64), (32, 512, 768), (8, 2048, 768), (1, 16384, 768))
FORMS = ("triton", "torch blelloch", "torch doubling")
CHECKS: tuple[tuple[str, int, dict], ...] = (
    ("monarch", 100, {}),
    ("monarch", 63, {"block_size": 3, "num_householder": 2}),
    ("monarch", 7, {"block_size": 5}),
    ("monarch", 33, {"block_size": 8, "num_householder": 4}),
    ("monarch_cayley", 100, {}),
    ("monarch_cayley", 20, {"block_size": 5}),
    ("monarch_signed_cayley", 20, {"block_size": 8}),
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Values = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form of one shape; milliseconds, and GB above what was taken before."""

    shape: tuple[int, int, int]
    heads: int
    form: str
    layer: tuple[float, float] | None = None  # forward, forward and backward
    recurrence: tuple[float, float] | None = None
    memory_gb: float | None = None
    error: str = ""


def main() -> int:
    arguments = parse_arguments()
    device = torch.device("cuda")
    began = time.monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.mixer}, {arguments.dtype}")
    checks = [check(*case, device) for case in CHECKS]
    if arguments.tf32:
        torch.set_float32_matmul_precision("high")
    rows = []
    print(HEADER, flush=True)
    for shape in arguments.shapes:
        for form in arguments.forms:
            over = time.monotonic() - began > arguments.seconds
            row = Row(shape=shape, heads=0, form=form, error="left out: the time was used up")
            rows.append(row if over else measure(shape, form, arguments, device))
            print(table_line(rows[-1]), flush=True)
    content = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "arguments": {"mixer": arguments.mixer, "dtype": arguments.dtype, "tf32": arguments.tf32},
        "checks": checks,
        "rows": list(map(asdict, rows)),
        "seconds": time.monotonic() - began,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))
    return 0 if all(found["good"] for found in checks) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", type=parse_shape, nargs="+", default=SHAPES, help="batch x tokens x width, as 32x512x768")
    add("--forms", nargs="+", default=FORMS, choices=FORMS)
    add("--mixer", default="monarch", choices=("monarch", "monarch_cayley", "monarch_signed_cayley"))
    add("--block-size", type=int, default=4)
    add("--num-householder", type=int, default=1, help="reflections a block, of monarch")
    add("--dtype", default="bf16", choices=sorted(DTYPES), help="of the activations; the recurrence is in float32")
    add("--tf32", action="store_true", help="float32 products on tensor cores, as svdtrain has them")
    add("--repeats", type=int, default=10)
    add("--seconds", type=float, default=75.0, help="after which no further row is begun")
    add("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this times CUDA kernels; no CUDA device is here")
    return arguments


def parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"a shape is batch x tokens x width, as 32x512x768, got {text!r}")
    batch, length, width = map(int, parts)
    return batch, length, width


# is it right? ---------------------------------------------------------------------------------------------------------


def check(name: str, length: int, options: dict, device: torch.device) -> dict:
    """RMS ratios to the scan in float64, of the kernel and of the scan in float32; prints them."""
    what = f"{name} T={length} {options}"
    try:
        mixer = make(name, 24, device, num_heads=3, **options)
        x = torch.randn(3, length, 24, device=device)
        leaves = leaves_of(mixer, x)
        exact = {key: value.detach().double().requires_grad_() for key, value in leaves.items()}
        want = states_and_gradients(copy.deepcopy(mixer).double(), exact, "torch blelloch")
        ratios = {form: ratios_to(want, states_and_gradients(mixer, leaves, form)) for form in FORMS[:2]}
    except Exception as error:  # whatever a kernel or its compiler raises belongs into the report
        print(f"{what:60s} FAILED {error!r}"[:400], flush=True)
        return {"what": what, "good": False, "error": repr(error)[:2000]}
    ours, theirs = (ratios[form] for form in FORMS[:2])
    good = all(ratio <= max(LIMIT, 3 * theirs[key]) for key, ratio in ours.items())
    print(f"{what:60s} {'ok ' if good else 'OFF'}", flush=True)
    for form, found in ratios.items():
        print(f"    {form:15s}" + ", ".join(f"{key} {ratio:.1e}" for key, ratio in found.items()), flush=True)
    return {"what": what, "good": good, "ratios": ratios}


def make(name: str, width: int, device: torch.device, **options) -> MonarchGated:
    torch.manual_seed(0)
    mixer = build(name, width, **options)
    assert isinstance(mixer, MonarchGated)
    return mixer.to(device)


def leaves_of(mixer: MonarchGated, x: Tensor) -> Values:
    """What the recurrence needs for x, and its first state h."""
    with torch.no_grad():
        inputs = mixer._inputs(x, mixer._features(x))
        leaves = {**inputs, "h": mixer.init_state(x.size(0), x.device, x.dtype)["h"]}
    return {key: value.detach().contiguous().requires_grad_() for key, value in leaves.items()}


def states_of(mixer: MonarchGated, leaves: Values) -> Tensor:
    inputs = {key: value for key, value in leaves.items() if key != "h"}
    return mixer._states(inputs, leaves["h"], Call("parallel", leaves["h"].dtype))


def states_and_gradients(mixer: MonarchGated, leaves: Values, form: str) -> Values:
    use(mixer, form)
    states = states_of(mixer, leaves)
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
    gradients = torch.autograd.grad((states * weight).sum(), list(leaves.values()))
    return {"states": states.detach(), **{f"d {key}": g for key, g in zip(leaves, gradients, strict=True)}}


def ratios_to(want: Values, got: Values) -> dict[str, float]:
    return {key: rms_ratio(value, want[key]) for key, value in got.items()}


def use(mixer: MonarchGated, form: str) -> None:
    backend, _, method = form.partition(" ")
    mixer.backend, mixer.method = backend, method or mixer.method  # type: ignore[assignment]


def rms_ratio(got: Tensor, want: Tensor) -> float:
    """RMS of the difference over RMS of the value; infinity where a NaN is."""
    size, error = want.square().mean().sqrt().item(), (got.double() - want).square().mean().sqrt().item()
    return error / size if error == error and size > 0 else float("inf")


# how fast is it? ------------------------------------------------------------------------------------------------------


def measure(shape: tuple[int, int, int], form: str, arguments: argparse.Namespace, device: torch.device) -> Row:
    batch, length, width = shape
    reflections = {"num_householder": arguments.num_householder} if arguments.mixer == "monarch" else {}
    mixer = make(arguments.mixer, width, device, block_size=arguments.block_size, **reflections)
    use(mixer, form)
    row = Row(shape=shape, heads=mixer.num_heads, form=form)
    x = torch.randn(batch, length, width, device=device, dtype=DTYPES[arguments.dtype])
    try:
        torch.cuda.empty_cache()
        leaves = leaves_of(mixer, x)
        alone = both_ways(lambda: states_of(mixer, leaves), list(leaves.values()), arguments.repeats, device)
        x.requires_grad_()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        whole = both_ways(lambda: mixer(x), [x, *mixer.parameters()], arguments.repeats, device)  # type: ignore[arg-type]
        memory = (torch.cuda.max_memory_allocated(device) - before) / 1e9
        return replace(row, layer=whole, recurrence=alone, memory_gb=memory)
    except Exception as error:  # a form that does not fit must not take the others' figures with it
        return replace(row, error=repr(error)[:300])


def both_ways(
    function: Callable[[], Tensor], leaves: list[Tensor], repeats: int, device: torch.device
) -> tuple[float, float]:
    """Milliseconds of forward without gradients, and of forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            function()

    with torch.no_grad():
        weight = torch.randn_like(function())

    def train() -> None:
        torch.autograd.grad(function(), leaves, weight)

    return median_ms(forward, repeats, 3, device), median_ms(train, repeats, 3, device)


HEADER = (
    "batch x tokens x width  heads  form            layer ms: fwd  fwd+bwd   recurrence ms: fwd  fwd+bwd   memory GB"
)


def table_line(row: Row) -> str:
    start = f"{' x '.join(map(str, row.shape)):22s}  {row.heads:5d}  {row.form:15s}"
    if row.layer is None or row.recurrence is None:
        return f"{start} {row.error}"
    return (
        f"{start} {row.layer[0]:13.3f}  {row.layer[1]:7.3f}   {row.recurrence[0]:18.3f}  {row.recurrence[1]:7.3f}"
        f"   {row.memory_gb:9.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
