"""The kernels that walk through time against the definition, on a GPU or in triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/ssm_blocks/test_triton_scan.py      without a GPU, where triton is installed
"""

import ast
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ssm_blocks
from ssm_blocks import Mixer, build
from ssm_blocks.experiments.ablations import BLOCK_DIAGONAL
from ssm_blocks.layers.monarch import monarch_apply
from ssm_blocks.ops import triton_scan
from ssm_blocks.ops.householder import householder_product_reference
from ssm_blocks.ops.reference import scan_reference
from tests.ssm_blocks.mixer_checks import assert_rms_close, rand, random_state, randomised

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = CPU if INTERPRETED else CUDA
runs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs triton, and a CUDA device or TRITON_INTERPRET=1",
)
Values = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """triton 3.6's interpreter as numpy >= 2.4 needs it, and patching its modules once a launch, not at every call."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter  # type: ignore[import-not-found]

    patch_tensor, launch, seen = interpreter._patch_lang_tensor, interpreter.GridExecutor.__call__, set()

    def patch_index(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def launch_afresh(self, *args, **kwargs):
        seen.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in seen:
            interpreter._patch_lang(self.fn)
            seen.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def values(function: Callable[..., Tensor], inputs: Values) -> Values:
    """States, and the gradients of a random functional of them."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    states = function(**leaves)
    loss = (states * rand(*states.shape, seed=50).to(states)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"states": states.detach(), "last": states[:, -1].detach(), **dict(zip(leaves, gradients, strict=True))}


def compare(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Values, dtype: torch.dtype
) -> None:
    """Against float64 on the same values: 1e-5 for float32, .01 for what is rounded to bfloat16 on the way out."""
    inputs = {name: x.to(DEVICE, dtype) for name, x in inputs.items()}
    got, want = values(kernel, inputs), values(reference, {name: x.double() for name, x in inputs.items()})
    assert got["states"].dtype == torch.float32
    assert all(got[name].dtype == dtype for name in inputs)
    assert_rms_close(got, want, 1e-5 if dtype == torch.float32 else 0.01)
    assert_rms_close({name: got[name] for name in ("states", "last")}, {"states": want["states"]}, 1e-5)


def dense_inputs(batch: int, length: int, heads: int, n: int) -> Values:
    M = rand(batch, length, heads, n, n) / n**0.5
    return {"M": M, "b": rand(batch, length, heads, n, seed=1), "h0": rand(batch, heads, n, seed=2)}


