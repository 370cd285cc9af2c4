"""Every mixer's gradients against finite differences, and all three forms on keys that are nearly the same."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from ssm_blocks import Mixer, available, build
from ssm_blocks.mixer import mixer_class
from tests.ssm_blocks.mixer_checks import assert_equal, assert_rms_close, everything, narrow, rand, random_state
from tests.ssm_blocks.test_mixers import DIM, make

CHOOSING = ("cs_deltanet", "cs_neg_deltanet", "dplr_ltv")


def in_short_chunks(name: str) -> Mixer:
    """Five tokens cross a chunk's end."""
    options = {"chunk": 3} if "chunk" in inspect.signature(mixer_class(name)).parameters else {}
    return make(name, **options)


@pytest.mark.parametrize("name", available())
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """To input, first state and parameters. A choice among permutations jumps, and its straight-through gradient is no
    derivative: where there is one, input and dictionary stay as they are."""
    mixer = in_short_chunks(name)
    parameters = {n: p for n, p in mixer.named_parameters() if not n.startswith(("dictionary.", "first_state"))}
    state = {n: s.requires_grad_() for n, s in random_state(mixer, 1).items()}
    x = rand(1, 5, DIM)
    moving = {} if name in CHOOSING else {"x": x.requires_grad_()}

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip([*moving, *state, *parameters], values, strict=True))
        first = {n: given[n] for n in state}
        found = functional_call(
            mixer, {n: given[n] for n in parameters}, (given.get("x", x), first), {"return_state": True}
        )
        return found[0], *found[1].values()

    leaves = (*moving.values(), *state.values(), *parameters.values())
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.parametrize("name", available())
def test_correlated_keys(name: str) -> None:
    """Nearly equal tokens, beta near 2 where there is one: the systems of a chunk are as bad as they get."""
    mixer = make(name)
    with torch.no_grad():
        for key, parameter in mixer.named_parameters():
            if key == "beta_gate.bias":
                parameter.fill_(3.0)
    x = rand(1, 1, DIM) + 1e-2 * rand(2, 70, DIM, seed=1)
    state = random_state(mixer, 2)
    exact = everything(mixer, "reference", x, state)
    assert_equal(everything(mixer, "parallel", x, state), exact, 1e-10)
    mixer.float()
    assert_rms_close(everything(mixer, "parallel", x.float(), narrow(state)), exact, 0.002)
    want = everything(mixer, "reference", x.bfloat16(), narrow(state))
    assert_rms_close(everything(mixer, "parallel", x.bfloat16(), narrow(state)), want, 0.01)


@pytest.mark.parametrize("name", available())
@torch.no_grad()
def test_heads_of_one_channel(name: str) -> None:
    if name == "segmented_hss":
        with pytest.raises(ValueError, match="leaf_size"):
            build(name, 3, num_heads=3)
        return
    mixer = build(name, 3, num_heads=3).double()
    x = rand(2, 9, 3)
    mixer.backend = "reference"  # type: ignore[assignment]
    want = mixer(x)
    mixer.backend = "torch"  # type: ignore[assignment]
    torch.testing.assert_close(mixer(x), want, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", available())
@torch.no_grad()
def test_how_the_numbers_lie_in_memory_does_not_matter(name: str) -> None:
    mixer = make(name)
    x, state = rand(DIM, 7, 2).permute(2, 1, 0), random_state(mixer, 2)
    turned = {n: s.transpose(0, -1).contiguous().transpose(0, -1) for n, s in state.items()}
    kept = {n: s.clone() for n, s in turned.items()}
    torch.testing.assert_close(mixer(x, turned), mixer(x.contiguous(), state), atol=1e-12, rtol=0)
    mixer.step(x[:, 0], turned)
    assert all(torch.equal(turned[n], kept[n]) for n in kept)  # a state that was given is not written to
