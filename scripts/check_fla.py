"""Compare flash-linear-attention's kernels, as ssm_blocks calls them, with the definitions token by token.

    python scripts/check_fla.py --out docs/results/fla.json       on a CUDA device with fla-core[cuda] installed
    python scripts/check_fla.py --only delta_rule --lengths 100   one operator; rows of others in --out are kept
    python scripts/check_fla.py --publish                         the table in docs/SSM.md, on any machine

Each operator compiles for minutes at its first call (2 to 5 on an H200), and again for every layer whose sizes differ:
--only keeps that in bounds. bf16; outputs, last state and every gradient by the RMS of the difference over the RMS of
the value, at most .01. Both sides get the same inputs, rounded to bf16 on the way into the kernel, so that what differs
is the kernel. Where G_t is learned (cs_*, dplr_ltv), fla serves inference, so those layers are compared without
gradients. So is what fla refuses to differentiate on this machine, where `auto` knows that and takes the torch form:
"refused". Exits with 1 if any value is off, or if fla fails in any other way.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path[:0] = [str(parent) for parent in Path(__file__).resolve().parents[:2]]

import torch
import torch.nn.functional as F
from marked_table import put_between
from torch import Tensor

from ssm_blocks import Mixer, build
from ssm_blocks.ops import fla
from ssm_blocks.ops.reference import delta_rule_reference, dplr_reference, linear_attention_reference

LIMIT = 0.01
BATCH, HEADS, FEW = 2, 4, 32
LAYERS: dict[str, dict] = {
    "deltanet": {},
    "neg_deltanet": {},
    "deltaproduct": {},
    "ssd_deltanet": {},
    "gated_ssd_deltanet": {},
    "segmented_hss": {"num_heads": 1, "rank": 16},
    "cs_deltanet": {},
    "cs_neg_deltanet": {},
    "dplr_ltv": {},
}
CHOOSING = ("cs_deltanet", "cs_neg_deltanet", "dplr_ltv")
DECAYING = ("gated_delta_rule", "linear_attention", "gated_ssd_deltanet", "segmented_hss")
ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results" / "fla.json", ROOT / "docs" / "SSM.md"
MARKS = ("<!-- table of scripts/check_fla.py -->", "<!-- end of the table of scripts/check_fla.py -->")
Outputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """RMS ratios by value, or why there are none. refused: why our own code takes no gradients of this kernel here."""

    what: str
    length: int
    ratios: dict[str, float]
    seconds: float
    error: str = ""
    refused: str = ""

    @property
    def good(self) -> bool:
        return (bool(self.refused) or not self.error) and all(ratio <= LIMIT for ratio in self.ratios.values())

    @property
    def outcome(self) -> str:
        """For the table: ok, refused, or OFF."""
        if not self.good:
            return f"OFF {self.error}".strip()
        return f"refused: {self.refused}" if self.refused else "ok"


def main() -> int:
    arguments = parse_arguments()
    if arguments.publish:
        publish()
        return 0
    device = torch.device("cuda")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "fla-core")}
    content: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions, "limit": LIMIT}
    rows, known = [], read_rows(arguments.out, content)
    print(f"{content['device']}, {versions}\n{HEADER}", flush=True)
    for length, (check, name) in product(arguments.lengths, checks(arguments.dim)):
        if arguments.only and name not in arguments.only:
            continue
        rows.append(check(name, length, device))
        print(line(rows[-1]), flush=True)  # the first call of a kernel compiles for minutes
        if arguments.out:
            known[rows[-1].what, length] = rows[-1]
            content["rows"] = list(map(asdict, known.values()))
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row.good for row in rows) else 1


def read_rows(path: Path | None, here: dict[str, Any]) -> dict[tuple[str, int], Row]:
    """Earlier rows of the same machine and versions, by what and length. Exits where the file is of others."""
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text())
    if any(content[key] != here[key] for key in ("device", "versions")):
        raise SystemExit(f"{path} holds rows of {content['device']}, {content['versions']}: give another --out")
    return {(row["what"], row["length"]): Row(**row) for row in content["rows"]}


def checks(dim: int) -> list[tuple[Callable[[str, int, torch.device], Row], str]]:
    """Every operator, then every layer of width dim, with the function that checks it."""
    layer = partial(check_layer, dim=dim)
    return [*((check_operator, name) for name in OPERATORS), *((layer, name) for name in LAYERS)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 100, 500])
    parser.add_argument("--dim", type=int, default=256)
    names = [*OPERATORS, *LAYERS]
    parser.add_argument("--only", nargs="+", default=None, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--publish", action="store_true", help="only write the table, from docs/results/fla.json")
    arguments = parser.parse_args()
    if not arguments.publish and not torch.cuda.is_available():
        parser.error("this compares CUDA kernels; no CUDA device is here")
    return arguments


# operators ------------------------------------------------------------------------------------------------------------


def random_inputs(length: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs that bf16 holds exactly, as float32, ready for gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    token = (BATCH, length, HEADS)
    direction = F.normalize(draw(*token, 64), dim=-1)
    values = {
        "q": F.normalize(draw(*token, 64), dim=-1),
        "k": F.normalize(draw(*token, 64), dim=-1),
        "v": draw(*token, 64),
        "beta": 2 * draw(*token).sigmoid(),
        "log_decay": F.logsigmoid(draw(*token) + 3),
        "b": direction,
        "a": -2 * draw(*token, 1).sigmoid() * direction,
        "channel_decay": -5 * (draw(*token, 64) - 3).sigmoid(),
        "S": 0.5 * draw(BATCH, HEADS, 64, 64),
    }
    return {name: value.bfloat16().float().requires_grad_() for name, value in values.items()}


def few(*keys: Tensor) -> list[Tensor]:
    """Narrower than the values, as where permutations are learned."""
    return [key[..., :FEW] for key in keys]


KERNELS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "delta_rule": (
        lambda q, k, v, beta, S: fla.delta_rule(q, k, v, beta, None, S, torch.bfloat16),
        lambda q, k, v, beta, S: delta_rule_reference(q, k, v, beta, None, S),
        ("q", "k", "v", "beta", "S"),
    ),
    "delta_rule_few_keys": (
        lambda q, k, v, beta, S: fla.delta_rule(*few(q, k), v, beta, None, S[..., :FEW, :], torch.bfloat16),
        lambda q, k, v, beta, S: delta_rule_reference(*few(q, k), v, beta, None, S[..., :FEW, :]),
        ("q", "k", "v", "beta", "S"),
    ),
    "gated_delta_rule": (
        lambda q, k, v, beta, g, S: fla.delta_rule(q, k, v, beta, g, S, torch.bfloat16),
        delta_rule_reference,
        ("q", "k", "v", "beta", "log_decay", "S"),
    ),
    "dplr": (
        lambda q, k, v, a, b, g, S: fla.dplr(q, k, v, a, b, g, S, torch.bfloat16),
        dplr_reference,
        ("q", "k", "v", "a", "b", "channel_decay", "S"),
    ),
    "linear_attention": (
        lambda q, k, v, g, S: fla.linear_attention(q, k, v, g, S, torch.bfloat16),
        linear_attention_reference,
        ("q", "k", "v", "log_decay", "S"),
    ),
}
OPERATORS = tuple(KERNELS)


def check_operator(name: str, length: int, device: torch.device) -> Row:
    kernel, reference, names = KERNELS[name]
    inputs = random_inputs(length, device)
    leaves = {key: inputs[key] for key in names}

    def values(function: Callable, gradients: bool) -> Outputs:
        with torch.set_grad_enabled(gradients):
            o, S = function(*leaves.values())
        found = {"o": o, "state": S}
        return with_gradients(found, leaves) if gradients else found

    return compare(f"op {name}", length, partial(values, kernel), partial(values, reference), avoided(name, device))


# layers ---------------------------------------------------------------------------------------------------------------


def check_layer(name: str, length: int, device: torch.device, dim: int) -> Row:
    torch.manual_seed(0)
    mixer = build(name, dim, **LAYERS[name]).to(device)
    x = torch.randn(BATCH, length, dim, device=device).bfloat16().requires_grad_()

    mixer.backend = "fla"  # type: ignore[assignment]

    def values(gradients: bool) -> Outputs:
        gradients = gradients and name not in CHOOSING
        with torch.set_grad_enabled(gradients):
            y, state = mixer(x, return_state=True)
        found = {"y": y, **{f"state {key}": value for key, value in state.items()}}
        return with_gradients(found, leaves_of(mixer, x)) if gradients else found

    def by_definition(gradients: bool) -> Outputs:
        with definitions_for_kernels():
            return values(gradients)

    return compare(name, length, values, by_definition, avoided(name, device))


@contextmanager
def definitions_for_kernels() -> Iterator[None]:
    """fla's kernels replaced by the definitions, in float32 on inputs rounded as for the kernels."""

    def rounded(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return [x.to(dtype).float() for x in tensors]

    def delta_rule(q, k, v, beta, log_decay, S, dtype):
        return delta_rule_reference(*rounded(q, k, v, beta, dtype=dtype), log_decay, S)  # type: ignore[call-arg]

    def dplr(q, k, v, a, b, log_decay, S, dtype):
        return dplr_reference(*rounded(q, k, v, a, b, dtype=dtype), log_decay, S)  # type: ignore[call-arg]

    def linear_attention(q, k, v, log_decay, S, dtype):
        return linear_attention_reference(*rounded(q, k, v, dtype=dtype), log_decay, S)  # type: ignore[call-arg]

    definitions = {f.__name__: f for f in (delta_rule, dplr, linear_attention)}
    kernels = {name: getattr(fla, name) for name in definitions}
    try:
        for name, definition in definitions.items():
            setattr(fla, name, definition)
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(fla, name, kernel)


def leaves_of(mixer: Mixer, x: Tensor) -> dict[str, Tensor]:
    return {"x": x, **dict(mixer.named_parameters())}


# both -----------------------------------------------------------------------------------------------------------------


def with_gradients(outputs: Outputs, leaves: dict[str, Tensor]) -> Outputs:
    """The outputs, and the gradients of a fixed random functional of them."""
    generator = torch.Generator(next(iter(leaves.values())).device).manual_seed(1)
    loss = sum(
        (value.float() * torch.randn(value.shape, generator=generator, device=value.device)).sum()
        for value in outputs.values()
    )
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {**outputs, **found}


def avoided(name: str, device: torch.device) -> str:
    """Why `backend="auto"` leaves this kernel's gradients alone on this machine, by the rule it goes by; "" if not."""
    return fla.trouble_with_decays(device) if name in DECAYING else ""


Values = Callable[[bool], Outputs]  # with gradients or without


def compare(what: str, length: int, fast: Values, slow: Values, avoided: str = "") -> Row:
    """One row. An exception of a kernel or its compiler becomes the row's error; where our code avoids the gradients,
    it is their refusal, and the rest is compared without them."""
    start = time.perf_counter()
    ratios, error, refused = *ratios_of(fast, slow, gradients=True), ""
    if error and avoided:
        ratios, other = ratios_of(fast, slow, gradients=False)
        error, refused = (other, "") if other else (error, avoided)
    seconds = time.perf_counter() - start
    return Row(what=what, length=length, ratios=ratios, seconds=seconds, error=error, refused=refused)


def ratios_of(fast: Values, slow: Values, gradients: bool) -> tuple[dict[str, float], str]:
    """(RMS ratio of every value, what was raised)."""
    try:
        got, want = fast(gradients), slow(gradients)
        return {name: rms_ratio(got[name], value) for name, value in want.items()}, ""
    except Exception as error:  # whatever a kernel raises belongs into the table
        return {}, f"{error!r}"[:300]


def rms_ratio(got: Tensor, want: Tensor) -> float:
    """RMS of the difference over RMS of the value; 0 where both vanish, infinity where a NaN is."""
    got, want = got.detach().double(), want.detach().double()
    size, error = want.square().mean().sqrt().item(), (got - want).square().mean().sqrt().item()
    if error != error:
        return float("inf")
    return error / size if size > 0 else float(error > 0)


HEADER = "what                    T     outputs  state    gradients (worst)              seconds"


def summary(row: Row) -> tuple[float | None, float | None, float | None, str]:
    """(outputs, last state, worst gradient) of a row, None where there is none, and which gradient that is."""
    gradients = {name: ratio for name, ratio in row.ratios.items() if name.startswith("grad ")}
    worst = max(gradients, key=lambda name: gradients[name], default="")
    states = max((ratio for name, ratio in row.ratios.items() if name.startswith("state")), default=None)
    return row.ratios.get("y", row.ratios.get("o")), states, gradients.get(worst), worst


def line(row: Row) -> str:
    *ratios, worst = summary(row)
    output, state, gradient = ("   -   " if ratio is None else f"{ratio:.5f}" for ratio in ratios)
    return (
        f"{row.what:22s} {row.length:5d}  {output}  {state}  {gradient} {worst:22s} {row.seconds:6.1f}  {row.outcome}"
    )


# the page -------------------------------------------------------------------------------------------------------------


def publish() -> None:
    """Write the table into docs/SSM.md."""
    put_between(PAGE, MARKS, table(json.loads(RESULTS.read_text())))
    print(f"wrote the table of {RESULTS.relative_to(ROOT)} into {PAGE.relative_to(ROOT)}")


def table(content: dict[str, Any]) -> list[str]:
    """The lines between the marks."""
    rows = [Row(**row) for row in content["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    run = {row.what for row in rows}
    missing = [name for name in (*(f"op {name}" for name in OPERATORS), *LAYERS) if name not in run]
    notes = [f"`{row.what}`: fla {row.refused}; `auto` takes the torch form there." for row in rows if row.refused]
    return [
        f"On one {content['device']}, {versions}, in bf16: root mean square of the",
        f"difference over that of the value, to be at most {content['limit']}. Names without `op` are whole layers.",
        "",
        "| kernel | T | outputs | last state | worst gradient | |",
        "|---|---|---|---|---|---|",
        *map(table_line, rows),
        "",
        *(part for note in notes for part in (note, "")),
        *([f"Not run yet: {', '.join(f'`{name}`' for name in missing)}.", ""] if missing else []),
        "`python scripts/check_fla.py --out docs/results/fla.json`, then `--publish`",
    ]


def table_line(row: Row) -> str:
    *ratios, worst = summary(row)
    cells = ["-" if ratio is None else f"{ratio:.4f}" for ratio in ratios]
    if row.refused:
        cells[2] = "refused"
    elif worst:
        cells[2] += f" ({worst.removeprefix('grad ')})"
    return f"| `{row.what}` | {row.length:,} | {' | '.join(cells)} | {row.outcome.split(':')[0].split(' ')[0]} |"


if __name__ == "__main__":
    sys.exit(main())
