"""What is particular to one mixer: identities that the design relies on, and options that must be refused."""

import itertools

import pytest
import torch
from torch import Tensor

from ssm_blocks import build
from ssm_blocks.layers.dplr_lti import CyclicDPLR, PlainDPLR
from ssm_blocks.layers.hss import SIDES, SegmentedHSS, explicit_bases
from ssm_blocks.layers.linoss import LinOSS
from ssm_blocks.layers.monarch import monarch_apply, monarch_matrix
from ssm_blocks.layers.oscillatory import OscillatoryDPLR
from ssm_blocks.ops.cycles import diagonalise, find_cycles
from ssm_blocks.ops.discretize import bilinear
from tests.ssm_blocks.mixer_checks import rand, randomised

F64 = torch.float64


def close(got: Tensor, want: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


# --- 003 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_cycles_diagonalise_a_permutation_times_a_diagonal(seed: int) -> None:
    index = rand(3, 7, seed=seed).argsort(-1)
    l = rand(3, 7, seed=seed + 10).sigmoid() + 0.05
    dense = torch.eye(7, dtype=F64)[index] * l.unsqueeze(-2)
    eigenvalues, V, inverse = diagonalise(l, find_cycles(index))
    close(V @ torch.diag_embed(eigenvalues) @ inverse, dense.to(V.dtype))
    close(V @ inverse, torch.eye(7, dtype=V.dtype).expand(3, 7, 7))


def lti(name: str) -> PlainDPLR:
    mixer = randomised(build(name, 8, num_heads=2, state_size=6).double())
    assert isinstance(mixer, PlainDPLR)
    return mixer


@torch.no_grad()
def test_kernel_is_the_impulse_response() -> None:
    mixer = lti("dplr_lti")
    A, h = mixer.dense(F64), mixer.B.to(F64)
    assert (A.diagonal(dim1=-2, dim2=-1).abs() < 0.1).any()  # P moves something
    want = []
    for _ in range(20):
        want.append((mixer.C * h).sum(-1))
        h = h @ A.mT
    close(mixer.kernel(20, F64), torch.stack(want, -1))


@torch.no_grad()
def test_a_fixed_similarity_ties_and_a_real_permutation_does_not() -> None:
    """P (L + p q^T) P^T with B and C permuted along has the very same kernel: nothing was gained."""
    plain, similar, cyclic = lti("dplr_plain"), lti("dplr_similarity"), lti("dplr_lti")
    for other in (similar, cyclic):
        for key, value in plain.named_parameters():
            other.get_parameter(key).copy_(value)
    assert not torch.equal(similar.relabel, plain.relabel)
    for name in ("B", "C"):
        value = plain.get_parameter(name)
        similar.get_parameter(name).copy_(value.gather(-1, similar.relabel.unsqueeze(1).expand_as(value)))
    close(similar.kernel(30, F64), plain.kernel(30, F64))
    assert (cyclic.kernel(30, F64) - plain.kernel(30, F64)).abs().max() > 1e-2


def test_permutations_survive_a_checkpoint() -> None:
    saved, fresh = lti("dplr_lti"), build("dplr_lti", 8, num_heads=2, state_size=6).double()
    fresh.load_state_dict(saved.state_dict())
    x = rand(1, 9, 8)
    assert isinstance(saved, CyclicDPLR)
    close(fresh(x), saved(x), atol=0)


# --- 004 --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_discrete_system_is_the_bilinear_map_of_the_dense_one() -> None:
    mixer = randomised(build("oscillatory_dplr", 8, num_heads=2, state_size=6, rank=3).double())
    assert isinstance(mixer, OscillatoryDPLR)
    A, B = mixer.dense(F64), mixer.input_map(F64)
    assert torch.linalg.eigvalsh(A + A.mH).max() <= 1e-12
    for got, want in zip(mixer.discrete(F64), bilinear(A, B), strict=True):
        close(got, want)
    P, Q = mixer.low_rank(F64)
    close(A, torch.diag_embed(mixer.poles(F64)) - P @ Q.mH)


@torch.no_grad()
def test_two_hundred_wild_draws_stay_contractions_and_free_factors_do_not() -> None:
    worst, unstable = 0.0, 0
    for seed in range(200):
        mixer = build("oscillatory_dplr", 4, num_heads=1, state_size=8, rank=3).double()
        mixer.init_weights(torch.Generator().manual_seed(seed))
        for parameter in mixer.parameters():
            parameter.mul_(3)
        assert isinstance(mixer, OscillatoryDPLR)
        worst = max(worst, torch.linalg.matrix_norm(mixer.discrete(F64)[0], 2).item())
        P, Q = rand(8, 3, seed=seed).to(torch.complex128), rand(8, 3, seed=seed + 1000).to(torch.complex128)
        free = torch.diag(mixer.poles(F64)[0]) - P @ Q.mH
        unstable += bool(torch.linalg.eigvals(free).real.max() > 0)
    assert 0.9 < worst <= 1 + 1e-9
    assert unstable > 100  # what the first design met


# --- LinOSS -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_imex_conserves_and_implicit_dissipates() -> None:
    radius = {}
    for name in ("linoss_im", "linoss_imex", "linoss_damped"):
        mixer = build(name, 8, num_heads=1, state_size=16).double()
        assert isinstance(mixer, LinOSS)
        radius[name] = torch.linalg.eigvals(mixer.transition(F64)).abs()
    close(radius["linoss_imex"], torch.ones_like(radius["linoss_imex"]), atol=1e-7)
    assert radius["linoss_im"].max() < 1
    assert radius["linoss_damped"].max() < 1


# --- 005 --------------------------------------------------------------------------------------------------------------


def test_state_ratios_of_the_design() -> None:
    """d = 64: rank 8 needs .344 of the dense state, a 16th of the head .18."""
    for options, ratio in (({"rank": 8}, 0.344), ({}, 0.18)):
        mixer = build("segmented_hss", 64, conv_size=0, **options)
        assert mixer.state_numel() / 64**2 == pytest.approx(ratio, abs=0.001)


@torch.no_grad()
def test_bases_are_orthonormal_and_nested() -> None:
    mixer = build("segmented_hss", 32, num_heads=2, leaf_size=4, rank=2).double()
    assert isinstance(mixer, SegmentedHSS)
    leaves, transfers = mixer.bases.orthonormal(F64)
    for side in range(SIDES):
        U = explicit_bases(leaves[side], [t[side] for t in transfers])
        assert U.shape == (2, 6, 16, 2)  # levels of 2 and 4 nodes
        close(U.mT @ U, torch.eye(2, dtype=F64).expand(2, 6, 2, 2))
        parent, children = U[:, :2], U[:, 2:].unflatten(1, (2, 2))
        residual = parent - sum(children[:, :, i] @ (children[:, :, i].mT @ parent) for i in range(2))
        close(residual, torch.zeros_like(residual))
        assert (parent[:, 0, 8:] == 0).all()
        assert (parent[:, 1, :8] == 0).all()


# --- 006 --------------------------------------------------------------------------------------------------------------


def test_monarch_is_rows_then_columns_and_not_closed() -> None:
    L, R, h = rand(3, 3, 3), rand(3, 3, 3, seed=1), rand(9, seed=2)
    P = torch.eye(9, dtype=F64).view(3, 3, 9).transpose(0, 1).reshape(9, 9)
    dense = P.mT @ torch.block_diag(*L) @ P @ torch.block_diag(*R)
    close(monarch_matrix(L, R), dense)
    close(monarch_apply(L, R, h), dense @ h)

    def slice_rank(M: Tensor) -> int:  # of the b x b slice between column j' of the result and row i of the input
        slices = M.view(3, 3, 3, 3).permute(1, 2, 0, 3)
        return max(int(torch.linalg.matrix_rank(s)) for s in slices.flatten(0, 1))

    assert slice_rank(dense) == 1
    assert slice_rank(dense @ monarch_matrix(rand(3, 3, 3, seed=3), rand(3, 3, 3, seed=4))) == 3


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("deltanet", {"key_dim": 0}, "key_dim"),
        ("deltanet", {"inverse": "magic"}, "block"),
        ("deltanet", {"conv_size": -1}, "conv_size"),
        ("cs_deltanet", {"dictionary_size": 1}, "at least 2"),
        ("gated_ssd_deltanet", {"dictionary_size": 4}, "without gate"),
        ("oscillatory_dplr", {"rank": 33}, "0..state_size"),
        ("segmented_hss", {"leaf_size": 3}, "2, 4, 8"),
        ("segmented_hss", {"rank": 4, "leaf_size": 2}, "rank <= leaf_size"),
        ("monarch", {"block_size": 1}, "block_size"),
        ("diagonal", {"state_size": 0}, "state_size"),
        ("diagonal", {"backend": "fla"}, "no kernel"),
        ("segmented_hss", {"backend": "fla"}, "at least 16 channels"),
    ],
)
def test_wrong_options_say_what_is_right(name: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(name, 16, **options)


@pytest.mark.parametrize("inverse", ["solve", "block"])
def test_correlated_keys_through_a_layer(inverse: str) -> None:
    """Nearly equal tokens with beta near 2, float32: the chunk's system is as bad as it gets."""
    mixer = build("neg_deltanet", 16, inverse=inverse, conv_size=0)
    mixer.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixer.beta_gate.bias.fill_(3.0)
        x = (rand(1, 1, 16) + 1e-2 * rand(1, 200, 16, seed=1)).float()
        mixer.backend = "reference"
        exact = mixer.double()(x.double())
        mixer.backend = "torch"
        error = mixer.float()(x).double() - exact
    assert error.square().mean().sqrt() <= 2e-3 * exact.square().mean().sqrt()


def test_num_householder_of_deltanet_is_deltaproduct() -> None:
    """One layer with options is the other by name."""
    first = build("neg_deltanet", 8, num_householder=2)
    second = build("deltaproduct", 8)
    second.load_state_dict(first.state_dict())
    x = rand(1, 10, 8).float()
    assert torch.equal(first(x), second(x))
    assert len(list(itertools.chain(first.parameters()))) == len(list(second.parameters()))
