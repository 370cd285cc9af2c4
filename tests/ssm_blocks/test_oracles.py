"""Hand-set weights that solve group word problems exactly over a thousand tokens, where theory says they can.

Tokens are one-hot; what a layer reads out must be the probe vector moved by the product of all tokens' group elements,
at every one of the 1,000 positions.
"""

import itertools

import pytest
import torch
from torch import Tensor, nn

from ssm_blocks import Mixer, build
from ssm_blocks.layers.deltanet import DeltaNet
from ssm_blocks.layers.monarch import MonarchGated

T = 1000
HUGE = 1e4  # sigmoid(+-1e4) is exactly 1 or 0


def words(num_tokens: int) -> Tensor:
    return torch.randint(num_tokens, (T,), generator=torch.Generator().manual_seed(0))


def one_hot(tokens: Tensor, dim: int) -> Tensor:
    return nn.functional.one_hot(tokens, dim).double().unsqueeze(0)


def products(elements: Tensor, tokens: Tensor) -> Tensor:
    """g_t ... g_1 for all t, in exact small integers."""
    found, g = [], torch.eye(elements.size(-1), dtype=torch.float64)
    for token in tokens:
        g = elements[token] @ g
        found.append(g)
    return torch.stack(found)


def silent(mixer: Mixer) -> Mixer:
    """Everything zero but the norm's gain: the test sets what it needs."""
    mixer = mixer.double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name != "norm.weight":
                parameter.zero_()
        mixer.o_proj.weight.copy_(torch.eye(mixer.dim))
    return mixer


def solves(mixer: Mixer, tokens: Tensor, vectors: Tensor) -> bool:
    """Whether the read-out is the RMS-normed vector at every position; vectors [T, n] of one length."""
    with torch.no_grad():
        y = mixer(one_hot(tokens, mixer.dim))[0, :, : vectors.size(1)]
    y = y / y.norm(dim=-1, keepdim=True)
    candidates = vectors / vectors.norm(dim=-1, keepdim=True)
    return (y - candidates).abs().max().item() < 1e-9


def delta_oracle(mixer: DeltaNet, probe: Tensor) -> None:
    """S_0 = I, so S_T = g_T ... g_1; reading with the probe gives its inverse's image, g^T probe."""
    K = mixer.key_dim
    assert mixer.first_state is not None
    mixer.first_state[0, :, :K] = torch.eye(K)
    mixer.q_proj.weight.copy_(probe.unsqueeze(1).expand(-1, mixer.dim))
    mixer.beta_gate.bias.fill_(-HUGE)


def set_entry(mixer: DeltaNet, entry: int, G: Tensor, token: int, signed: bool = True) -> None:
    """Dictionary entry (1, 2, ...) := signed permutation matrix G, chosen at `token`."""
    assert mixer.dictionary is not None
    index = G.abs().argmax(-1)
    mixer.dictionary.scores[0, entry - 1, index] = torch.arange(len(G), dtype=torch.float64)
    if signed and mixer.dictionary.signs is not None:
        mixer.dictionary.signs[0, entry - 1] = G.sum(-1)
    mixer.dictionary.router.weight[entry, token] = HUGE


def signed_permutations(n: int) -> Tensor:
    eye = torch.eye(n, dtype=torch.float64)
    signs = [torch.tensor(s, dtype=torch.float64) for s in itertools.product((1.0, -1.0), repeat=n)]
    return torch.stack([s[:, None] * eye[list(p)] for p in itertools.permutations(range(n)) for s in signs])


@pytest.mark.parametrize("n", [2, 3, 4])
@torch.no_grad()
def test_signed_permutations_solve_B_n_with_n_states(n: int) -> None:
    """B_2 is D4: the smallest state there is."""
    elements = signed_permutations(n)
    size = len(elements)
    mixer = silent(
        build(
            "cs_neg_deltanet", size, num_heads=1, key_dim=n, dictionary_size=size + 1, conv_size=0, learned_state=True
        )
    )
    assert isinstance(mixer, DeltaNet)
    probe = torch.arange(1.0, n + 1, dtype=torch.float64)
    delta_oracle(mixer, probe)
    for token, G in enumerate(elements):
        set_entry(mixer, token + 1, G, token)
    tokens = words(size)
    want = products(elements, tokens).mT @ probe
    assert solves(mixer, tokens, want)
    mixer.backend = "reference"
    assert solves(mixer, tokens, want)


@torch.no_grad()
def test_swap_and_reflection_solve_D4_only_together() -> None:
    """At state dim 2: an unsigned swap (column-sparse) and a reflection (negative eigenvalue); either alone fails."""
    swap = torch.tensor([[0.0, 1], [1, 0]], dtype=torch.float64)
    flip = torch.diag(torch.tensor([-1.0, 1], dtype=torch.float64))
    tokens, probe = words(2), torch.tensor([1.0, 2], dtype=torch.float64)
    want = products(torch.stack([swap, flip]), tokens).mT @ probe
    for name, solved in (("cs_neg_deltanet", True), ("cs_deltanet", False)):
        mixer = silent(build(name, 4, num_heads=1, key_dim=2, dictionary_size=2, conv_size=0, learned_state=True))
        assert isinstance(mixer, DeltaNet)
        delta_oracle(mixer, probe)
        set_entry(mixer, 1, swap, 0, signed=False)
        mixer.k_proj.weight[0] = 1
        mixer.beta_gate.weight[0, 1] = 2 * HUGE
        assert solves(mixer, tokens, want) == solved


