"""Every mixer: three forms that agree, packing, states, types, bad input."""

from functools import partial

import pytest
import torch
from torch import Tensor

from ssm_blocks import State, build, non_matrix_parameters
from tests.ssm_blocks.mixer_checks import (
    DIM,
    SMALL,
    assert_equal,
    assert_rms_close,
    everything,
    make,
    narrow,
    rand,
    random_state,
    run,
)

NAMES = sorted(SMALL)
FAST_LENGTHS = [1, 63, 64, 100]
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("T", [*FAST_LENGTHS, slow(1000)])
@pytest.mark.parametrize("name", NAMES)
def test_parallel_form_equals_the_definition(name: str, T: int) -> None:
    mixer = make(name)
    x = rand(2, T, DIM)
    state = random_state(mixer, 2)
    assert_equal(everything(mixer, "parallel", x, state), everything(mixer, "reference", x, state), 1e-10)


@pytest.mark.parametrize("T", [1, 20, *map(slow, (63, 64, 100, 1000))])
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_the_definition(name: str, T: int) -> None:
    mixer = make(name)
    x = rand(2, T, DIM)
    assert_equal(everything(mixer, "step", x, None), everything(mixer, "reference", x, None), 1e-10)
    state = random_state(mixer, 2)
    assert_equal(everything(mixer, "step", x, state), everything(mixer, "reference", x, state), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_nothing_changes(name: str) -> None:
    mixer = make(name)
    x, state = rand(2, 70, DIM), random_state(mixer, 2)
    want = run(mixer, "reference", x, state)
    with torch.no_grad():
        for form in ("parallel", "step"):
            y, last = run(mixer, form, x, state)
            assert_equal({"y": y, **last}, {"y": want[0], **want[1]}, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_in_two_parts_is_the_sequence(name: str) -> None:
    mixer = make(name)
    x = rand(2, 50, DIM)
    whole, last = mixer(x, return_state=True)
    first, state = mixer(x[:, :21], return_state=True)
    second, end = mixer(x[:, 21:], state, return_state=True)
    assert_equal({"y": torch.cat([first, second], 1), **end}, {"y": whole, **last}, 1e-10)


def functional(found: dict[str, Tensor]) -> Tensor:
    """A random number made of everything."""
    parts = {n: torch.view_as_real(v) if v.is_complex() else v for n, v in found.items()}
    return torch.stack([(v * rand(*v.shape, seed=3 + i)).sum() for i, v in enumerate(parts.values())]).sum()


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_equal_separate_ones(name: str) -> None:
    """Outputs, last states, and the gradients of both to input, first states and parameters."""
    mixer = make(name)
    lengths = [1, 64, 2, 33]
    x = rand(1, sum(lengths), DIM).requires_grad_()
    state = {n: s.requires_grad_() for n, s in random_state(mixer, len(lengths)).items()}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    leaves = {"x": x, **{f"state {n}": s for n, s in state.items()}, **dict(mixer.named_parameters())}

    packed = as_dict(*mixer(x, state, bounds, return_state=True))
    parts = [
        mixer(x[:, bounds[i] : bounds[i + 1]], {n: s[i : i + 1] for n, s in state.items()}, return_state=True)
        for i in range(len(lengths))
    ]
    separate = as_dict(torch.cat([y for y, _ in parts], 1), {n: torch.cat([s[n] for _, s in parts]) for n in state})
    assert_equal(packed, separate, 1e-10)
    gradients = [
        torch.autograd.grad(functional(found), list(leaves.values()), materialize_grads=True)
        for found in (packed, separate)
    ]
    assert_equal(*(dict(zip(leaves, found, strict=True)) for found in gradients), 1e-10)
    for form in ("torch", "reference"):
        mixer.backend = form  # type: ignore[assignment]
        with torch.no_grad():
            assert_equal(as_dict(*mixer(x, state, bounds, return_state=True)), packed, 1e-10)


ALL_LENGTHS = [slow(form, T) for form in ("parallel", "step") for T in (1, 63, 64, 100, 1000)]


@pytest.mark.parametrize(("form", "T"), [("parallel", 70), ("step", 9), *ALL_LENGTHS])
@pytest.mark.parametrize("name", NAMES)
def test_float32_and_bfloat16(name: str, form: str, T: int) -> None:
    mixer, x = make(name, torch.float32), rand(2, T, DIM)
    state = narrow(random_state(make(name), 2))
    for dtype, ratio in ((torch.float32, 0.002), (torch.bfloat16, 0.01)):
        want = everything(mixer, "reference", x.to(dtype), state)
        got = everything(mixer, form, x.to(dtype), state)
        assert got["y"].dtype == dtype
        assert all(value.dtype in (torch.float32, torch.complex64) for n, value in got.items() if n[:4] == "last")
        assert_rms_close(got, want, ratio)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_near_float64(name: str) -> None:
    x, state = rand(2, 70, DIM), random_state(make(name), 2)
    exact = everything(make(name), "reference", x, state)
    assert_rms_close(everything(make(name, torch.float32), "parallel", x.float(), narrow(state)), exact, 0.002)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_the_recurrence_in_float32(name: str) -> None:
    """Its output is that of a bfloat16 input; left to itself, autocast would take states and solves to bf16."""
    mixer, x = make(name, torch.float32), rand(2, 40, DIM, dtype=torch.float32)
    with torch.no_grad():
        want, state = mixer(x.bfloat16(), return_state=True)
        following, next_state = mixer.step(x[:, 0].bfloat16(), state)
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(as_dict(*mixer(x, return_state=True)), as_dict(want, state), 0)
            assert_equal(as_dict(*mixer.step(x[:, 0], state)), as_dict(following, next_state), 0)
            assert mixer(x.double()).dtype == torch.float64


def as_dict(y: Tensor, state: State) -> dict[str, Tensor]:
    return {"y": y, **state}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    mixer = make(name)
    for parameter, gradient in everything(mixer, "parallel", rand(2, 30, DIM), None).items():
        if parameter.startswith("grad "):
            assert gradient.abs().max() > 0, parameter


@pytest.mark.parametrize("name", NAMES)
def test_the_future_does_not_reach_the_past(name: str) -> None:
    mixer = make(name)
    x = rand(1, 40, DIM)
    other = torch.cat([x[:, :25], rand(1, 15, DIM, seed=7)], 1)
    torch.testing.assert_close(mixer(x)[:, :25], mixer(other)[:, :25], atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_back_after_the_meta_device(name: str) -> None:
    want = build(name, DIM, **SMALL[name])
    want.init_weights(torch.Generator().manual_seed(3))
    with torch.device("meta"):
        mixer = build(name, DIM, **SMALL[name])
    mixer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*mixer.parameters(), *mixer.buffers()]:
            tensor.fill_(99)
    mixer.init_weights(torch.Generator().manual_seed(3))
    for (key, got), expected in zip(mixer.state_dict().items(), want.state_dict().values(), strict=True):
        assert torch.equal(got, expected), key
    x = rand(1, 5, DIM, dtype=torch.float32)
    assert torch.equal(mixer(x), want(x))


@pytest.mark.parametrize("name", NAMES)
def test_muon_gets_only_projections(name: str) -> None:
    mixer = make(name)
    kept = set(dict(mixer.named_parameters())) - set(non_matrix_parameters(mixer))
    assert kept
    assert all(key.endswith("_proj.weight") for key in kept), kept


@pytest.mark.parametrize("name", NAMES)
def test_state_has_constant_size(name: str) -> None:
    mixer = make(name)
    _, state = mixer(rand(1, 70, DIM), return_state=True)
    sizes = {n: s.shape for n, s in state.items()}
    _, state = mixer.step(rand(1, DIM), state)
    assert sizes == {n: s.shape for n, s in state.items()} == {n: s.shape for n, s in mixer.init_state(1).items()}
    assert mixer.state_numel() == sum(s.numel() * (1 + s.is_complex()) for s in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused(name: str) -> None:
    mixer = make(name)
    x = rand(1, 6, DIM)
    with pytest.raises(ValueError, match="D = 8"):
        mixer(rand(1, 6, DIM + 1))
    with pytest.raises(ValueError, match=r"\[B, D\]"):
        mixer.step(x, mixer.init_state(1, dtype=x.dtype))
    with pytest.raises(ValueError, match="init_state"):
        mixer(x, mixer.init_state(2, dtype=x.dtype))
    with pytest.raises(ValueError, match="init_state"):
        mixer(x, mixer.init_state(1, "meta", x.dtype))
    for wrong in ({"memory": x}, x, (x,)):
        with pytest.raises(ValueError, match="holds"):
            mixer(x, wrong)
    first = mixer.init_state(1, dtype=x.dtype)
    for key in first:
        with pytest.raises(ValueError, match="init_state"):
            mixer.step(x[:, 0], {**first, key: torch.zeros_like(first[key], dtype=torch.float16)})
        with pytest.raises(ValueError, match="must be a tensor"):
            mixer(x, {**first, key: None})
    for other in (x.long(), x > 0, x.to(torch.complex64), x.to("meta"), x.tolist()):
        with pytest.raises(ValueError, match="floating type on cpu"):
            mixer(other)
    for shape in ((1, 0, DIM), (0, 6, DIM), (6, DIM)):
        with pytest.raises(ValueError, match="nothing empty"):
            mixer(torch.zeros(shape, dtype=x.dtype))
    for arguments in ((0,), (-1,), (1, None, torch.long)):
        with pytest.raises(ValueError, match="at least one sequence"):
            mixer.init_state(*arguments)
    for bounds, words in (
        ([0, 3], "row's length 6"),
        ([1, 6], "row's length 6"),
        ([0, 4, 4, 6], "strictly"),
        ([0, 0, 6], "strictly"),
        ([0, 4, 3, 6], "strictly"),
        ([6], r"N \+ 1"),
        ([], r"N \+ 1"),
        ([0.0, 6.0], r"N \+ 1"),
        ([[0, 6]], r"N \+ 1"),
    ):
        with pytest.raises(ValueError, match=words):
            mixer(x, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match=r"N \+ 1"):
        mixer(x, cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match="init_state"):
        mixer(x, first, torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match="packed row"):
        mixer(rand(2, 6, DIM), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="divides"):
        build(name, DIM, **{**SMALL[name], "num_heads": 3})
    for options in ({"num_heads": 0}, {"num_heads": 1.0}, {"num_heads": "2"}):
        with pytest.raises(ValueError, match="whole numbers"):
            build(name, DIM, **options)
    with pytest.raises(ValueError, match="conv_size"):
        build(name, DIM, conv_size=1.5)
    with pytest.raises(ValueError, match="backend"):
        build(name, DIM, **SMALL[name], backend="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"cs_deltanet", "cs_neg_deltanet", "dplr_ltv"}))
def test_a_mixer_is_one_compiled_graph(name: str) -> None:
    """Where permutations are learned, the graph breaks on purpose (`ops.routed`)."""
    torch.compiler.reset()
    mixer, x = make(name, torch.float32), rand(2, 20, DIM, dtype=torch.float32)
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mixer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
