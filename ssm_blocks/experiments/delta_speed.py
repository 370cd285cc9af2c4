"""002: the delta rule with all chunks in one batched pass, against the naive WY token loop and fla's kernel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_blocks.experiments.counting import OperationCounter
from ssm_blocks.experiments.delay import per_seed
from ssm_blocks.experiments.experiment import Arm, Column, Criterion, Experiment, Row, criterion, values_of
from ssm_blocks.experiments.timing import median_ms, tensor_cores
from ssm_blocks.experiments.token_experiment import number
from ssm_blocks.ops import fla
from ssm_blocks.ops.delta import chunk_delta_rule

HEADS, CHUNK = 8, 64
HEAD_DIMS = (64, 128, 256)
LENGTHS = (1024, 4096, 16384)
NAIVE_LENGTH, NAIVE_DIM = 1024, 64
TOKENS = 16384  # batch x length
AGAINST_NAIVE = "Against the naive WY token loop, float32"
AGAINST_FLA = "Forward and backward over length and head width, 16,384 tokens, 8 heads; bf16 inputs on CUDA"
Form = Callable[..., tuple[Tensor, Tensor]]


def naive_wy(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: None, S: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The delta rule by the WY representation as it is usually written down first: within a chunk token by token,
    w_t = beta_t (k_t - sum_j (k_t . k_j) w_j), u_t likewise from v_t; then chunk by chunk. Shapes as in
    `reference.delta_rule_reference`; the length is a multiple of the chunk.
    """
    outputs = []
    for start in range(0, q.size(1), chunk):
        Q, K, V, B = (x[:, start : start + chunk].transpose(1, 2) for x in (q, k, v, beta.unsqueeze(-1)))
        W, U = B[:, :, :1] * K[:, :, :1], B[:, :, :1] * V[:, :, :1]
        for t in range(1, chunk):
            here = slice(t, t + 1)
            overlap = K[:, :, here] @ K[:, :, :t].mT
            W = torch.cat([W, B[:, :, here] * (K[:, :, here] - overlap @ W)], 2)
            U = torch.cat([U, B[:, :, here] * (V[:, :, here] - overlap @ U)], 2)
        new = U - W @ S
        outputs.append((Q @ S + (Q @ K.mT).tril() @ new).transpose(1, 2))
        S = S + K.mT @ new
    return torch.cat(outputs, 1), S


def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: None, S: Tensor) -> tuple[Tensor, Tensor]:
    """`ssd_deltanet`'s form; inputs of any type, float32 inside."""
    return chunk_delta_rule(*(x.float() for x in (q, k, v, beta)), None, S, CHUNK, "block")  # type: ignore[call-arg]


def by_fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: None, S: Tensor) -> tuple[Tensor, Tensor]:
    """fla's chunk_delta_rule. Raises RuntimeError where it cannot run."""
    if q.device.type != "cuda" or importlib.util.find_spec("fla") is None:
        raise RuntimeError("fla's kernels need a CUDA device and the package fla-core[cuda]")
    return fla.delta_rule(q, k, v, beta, None, S, torch.bfloat16)


FORMS: dict[str, Form] = {"ours": ours, "naive": naive_wy, "fla": by_fla}


def _why(head_dim: int) -> str:
    """What counting the calls of a pass and the bytes they write shows (`counting.OperationCounter`)."""
    where = (
        "a GPU waits for them: for the same number of tokens they, and the time, grow with the length, as more chunks "
        "hand on their state one group after the other"
        if head_dim < max(HEAD_DIMS)
        else "they write tens of gigabytes of float32 between them: maps from state to state, K x (K + V) for every "
        "chunk, which are composed in groups"
    )
    return (
        f"ours is a few hundred calls of torch a pass, in float32, and {where}. fla's are a handful of fused kernels "
        "in bf16, after minutes of compilation, which the times leave out."
    )


