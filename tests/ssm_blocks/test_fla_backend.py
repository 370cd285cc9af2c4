"""The bridge to fla: when it is taken, and that arguments arrive in fla's conventions (with a stand-in for fla)."""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ssm_blocks import build
from ssm_blocks.ops import fla
from ssm_blocks.ops.reference import delta_rule_reference, dplr_reference, linear_attention_reference
from tests.ssm_blocks.mixer_checks import rand, run

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def check(q: Tensor, initial_state: Tensor, scale: float, output_final_state: bool) -> None:
    assert q.dtype == torch.bfloat16
    assert initial_state.dtype == torch.float32
    assert (scale, output_final_state) == (1.0, True)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.float() for x in tensors]


def chunk_delta_rule(q, k, v, beta, scale, initial_state, output_final_state):
    check(q, initial_state, scale, output_final_state)
    assert q.size(-1) >= v.size(-1), "wrong on a GPU"
    return delta_rule_reference(*wide(q, k, v, beta), None, initial_state)


def chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state):
    check(q, initial_state, scale, output_final_state)
    return delta_rule_reference(*wide(q, k, v, beta), g, initial_state)


def chunk_dplr_delta_rule(q, k, v, a, b, gk, scale, initial_state, output_final_state):
    """fla: S <- (D + b a^T) S + k v^T."""
    check(q, initial_state, scale, output_final_state)
    q, k, v, a, b = wide(q, k, v, a, b)
    return dplr_reference(q, k, v, b, a, gk, initial_state)


def chunk_simple_gla(q, k, v, g, scale, initial_state, output_final_state):
    check(q, initial_state, scale, output_final_state)
    return linear_attention_reference(*wide(q, k, v), g, initial_state)


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {
        "fla.ops.delta_rule": chunk_delta_rule,
        "fla.ops.gated_delta_rule": chunk_gated_delta_rule,
        "fla.ops.generalized_delta_rule.dplr": chunk_dplr_delta_rule,
        "fla.ops.simple_gla": chunk_simple_gla,
    }
    for name in ("fla", "fla.ops", "fla.ops.generalized_delta_rule", *kernels):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, kernel in kernels.items():
        setattr(sys.modules[name], kernel.__name__, kernel)
    monkeypatch.setattr(fla, "use_fla", lambda backend, *_, **__: backend == "fla")


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("name", ["deltanet", "gated_ssd_deltanet", "deltaproduct", "cs_neg_deltanet", "dplr_ltv"])
def test_a_layer_on_fla_equals_the_torch_form(name: str) -> None:
    mixer = build(name, 16, num_heads=2)
    x = rand(2, 30, 16).bfloat16()
    with torch.no_grad():
        want = run(mixer, "reference", x, None)
        mixer.backend = "fla"
        y, state = mixer(x, return_state=True)
    for got, expected in ((y, want[0]), (state["S"], want[1]["S"])):
        error = (got.float() - expected.float()).square().mean().sqrt()
        assert error <= 0.02 * expected.float().square().mean().sqrt()  # inputs were rounded to bf16


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("keys", [3, 8, 11])
def test_keys_are_filled_up_to_as_many_as_values(keys: int) -> None:
    shapes = {"q": (2, 5, 3, keys), "k": (2, 5, 3, keys), "v": (2, 5, 3, 8), "beta": (2, 5, 3), "S": (2, 3, keys, 8)}
    values = [rand(*shape, seed=i).bfloat16().float() for i, shape in enumerate(shapes.values())]
    weights = rand(2, 5, 3, 8).float(), rand(2, 3, keys, 8).float()

    def found(rule: Callable) -> list[Tensor]:
        *core, S = leaves = [value.clone().requires_grad_() for value in values]
        outputs = rule(*core, None, S)
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    got, want = found(partial(fla.delta_rule, dtype=torch.bfloat16)), found(delta_rule_reference)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)  # gradients pass through bf16


@pytest.mark.usefixtures("_stand_in")
def test_hss_nodes_on_fla() -> None:
    mixer = build("segmented_hss", 64, num_heads=1, rank=16)
    x = rand(1, 20, 64).bfloat16()
    with torch.no_grad():
        want = run(mixer, "parallel", x, None)[0].float()
        mixer.backend = "fla"
        assert (mixer(x).float() - want).square().mean().sqrt() <= 0.02 * want.square().mean().sqrt()


def test_when_fla_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda _: object())
    assert fla.use_fla("auto", torch.bfloat16, CUDA, 256)
    assert fla.use_fla("fla", torch.float16, CUDA, 64)
    for dtype, device, head in ((torch.float32, CUDA, 64), (torch.bfloat16, CPU, 64), (torch.bfloat16, CUDA, 512)):
        assert not fla.use_fla("auto", dtype, device, head)
        with pytest.raises(ValueError, match="backend='auto'"):
            fla.use_fla("fla", dtype, device, head)
    for backend in ("torch", "reference"):
        assert not fla.use_fla(backend, torch.bfloat16, CUDA, 64)


@pytest.mark.parametrize(
    ("version", "capability", "tilelang", "taken"),
    [
        ("3.6.0", 9, False, False),
        ("3.6.0", 9, True, True),
        ("3.6.0", 8, False, True),
        ("3.3.1", 9, False, True),
        ("3.7.1", 9, False, True),
    ],
)
def test_gradients_of_decays_that_triton_gets_wrong(
    version: str, capability: int, tilelang: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fla raises in such a backward pass, so nothing with decays may begin on it; without gradients it is right."""
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: object() if name == "fla" or tilelang else None)
    monkeypatch.setattr(fla.installed, "triton_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    fla._say_once.cache_clear()
    asked = ("auto", torch.bfloat16, CUDA, 64)
    if taken:
        assert fla.use_fla(*asked, decays=True)
    else:
        with pytest.warns(UserWarning, match=r"triton 3\.6\.0"):
            assert not fla.use_fla(*asked, decays=True)
        with pytest.raises(ValueError, match="tilelang"):
            fla.use_fla("fla", *asked[1:], decays=True)
    assert fla.use_fla(*asked)
    with torch.no_grad():
        assert fla.use_fla(*asked, decays=True)


def test_a_missing_fla_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda _: None)
    fla._say_once.cache_clear()
    with pytest.warns(UserWarning, match="fla-core"):
        assert not fla.use_fla("auto", torch.bfloat16, CUDA, 64)
    assert not fla.use_fla("auto", torch.bfloat16, CUDA, 64)  # a second warning would be an error
    with pytest.raises(ValueError, match="not installed"):
        fla.use_fla("fla", torch.bfloat16, CUDA, 64)


def test_fla_on_a_cpu_is_refused_by_the_layer() -> None:
    mixer = build("deltanet", 16, backend="fla")
    with pytest.raises(ValueError, match="CUDA"):
        mixer(rand(1, 4, 16).bfloat16())