def dense_reference(M: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    return scan_reference(lambda t, h: (M[:, t] @ h.unsqueeze(-1)).squeeze(-1), b, h0)


def monarch_inputs(batch: int, length: int, heads: int, size: int, count: int) -> Values:
    token = (batch, length, heads)
    return {
        "u": F.normalize(rand(*token, 2, size, count, size), dim=-1),
        "beta": 2 * rand(*token, 2, size, count, seed=1).sigmoid(),
        "forget": (rand(*token, seed=2) + 3).sigmoid(),
        "b": rand(*token, size**2, seed=3),
        "h0": rand(batch, heads, size**2, seed=4),
    }


def monarch_reference(u: Tensor, beta: Tensor, forget: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    L, R = householder_product_reference(u, beta).unbind(3)
    return scan_reference(lambda t, h: forget[:, t, :, None] * monarch_apply(L[:, t], R[:, t], h), b, h0)


@runs_kernels
@pytest.mark.parametrize(
    ("batch", "length", "heads", "n"),
    [(1, 1, 1, 16), (3, 2, 1, 9), (1, 63, 1, 4), (1, 64, 1, 9), (1, 100, 1, 16), (1, 7, 5, 25), (1, 3, 1, 64)],
)
def test_dense_walk_equals_the_definition(batch: int, length: int, heads: int, n: int) -> None:
    compare(triton_scan.dense_scan, dense_reference, dense_inputs(batch, length, heads, n), torch.float32)


@runs_kernels
@pytest.mark.parametrize(
    ("batch", "length", "heads", "size", "count"),
    [(1, 1, 1, 4, 1), (3, 2, 1, 3, 2), (1, 63, 1, 2, 1), (1, 64, 1, 3, 1), (1, 100, 1, 4, 1), (1, 4, 3, 5, 3)],
)
def test_monarch_walk_equals_the_definition(batch: int, length: int, heads: int, size: int, count: int) -> None:
    inputs = monarch_inputs(batch, length, heads, size, count)
    compare(triton_scan.monarch_scan, monarch_reference, inputs, torch.float32)


@runs_kernels
def test_bfloat16_inputs() -> None:
    compare(triton_scan.dense_scan, dense_reference, dense_inputs(1, 10, 1, 9), torch.bfloat16)
    compare(triton_scan.monarch_scan, monarch_reference, monarch_inputs(1, 10, 1, 4, 2), torch.bfloat16)


@runs_kernels
def test_inputs_need_not_be_contiguous() -> None:
    inputs = {name: x.to(DEVICE, torch.float32) for name, x in dense_inputs(1, 4, 3, 4).items()}
    turned = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
    assert torch.equal(triton_scan.dense_scan(**turned), triton_scan.dense_scan(**inputs))


LAYERS = {
    "monarch": {"block_size": 3, "num_householder": 2},
    "monarch_cayley": {"block_size": 2},
    "monarch_signed_cayley": {"block_size": 2},
    BLOCK_DIAGONAL: {"block_size": 2},
}


def layer_values(mixer: Mixer, backend: str, x: Tensor, state: dict | None, bounds: Tensor | None) -> Values:
    mixer.backend = backend  # type: ignore[assignment]
    x = x.clone().requires_grad_()
    y, last = mixer(x, state, bounds, return_state=True)
    leaves = {"x": x, **dict(mixer.named_parameters())}
    loss = sum((v.float() * rand(*v.shape, seed=60).to(v.device)).sum() for v in (y, last["h"]))
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
    found = {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"y": y.detach(), "last": last["h"].detach(), **found}


@runs_kernels
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers_on_the_kernel_equal_the_definition(name: str, dtype: torch.dtype, ratio: float) -> None:
    mixer = randomised(build(name, 8, num_heads=1, **LAYERS[name]))
    state = {key: value.to(DEVICE) for key, value in random_state(mixer, 1, torch.float32).items()}
    mixer, x = mixer.to(DEVICE), rand(1, 9, 8).to(DEVICE, dtype)
    want = layer_values(mixer, "reference", x, state, None)
    assert_rms_close(layer_values(mixer, "triton", x, state, None), want, ratio)


@runs_kernels
def test_packed_sequences() -> None:
    mixer = randomised(build("monarch", 8, num_heads=1)).to(DEVICE)
    x, bounds = rand(1, 9, 8).to(DEVICE, torch.float32), torch.tensor([0, 1, 6, 9])
    want = layer_values(mixer, "reference", x, None, bounds)
    assert_rms_close(layer_values(mixer, "triton", x, None, bounds), want, 1e-4)


def test_when_triton_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan.installed, "triton_version", lambda: "3.10.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in ("auto", "triton"):
        assert triton_scan.use_triton(backend, torch.float32, CUDA, 64)
    for dtype, device, size, words in (
        (torch.float64, CUDA, 16, "float32"),
        (torch.float32, CPU, 16, "CUDA"),
        (torch.float32, CUDA, 81, "at most 64"),
    ):
        assert not triton_scan.use_triton("auto", dtype, device, size)
        with pytest.raises(ValueError, match=f"{words}.*backend='auto'"):
            triton_scan.use_triton("triton", dtype, device, size)
    for backend in ("torch", "reference"):
        assert not triton_scan.use_triton(backend, torch.float32, CUDA, 16)


def test_the_interpreter_is_only_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan.installed, "triton_version", lambda: "3.10.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_scan.use_triton("triton", torch.float32, CPU, 16)
    assert not triton_scan.use_triton("auto", torch.float32, CPU, 16)


@pytest.mark.parametrize(("version", "words"), [("", "not installed"), ("3.2.0", "3.3, 3.2.0 is installed")])
def test_a_missing_or_old_triton_is_said_once(version: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan.installed, "triton_version", lambda: version)
    triton_scan._say_once.cache_clear()
    with pytest.warns(UserWarning, match=words):
        assert not triton_scan.use_triton("auto", torch.float32, CUDA, 16)
    assert not triton_scan.use_triton("auto", torch.float32, CUDA, 16)  # a second warning would be an error
    with pytest.raises(ValueError, match=words):
        triton_scan.use_triton("triton", torch.float32, CUDA, 16)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    mixer = build("monarch", 8, backend="triton")
    x = rand(1, 4, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="CUDA"):
        mixer(x)
    mixer.step(x[:, 0], mixer.init_state(1))  # decoding needs no kernel
    with pytest.raises(ValueError, match="no Triton kernel for DeltaNet"):
        build("deltanet", 8, backend="triton")


def test_triton_is_imported_only_where_a_kernel_runs() -> None:
    """At module level, `triton` by the kernels' file only, and that file by nobody."""
    importers = {"triton": set(), "ssm_blocks.ops.triton_kernels": set()}
    assert ssm_blocks.__file__ is not None
    for path in Path(ssm_blocks.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            for name in importers.keys() & set(names):
                importers[name].add(path.name)
    assert importers == {"triton": {"triton_kernels.py"}, "ssm_blocks.ops.triton_kernels": set()}
