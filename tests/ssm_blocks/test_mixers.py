"""Every mixer: three forms that agree, packing, states, types, bad input."""

import pytest
import torch

from ssm_blocks import Mixer, available, build, non_matrix_parameters
from tests.ssm_blocks.mixer_checks import (
    assert_equal,
    assert_rms_close,
    everything,
    rand,
    random_state,
    randomised,
    run,
)

DIM = 8
SMALL: dict[str, dict] = {name: {"num_heads": 2} for name in available()}
for _name in SMALL:
    if _name.startswith(("diagonal", "linoss", "dplr_lti", "dplr_plain", "dplr_similarity")):
        SMALL[_name]["state_size"] = 5
    if _name == "segmented_hss":
        SMALL[_name] = {"num_heads": 1, "leaf_size": 2, "rank": 1}
    if _name in ("oscillatory_dplr", "adaptive_dplr"):
        SMALL[_name] |= {"state_size": 5, "rank": 2}
    if _name == "monarch":
        SMALL[_name] |= {"block_size": 2, "num_householder": 2}
    if _name.startswith("monarch_"):
        SMALL[_name]["block_size"] = 2
NAMES = sorted(SMALL)
FAST_LENGTHS = [1, 63, 64, 100]


def make(name: str, dtype: torch.dtype = torch.float64, **options) -> Mixer:
    return randomised(build(name, DIM, **SMALL[name], **options).to(dtype))


@pytest.mark.parametrize("T", [*FAST_LENGTHS, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_parallel_form_equals_the_definition(name: str, T: int) -> None:
    mixer = make(name)
    x = rand(2, T, DIM)
    state = random_state(mixer, 2)
    assert_equal(everything(mixer, "parallel", x, state), everything(mixer, "reference", x, state), 1e-10)


@pytest.mark.parametrize("T", [1, 20])
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


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_equal_separate_ones(name: str) -> None:
    mixer = make(name)
    lengths = [1, 33, 2, 20]
    x = rand(1, sum(lengths), DIM).requires_grad_()
    state = random_state(mixer, len(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    weight = rand(1, sum(lengths), DIM, seed=3)
    leaves = [x, *(p for p in mixer.parameters() if p.requires_grad)]

    packed, last = mixer(x, state, bounds, return_state=True)
    gradients = torch.autograd.grad((packed * weight).sum(), leaves, allow_unused=True)
    parts = [
        mixer(x[:, bounds[i] : bounds[i + 1]], {n: s[i : i + 1] for n, s in state.items()}, return_state=True)
        for i in range(len(lengths))
    ]
    separate = torch.cat([y for y, _ in parts], 1)
    want = torch.autograd.grad((separate * weight).sum(), leaves, allow_unused=True)
    assert_equal(
        {"y": packed, **last}, {"y": separate, **{n: torch.cat([s[n] for _, s in parts]) for n in last}}, 1e-10
    )
    for got, expected in zip(gradients, want, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_float32_and_bfloat16(name: str) -> None:
    x = rand(2, 70, DIM)
    exact = everything(make(name), "reference", x.bfloat16().double(), None)
    for dtype, ratio in ((torch.float32, 0.002), (torch.bfloat16, 0.01)):
        mixer = make(name, torch.float32)
        want = everything(mixer, "reference", x.to(dtype), None)
        got = everything(mixer, "parallel", x.to(dtype), None)
        assert got["y"].dtype == dtype
        assert all(value.dtype in (torch.float32, torch.complex64) for n, value in got.items() if n[:4] == "last")
        assert_rms_close(got, want, ratio)
        if dtype == torch.float32:
            assert_rms_close(
                {"y": everything(mixer, "parallel", x.bfloat16().float(), None)["y"]}, {"y": exact["y"]}, ratio
            )


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
    with pytest.raises(ValueError, match="holds"):
        mixer(x, {"memory": x})
    for bounds, words in (([0, 3], "row's length 6"), ([0, 4, 4, 6], "strictly"), ([6], r"N \+ 1")):
        with pytest.raises(ValueError, match=words):
            mixer(x, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match="packed row"):
        mixer(rand(2, 6, DIM), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="divides"):
        build(name, DIM, **{**SMALL[name], "num_heads": 3})
    with pytest.raises(ValueError, match="backend"):
        build(name, DIM, **SMALL[name], backend="cuda")
