"""Stability by construction: the map from state to state, measured through `step`, under wild parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_blocks import Mixer, available, build
from tests.ssm_blocks.mixer_checks import rand

DIM = 6
OPTIONS: dict[str, dict] = {
    "deltanet": {"key_dim": 3},
    "cs_deltanet": {"key_dim": 3},
    "ssd_deltanet": {"key_dim": 3},
    "adaptive_dplr": {"state_size": 4},
    "dplr_plain": {"state_size": 4, "num_heads": 2},
    "neg_deltanet": {"key_dim": 3},
    "cs_neg_deltanet": {"key_dim": 3},
    "deltaproduct": {"key_dim": 3},
    "gated_ssd_deltanet": {"key_dim": 3},
    "dplr_ltv": {"key_dim": 3},
    "dplr_lti": {"state_size": 4, "num_heads": 2},
    "dplr_similarity": {"state_size": 4, "num_heads": 2},
    "oscillatory_dplr": {"state_size": 4, "rank": 2},
    "oscillatory_diagonal": {"state_size": 4},
    "monarch": {"block_size": 3, "num_householder": 2},
    "monarch_cayley": {"block_size": 3},
    "monarch_signed_cayley": {"block_size": 3},
    "segmented_hss": {"num_heads": 3, "leaf_size": 1},
    "diagonal": {"state_size": 5},
    "diagonal_signed": {"state_size": 5},
    "diagonal_complex": {"state_size": 5},
    "linoss_im": {"state_size": 4},
    "linoss_imex": {"state_size": 4},
    "linoss_damped": {"state_size": 4},
}
assert sorted(OPTIONS) == available()
SIZES = torch.tensor([0, 0.01, 0.3, 1, 3, 10, 30, 100.0]).unsqueeze(1)  # of tokens
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}
SPECTRAL_RADIUS_ONLY = ("linoss_imex", "linoss_damped")  # symplectic maps are bounded, not contractions


def transitions(mixer: Mixer, x: Tensor) -> Tensor:
    """The linear parts of state -> next state at tokens x [N, D], as matrices over the flattened state [N, m, m]."""
    zero = mixer.init_state(1, dtype=x.dtype)
    core = {name: torch.zeros_like(value) for name, value in zero.items() if name != "conv"}
    sizes = [value.numel() for value in core.values()]
    rows = sum(sizes) + 1  # every unit vector, and zero
    points = torch.eye(rows, dtype=next(iter(core.values())).dtype)[:, :-1]
    pieces = zip(core, points.split(sizes, 1), strict=True)
    state = {name: piece.reshape(-1, *core[name].shape[1:]).repeat_interleave(len(x), 0) for name, piece in pieces}
    state["conv"] = zero["conv"].expand(rows * len(x), -1, -1)
    new = mixer.step(x.repeat(rows, 1), state)[1]
    after = torch.cat([new[name].flatten(1) for name in core], 1).unflatten(0, (rows, len(x)))
    return (after[:-1] - after[-1]).permute(1, 2, 0)


def excess(name: str, A: Tensor) -> Tensor:
    """How far the largest norm is above 1."""
    if name in SPECTRAL_RADIUS_ONLY:
        return torch.linalg.eigvals(A).abs().max() - 1
    return torch.linalg.matrix_norm(A, 2).max() - 1


def moved_away(name: str, seed: int, scale: float) -> Mixer:
    """Float64, and nothing enters the state: that would only add rounding."""
    generator = torch.Generator().manual_seed(seed)
    mixer = build(name, DIM, **OPTIONS[name], conv_size=0).double()
    mixer.init_weights(generator)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        mixer.v_proj.weight.zero_()  # type: ignore[union-attr]
    return mixer


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", sorted(OPTIONS))
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 30.0, 1e3, 1e5]))
@settings(max_examples=50, deadline=None)
@torch.no_grad()
def test_transitions_never_expand(name: str, dtype: torch.dtype, seed: int, scale: float) -> None:
    """50 draws of all parameters, each at 8 tokens, per mixer and type: 2,400 draws, 19,200 transitions."""
    mixer = moved_away(name, seed, scale).to(dtype)
    A = transitions(mixer, (SIZES * rand(len(SIZES), DIM, seed=seed)).to(dtype))
    assert A.isfinite().all()
    edge = 1e-6 if name in SPECTRAL_RADIUS_ONLY else 0.0  # double roots at the edge cost half the digits
    wide = A.to(torch.complex128 if A.is_complex() else torch.float64)
    assert excess(name, wide) <= TOLERANCES[dtype] + edge * (dtype == torch.float64)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", sorted(set(OPTIONS) - set(SPECTRAL_RADIUS_ONLY)))
def test_parameters_that_seek_expansion_do_not_find_it(name: str, seed: int) -> None:
    """Gradient ascent on the norm itself, by the parameters and the tokens."""
    mixer = moved_away(name, seed, 0.5)
    x = rand(4, DIM, seed=seed).requires_grad_()
    moving = [p for n, p in mixer.named_parameters() if not n.startswith("v_proj")]
    optimizer = torch.optim.Adam([x, *moving], lr=0.3, maximize=True)
    found = []
    for _ in range(25):
        optimizer.zero_grad()
        worst = excess(name, transitions(mixer, x))
        found.append(worst.item())
        worst.backward()
        optimizer.step()
    assert found[-1] >= found[0] - 1e-9  # it did seek
    assert max(found) <= 1e-9


def test_the_first_design_of_001_expands() -> None:
    """Why the permutation comes before the reflection: P - beta k k^T has norm up to 2.78 and more."""
    k = torch.nn.functional.normalize(rand(4096, 4), dim=-1)
    P = torch.eye(4, dtype=torch.float64).roll(1, 0)
    first = P - 1.99 * k.unsqueeze(-1) * k.unsqueeze(-2)
    built = P - 1.99 * k.unsqueeze(-1) * (k.unsqueeze(-2) @ P)
    assert torch.linalg.matrix_norm(first, 2).max() > 2.5
    assert torch.linalg.matrix_norm(built, 2).max() <= 1 + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_sixteen_thousand_tokens_in_bfloat16_stay_finite(name: str) -> None:
    """Outputs, last state, and every gradient; then on by steps."""
    mixer = build(name, DIM, **OPTIONS[name])
    mixer.init_weights(torch.Generator().manual_seed(0))
    x = rand(1, 16_384, DIM).bfloat16().requires_grad_()
    y, state = mixer(x, return_state=True)
    gradients = torch.autograd.grad(y.float().square().mean(), [x, *mixer.parameters()], allow_unused=True)
    with torch.no_grad():
        y_next, next_state = mixer.step(x[:, 0], state)
    values = [y, y_next, *state.values(), *next_state.values(), *(g for g in gradients if g is not None)]
    assert all(value.isfinite().all() for value in values)
