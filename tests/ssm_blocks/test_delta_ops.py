"""Chunked delta rules against the token loop: outputs, last state and every gradient, in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_blocks.ops.carry import grouped, one_by_one
from ssm_blocks.ops.delta import chunk_delta_rule, chunk_linear_attention
from ssm_blocks.ops.dplr import chunk_dplr
from ssm_blocks.ops.inverse import INVERSES
from ssm_blocks.ops.permutation import permuted_delta_rule, permuted_dplr, prefix_products, to_dense
from ssm_blocks.ops.reference import delta_rule_reference, dplr_reference, linear_attention_reference
from ssm_blocks.ops.routed import Routing, routed_delta_rule, routed_dplr

B, H, K, V, M = 2, 2, 4, 3, 3
LENGTHS = [1, 63, 64, 100]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(T: int, correlated: bool = False) -> dict[str, Tensor]:
    k = rand(B, T, H, K, seed=1)
    if correlated:
        k = 0.01 * k + rand(1, 1, H, K, seed=8)
    return {
        "q": F.normalize(rand(B, T, H, K), dim=-1),
        "k": F.normalize(k, dim=-1),
        "v": rand(B, T, H, V, seed=2),
        "beta": 2 * rand(B, T, H, seed=3).sigmoid(),
        "log_decay": -rand(B, T, H, seed=4).exp(),
        "S": rand(B, H, K, V, seed=5),
    }


def agree(got: Callable, want: Callable, leaves: Sequence[Tensor], atol: float = 1e-10) -> None:
    """Outputs, last state, and gradients of a random functional of both, to atol times their size."""
    results = []
    for function in (got, want):
        o, S = function()
        loss = (o * rand(*o.shape, seed=11)).sum() + (S * rand(*S.shape, seed=12)).sum()
        results.append([o, S, *torch.autograd.grad(loss, leaves, retain_graph=True)])
    for g, w in zip(*results, strict=True):
        torch.testing.assert_close(g, w, atol=atol * max(1.0, w.abs().max().item()), rtol=0)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("correlated", [False, True])
def test_chunk_delta_rule(T: int, gated: bool, correlated: bool) -> None:
    x = {name: value.requires_grad_() for name, value in inputs(T, correlated).items()}
    if not gated:
        x["log_decay"] = None
    leaves = [value for value in x.values() if value is not None]
    agree(lambda: chunk_delta_rule(**x), lambda: delta_rule_reference(**x), leaves)


@pytest.mark.slow
def test_chunk_delta_rule_on_a_thousand_tokens() -> None:
    x = {name: value.requires_grad_() for name, value in inputs(1000).items()}
    agree(lambda: chunk_delta_rule(**x), lambda: delta_rule_reference(**x), list(x.values()))


@pytest.mark.parametrize("inverse", sorted(INVERSES))
@pytest.mark.parametrize("chunk", [16, 24, 64])
def test_every_inverse_and_chunk(inverse: str, chunk: int) -> None:
    x = inputs(100)
    x["beta"] = x["beta"] / 20  # small enough for the Neumann product
    for g, w in zip(chunk_delta_rule(**x, chunk=chunk, inverse=inverse), delta_rule_reference(**x), strict=True):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=0)


def test_strong_decay_does_not_overflow() -> None:
    x = {name: value.float() for name, value in inputs(100).items()}
    x["log_decay"] = torch.full_like(x["log_decay"], -40.0).requires_grad_()
    o, _ = chunk_delta_rule(**x)
    torch.testing.assert_close(o, delta_rule_reference(**x)[0])
    (gradient,) = torch.autograd.grad(o.square().sum(), x["log_decay"])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("T", LENGTHS)
def test_chunk_linear_attention(T: int) -> None:
    x = {name: value.requires_grad_() for name, value in inputs(T).items() if name != "beta"}
    agree(lambda: chunk_linear_attention(**x), lambda: linear_attention_reference(**x), list(x.values()))


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunk_dplr(T: int, bounded: bool) -> None:
    x = inputs(T)
    del x["beta"]
    x["a"], x["b"] = -F.normalize(rand(B, T, H, K, seed=6), dim=-1), F.normalize(rand(B, T, H, K, seed=7), dim=-1)
    x["log_decay"] = -4 * rand(B, T, H, K, seed=4).sigmoid()
    x = {name: value.requires_grad_() for name, value in x.items()}
    agree(lambda: chunk_dplr(**x, bounded=bounded), lambda: dplr_reference(**x), list(x.values()))


@pytest.mark.parametrize(("bounded", "decay"), [(True, -5.0), (False, -50.0)])
def test_strong_decay_of_dplr_in_float32(bounded: bool, decay: float) -> None:
    *core, _ = dplr_core(64)
    *core, S = (x.detach().float().requires_grad_() for x in (*core, inputs(64)["S"]))
    log_decay = torch.full((B, 64, H, K), decay).requires_grad_()
    o, last = chunk_dplr(*core, log_decay, S, bounded=bounded)
    torch.testing.assert_close(o, dplr_reference(*core, log_decay, S)[0])
    gradients = torch.autograd.grad(o.square().sum() + last.sum(), [*core, log_decay, S])
    assert all(g.isfinite().all() for g in gradients)


def permutations(T: int) -> tuple[Tensor, Tensor]:
    return rand(B, T, H, K, seed=20).argsort(-1), rand(B, T, H, K, seed=21).sign()


def test_prefix_products() -> None:
    index, sign = permutations(37)
    dense, products = to_dense(index, sign), to_dense(*prefix_products(index, sign))
    product = torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
    for t in range(37):
        product = dense[:, t] @ product
        assert torch.equal(products[:, t], product)


@pytest.mark.parametrize("T", LENGTHS)
def test_permuted_frame_is_an_exact_reduction(T: int) -> None:
    x = {name: value.requires_grad_() for name, value in inputs(T).items() if name != "log_decay"}
    index, sign = permutations(T)
    G = to_dense(index, sign)
    agree(
        lambda: permuted_delta_rule(**x, index=index, sign=sign),
        lambda: delta_rule_reference(**x, log_decay=None, G=G),
        list(x.values()),
    )


def learned_routing(T: int) -> tuple[Routing, Tensor, Tensor]:
    """A straight-through choice from a straight-through dictionary, and what both are learned by."""
    index, sign = rand(H, M, K).argsort(-1), rand(H, M, K, seed=1).sign()
    soft = rand(H, M, K, K, seed=2).requires_grad_()
    logits = rand(B, T, H, M, seed=3).requires_grad_()
    choice = logits.argmax(-1)
    weights = F.one_hot(choice, M) + logits.softmax(-1) - logits.softmax(-1).detach()
    dictionary = to_dense(index, sign) + soft - soft.detach()
    heads = torch.arange(H)
    return Routing(weights, dictionary, index[heads, choice], sign[heads, choice]), soft, logits


def dense_choice(routing: Routing) -> Tensor:
    """G_t [B, T, H, K, K] as the definition has it."""
    return torch.einsum("bthm,hmij->bthij", routing.weights, routing.dictionary)


@pytest.mark.parametrize("T", [1, 9, 33])
def test_straight_through_gradients_are_exact(T: int) -> None:
    x = {name: value.requires_grad_() for name, value in inputs(T).items() if name != "log_decay"}
    routing, soft, logits = learned_routing(T)
    agree(
        lambda: routed_delta_rule(**x, routing=routing, chunk=8),
        lambda: delta_rule_reference(**x, log_decay=None, G=dense_choice(routing)),
        [*x.values(), soft, logits],
    )


def dplr_core(T: int) -> tuple[Tensor, ...]:
    x = inputs(T)
    a, b = -F.normalize(rand(B, T, H, K, seed=6), dim=-1), F.normalize(rand(B, T, H, K, seed=7), dim=-1)
    core = (x["q"], x["k"], x["v"], a, b, -4 * rand(B, T, H, K, seed=4).sigmoid())
    return tuple(value.requires_grad_() for value in core)


@pytest.mark.parametrize("T", LENGTHS)
def test_dplr_in_the_permuted_frame(T: int) -> None:
    core, S = dplr_core(T), inputs(T)["S"].requires_grad_()
    index, sign = permutations(T)
    agree(
        lambda: permuted_dplr(core, index, sign, S),
        lambda: dplr_reference(*core, S, to_dense(index, sign)),
        [*core, S],
    )


@pytest.mark.parametrize("T", [1, 9, 33])
def test_straight_through_gradients_of_dplr(T: int) -> None:
    core, S = dplr_core(T), inputs(T)["S"].requires_grad_()
    routing, soft, logits = learned_routing(T)
    agree(
        lambda: routed_dplr(core, routing, S, chunk=8),
        lambda: dplr_reference(*core, S, dense_choice(routing)),
        [*core, S, soft, logits],
    )


def test_gradcheck() -> None:
    x = [inputs(5)[name][:1, :, :1].requires_grad_() for name in ("q", "k", "v", "beta", "log_decay")]
    S = rand(1, 1, K, V).requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: chunk_delta_rule(*args, chunk=2), (*x, S))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("num_chunks", [1, 2, 16, 23])
def test_grouped_carry_equals_one_by_one(num_chunks: int, gated: bool) -> None:
    """What a GPU runs, including groups that are not full."""
    shape = (B, H, num_chunks, 4)
    k, W, U = (0.4 * rand(*shape, size, seed=i).requires_grad_() for i, size in enumerate((K, K, V)))
    log_decay = -rand(*shape[:3], seed=5).sigmoid().requires_grad_() if gated else None
    S = rand(B, H, K, V, seed=4).requires_grad_()

    def stacked(form: Callable) -> tuple[Tensor, Tensor]:
        starts, last = form(k, U, W, log_decay, S)
        return torch.stack(starts, 2), last

    agree(lambda: stacked(grouped), lambda: stacked(one_by_one), [k, U, W, S])
