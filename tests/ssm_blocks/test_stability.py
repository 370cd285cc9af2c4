"""Stability by construction: the map from state to state, measured through `step`, under wild parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_blocks import Mixer, build
from tests.ssm_blocks.mixer_checks import rand

DIM = 6
OPTIONS: dict[str, dict] = {
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
SPECTRAL_RADIUS_ONLY = ("linoss_imex", "linoss_damped")  # symplectic maps are bounded, not contractions


def transition(mixer: Mixer, x: Tensor) -> Tensor:
    """The linear part of state -> next state at token x [D], as a matrix over the flattened state."""
    zero = mixer.init_state(1, dtype=torch.float64)
    core = {name: torch.zeros_like(value) for name, value in zero.items() if name != "conv"}
    sizes = [value.numel() for value in core.values()]
    identity = torch.eye(sum(sizes), dtype=next(iter(core.values())).dtype)
    pieces = zip(core, identity.split(sizes, 1), strict=True)
    basis = {name: piece.reshape(-1, *core[name].shape[1:]) for name, piece in pieces}

    def after(state: dict[str, Tensor]) -> Tensor:
        batch = next(iter(state.values())).size(0)
        state["conv"] = zero["conv"].expand(batch, -1, -1)
        new = mixer.step(x.expand(batch, -1), state)[1]
        return torch.cat([new[name].flatten(1) for name in core], 1)

    return (after(basis) - after(core)).mT


@pytest.mark.parametrize("name", sorted(OPTIONS))
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e3]), size=st.floats(0, 100))
@settings(max_examples=40, deadline=None)
def test_transitions_never_expand(name: str, seed: int, scale: float, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixer = build(name, DIM, **OPTIONS[name], conv_size=0).double()
    mixer.init_weights(generator)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        mixer.v_proj.weight.zero_()  # the state's own motion; what enters would only add rounding
        A = transition(mixer, size * rand(DIM, seed=seed))
    assert A.isfinite().all()
    if name in SPECTRAL_RADIUS_ONLY:
        assert torch.linalg.eigvals(A).abs().max() <= 1 + 1e-6  # double roots at the edge cost half the digits
    else:
        excess = torch.linalg.matrix_norm(A, 2).item() - 1
        assert excess <= 1e-9


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
    mixer = build(name, DIM, **OPTIONS[name])
    mixer.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = rand(1, 16_384, DIM).bfloat16()
        y, state = mixer(x, return_state=True)
        assert y.isfinite().all()
        assert all(value.isfinite().all() for value in state.values())