def transpositions_of(permutation: tuple[int, ...]) -> list[tuple[int, int]]:
    """(i, j) swaps whose product, first one first, is the permutation; at most n - 1 of them."""
    current, swaps = list(range(len(permutation))), []
    for i, target in enumerate(permutation):
        j = current.index(target)
        if i != j:
            current[i], current[j] = current[j], current[i]
            swaps.append((i, j))
    return swaps


@pytest.mark.parametrize(("n", "steps"), [(3, 2), (5, 4)])
@torch.no_grad()
def test_deltaproduct_solves_the_symmetric_group(n: int, steps: int) -> None:
    """S_n from all its elements: n - 1 reflections (e_i - e_j) per token."""
    permutations = list(itertools.permutations(range(n)))
    eye = torch.eye(n, dtype=torch.float64)
    elements = torch.stack([eye[list(p)] for p in permutations])
    size = len(permutations)
    mixer = silent(
        build("deltaproduct", size, num_heads=1, key_dim=n, num_householder=steps, conv_size=0, learned_state=True)
    )
    assert isinstance(mixer, DeltaNet)
    probe = torch.arange(1.0, n + 1, dtype=torch.float64)
    delta_oracle(mixer, probe)
    keys = mixer.k_proj.weight.view(steps, n, size)
    for token, permutation in enumerate(permutations):
        for step, (i, j) in enumerate(transpositions_of(permutation)):
            keys[step, i, token], keys[step, j, token] = 1, -1
            mixer.beta_gate.weight[step, token] = 2 * HUGE
    tokens = words(size)
    assert solves(mixer, tokens, products(elements, tokens).mT @ probe)


@torch.no_grad()
def test_two_reflections_make_the_rotation_that_one_cannot() -> None:
    """D4 needs n_h = 2: a quarter turn has eigenvalues +-i, one reflection only real ones."""
    turn = torch.tensor([[0.0, -1], [1, 0]], dtype=torch.float64)
    mixer = silent(build("deltaproduct", 2, num_heads=1, conv_size=0, learned_state=True))
    assert isinstance(mixer, DeltaNet)
    probe = torch.tensor([1.0, 2], dtype=torch.float64)
    delta_oracle(mixer, probe)
    mixer.k_proj.weight.view(2, 2, 2)[:, :, 0] = torch.tensor([[0.0, 1], [1, -1]])  # e_2, then e_1 - e_2
    mixer.beta_gate.weight[:, 0] = 2 * HUGE
    tokens = words(2)
    assert solves(mixer, tokens, products(torch.stack([turn, torch.eye(2)]).double(), tokens).mT @ probe)


@torch.no_grad()
def test_monarch_solves_S5_by_transpositions() -> None:
    """One 5 x 5 block of R reflects; the first row of the grid holds the permuted vector."""
    pairs = list(itertools.combinations(range(5), 2))
    eye = torch.eye(5, dtype=torch.float64)
    elements = torch.stack([eye[[{i: j, j: i}.get(m, m) for m in range(5)]] for i, j in pairs])
    mixer = silent(build("monarch", len(pairs), num_heads=1, block_size=5, conv_size=0))
    assert isinstance(mixer, MonarchGated)
    assert mixer.first_state is not None
    probe = torch.arange(1.0, 6, dtype=torch.float64)
    mixer.first_state[0, :5] = probe
    mixer.forget_gate.bias.fill_(HUGE)
    assert mixer.block_gate is not None
    mixer.block_gate.bias.fill_(-HUGE)
    mixer.block_gate.bias.view(2, 5)[1, 0] = HUGE  # R's first block
    directions = mixer.k_proj.weight.view(2, 5, 5, len(pairs))[1, 0]
    for token, (i, j) in enumerate(pairs):
        directions[i, token], directions[j, token] = 1, -1
    mixer.C[0, :5, :5] = torch.eye(5)
    tokens = words(len(pairs))
    assert solves(mixer, tokens, products(elements, tokens) @ probe)


@torch.no_grad()
def test_diagonals_solve_parity_and_cyclic_groups_but_only_with_the_right_numbers() -> None:
    tokens = words(2)
    parity = (-1.0) ** (tokens == 1).double().cumsum(0)
    for name, solved in (("diagonal_signed", True), ("diagonal", False)):
        mixer = silent(build(name, 2, num_heads=1, state_size=1, conv_size=0, learned_state=True))
        mixer.first_state.fill_(1)
        mixer.decay_gate.bias.fill_(HUGE)
        mixer.decay_gate.weight[0, 1] = -2 * HUGE
        mixer.C[0, 0, 0] = 1
        assert solves(mixer, tokens, parity.unsqueeze(1)) == solved
    mixer = silent(build("diagonal_complex", 2, num_heads=1, state_size=1, conv_size=0, learned_state=True))
    mixer.first_state[0, 0, 0] = 1
    mixer.decay_gate.bias.fill_(HUGE)
    mixer.angle_gate.weight[0, 1] = 2 * torch.pi / 5
    mixer.C[0, :, 0] = torch.tensor([[1.0, 0], [0, -1]])  # real and imaginary part
    angle = 2 * torch.pi / 5 * (tokens == 1).double().cumsum(0)
    assert solves(mixer, tokens, torch.stack([angle.cos(), angle.sin()], 1))