class DeltaSpeed(Experiment):
    """No training: times are of one forward and backward pass."""

    name = "delta_speed"
    proposal = "002"
    question = "How fast is the chunked delta rule, how exact, and how much of it is products of matrices?"
    columns = (
        Column(title="forward ms", value=lambda row: row.get("forward_ms"), format=".2f"),
        Column(title="forward + backward ms", value=lambda row: row.get("ms"), format=".2f"),
        number("tokens/s", "tokens_per_s"),
        Column(title="difference from naive", value=lambda row: row.get("difference"), format=".1e"),
        Column(title="share in products", value=lambda row: row.get("share"), format=".3f"),
    )

    reasons: ClassVar = {f"fla's time / ours, heads of {dim}, all lengths": _why(dim) for dim in HEAD_DIMS}

    def arms(self) -> list[Arm]:
        first = [_arm(name, NAIVE_LENGTH, NAIVE_DIM, AGAINST_NAIVE, "float32") for name in ("ours", "naive")]
        grid = [
            _arm(name, length, dim, AGAINST_FLA, "bfloat16")
            for dim in HEAD_DIMS
            for length in LENGTHS
            for name in ("ours", "fla")
        ]
        return first + grid

    def settings(self, quick: bool) -> dict[str, Any]:
        """Quick: 128 tokens, without fla."""
        return {"tokens": 128, "repeats": 1} if quick else {"tokens": TOKENS, "repeats": 7}

    def run(self, arm: Arm, seed: int, settings: dict[str, Any], device: torch.device) -> Row:
        config = arm.config
        length = min(config["length"], settings["tokens"])
        batch = 1 if config["type"] == "float32" else max(1, settings["tokens"] // length)
        dtype = torch.bfloat16 if config["type"] == "bfloat16" and device.type == "cuda" else torch.float32
        inputs = make_inputs(batch, length, config["head_dim"], seed, dtype, device)
        if config["form"] == "fla" and settings["quick"]:
            return {"skipped": "fla takes no part in quick runs"}
        row = times(FORMS[config["form"]], inputs, settings["repeats"], device)
        row["tokens_per_s"] = 1000 * batch * length / row["ms"]
        if config["type"] == "float32":
            row |= exactness(FORMS[config["form"]], inputs)
        if config["form"] == "fla":
            row["fla"] = importlib.metadata.version("fla-core")
        return row

    def judge(self, rows: list[Row]) -> list[Criterion]:
        naive, own = f"naive_{NAIVE_LENGTH}_{NAIVE_DIM}_float32", f"ours_{NAIVE_LENGTH}_{NAIVE_DIM}_float32"
        found = [
            criterion("naive time / ours", per_seed(rows, naive, own, lambda a, b: a["ms"] / b["ms"]), above=1.3),
            criterion(
                "difference from naive", values_of(rows, own, lambda r: r["difference"]), below=1e-5, format=".1e"
            ),
            criterion(
                "share of operations in products of matrices", values_of(rows, own, lambda r: r["share"]), above=0.6
            ),
        ]
        for dim in HEAD_DIMS:
            pairs = [
                value
                for length in LENGTHS
                for value in per_seed(rows, f"fla_{length}_{dim}", f"ours_{length}_{dim}", _faster)
            ]
            found.append(criterion(f"fla's time / ours, heads of {dim}, all lengths", pairs, above=1.0, format=".2f"))
        return found


def make_inputs(
    batch: int, length: int, head_dim: int, seed: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """q, k unit vectors, beta in (0, 1), a zero state (float32); all but the state want gradients."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, length, HEADS, *shape, generator=generator, device=device)

    values = {
        "q": F.normalize(draw(head_dim), dim=-1),
        "k": F.normalize(draw(head_dim), dim=-1),
        "v": draw(head_dim),
        "beta": draw().sigmoid(),
    }
    found = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
    return {**found, "S": torch.zeros(batch, HEADS, head_dim, head_dim, device=device)}


def times(form: Form, inputs: dict[str, Tensor], repeats: int, device: torch.device) -> Row:
    """Median milliseconds of the forward pass alone and of both; the first calls, which compile, are left out."""
    core = [inputs[name] for name in ("q", "k", "v", "beta")]
    weight = torch.randn_like(inputs["v"])

    @torch.no_grad()
    def forward() -> None:
        form(*core, None, inputs["S"])

    def both() -> None:
        o, _ = form(*core, None, inputs["S"])
        torch.autograd.grad((o * weight).sum(), core)

    warmup = min(3, repeats)
    with tensor_cores() if inputs["q"].dtype == torch.bfloat16 else nullcontext():
        return {
            "forward_ms": median_ms(forward, repeats, warmup, device),
            "ms": median_ms(both, repeats, warmup, device),
        }


@torch.no_grad()
def exactness(form: Form, inputs: dict[str, Tensor]) -> Row:
    """Largest difference from the naive form, and the share of operations in products of matrices."""
    x = [inputs[name] for name in ("q", "k", "v", "beta")]
    counter = OperationCounter()
    with counter:
        got = form(*x, None, inputs["S"])
    want = naive_wy(*x, None, inputs["S"])  # type: ignore[call-arg]
    difference = max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))
    return {"difference": difference, "share": counter.share}


def _arm(form: str, length: int, head_dim: int, group: str, dtype: str) -> Arm:
    name = f"{form}_{length}_{head_dim}" + ("_float32" if dtype == "float32" else "")
    config = {"form": form, "length": length, "head_dim": head_dim, "type": dtype}
    return Arm(name=name, group=group, config=config, exclusive=True)


def _faster(fla_row: Row, own: Row) -> float:
    """How much longer fla takes; NaN-free because skipped rows have no time."""
    return fla_row["ms"] / own["ms"] if "ms" in fla_row and "ms" in own else 0.0


EXPERIMENT = DeltaSpeed()
