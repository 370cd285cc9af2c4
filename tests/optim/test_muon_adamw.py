"""The optimizer: its two update rules, per-parameter state, and exact resume."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svdtrain.optim import MuonAdamW, muon


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def groups(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"kind": "muon", "params": matrices, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.3},
        {"kind": "adamw", "params": others, "lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1},
    ]


MATRICES, OTHERS = [(12, 8), (8, 12), (12, 8), (16, 2), (2, 16), (1, 12)], [(7,), (5, 4), (1,)]


def naive_muon(W: Tensor, grads: list[Tensor]) -> Tensor:
    """Muon for one matrix, written out with an SVD instead of matrix products."""
    m, n = W.shape
    momentum, second = torch.zeros_like(W), 0.0
    for G in grads:
        momentum = 0.9 * momentum + 0.1 * G
        X = 0.1 * G + 0.9 * momentum
        X = X / X.norm(dim=1, keepdim=True) * (X.norm() / m**0.5)
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        S = S / (S.norm() * 1.01 + 1e-6)
        for a, b, c in muon.POLAR_EXPRESS_COEFFICIENTS:
            S = a * S + b * S**3 + c * S**5
        X = (U * (S / S.norm() * min(m, n) ** 0.5)) @ Vh
        variance = X.square().mean(1 if m >= n else 0, keepdim=True)
        second = 0.9 * second + 0.1 * variance
        Y = X / second.sqrt()
        X = Y * (X.norm() / Y.norm())
        lr = 0.02 * max(1, m / n) ** 0.5
        W = W - lr * X - lr * 0.3 * W * (X * W >= 0)
    return W


def test_muon_equals_the_naive_reference() -> None:
    params = parameters(*MATRICES)
    expected, grads = [p.detach().clone() for p in params], [[] for _ in params]
    optimizer = MuonAdamW(groups(params, [])[:1])
    for step in range(4):
        give_gradients(params, step)
        for kept, p in zip(grads, params, strict=True):
            kept.append(p.grad.clone())  # type: ignore[union-attr]
        optimizer.step()
    for p, start, kept in zip(params, expected, grads, strict=True):
        torch.testing.assert_close(p.detach(), naive_muon(start, kept), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(p.grad, kept[-1], atol=0, rtol=0)  # gradients survive the step


def test_adamw_equals_torch() -> None:
    ours = parameters(*OTHERS)
    theirs = copy.deepcopy(ours)
    optimizer = MuonAdamW(groups([], ours)[1:])
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1, foreach=False)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12)


def test_bf16_parameters_have_fp32_moments_and_fp32_arithmetic() -> None:
    (p,) = parameters((40, 30), dtype=torch.bfloat16)
    exact = nn.Parameter(p.detach().float())
    optimizer = MuonAdamW([{"kind": "adamw", "params": [p], "lr": 0.1, "betas": (0.8, 0.995)}])
    reference = torch.optim.AdamW([exact], lr=0.1, betas=(0.8, 0.995), eps=1e-10, weight_decay=0.0)
    for step in range(30):
        give_gradients([p], step)
        assert p.grad is not None
        exact.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[p][name].dtype == torch.float32
        torch.testing.assert_close(optimizer.state[p][name], reference.state[exact][name])
    assert (p.float() - exact).abs().max() < 0.1  # 30 roundings of a bf16 weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_resume_is_exact(dtype: torch.dtype) -> None:
    def run(params: list[nn.Parameter], optimizer: MuonAdamW, steps: range) -> None:
        for step in steps:
            give_gradients(params, step)
            optimizer.step()

    def fresh() -> tuple[list[nn.Parameter], MuonAdamW]:
        params = parameters(*MATRICES, dtype=torch.float32) + parameters(*OTHERS, dtype=dtype)
        return params, MuonAdamW(groups(params[: len(MATRICES)], params[len(MATRICES) :]))

    straight, optimizer = fresh()
    run(straight, optimizer, range(6))
    first, optimizer = fresh()
    run(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    second, resumed = fresh()
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q.data)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(second, resumed, range(3, 6))
    torch.testing.assert_close([*second], [*straight], atol=0, rtol=0)


def test_a_parameter_leaves_and_factors_join_without_touching_the_others() -> None:
    params = parameters((12, 8), (12, 8), (12, 8))
    optimizer = MuonAdamW(groups(params, [])[:1])
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    before = copy.deepcopy([optimizer.state[p] for p in params[1:]])
    group = optimizer.param_groups[0]
    group["params"] = params[1:]
    del optimizer.state[params[0]]
    B, A = parameters((12, 3), (3, 8))
    optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, "params": [B, A]})
    for kept, p in zip(before, params[1:], strict=True):
        torch.testing.assert_close(optimizer.state[p], kept, atol=0, rtol=0)
    alone = copy.deepcopy(params[1:])
    reference = MuonAdamW(groups(alone, [])[:1])
    for p, q in zip(params[1:], alone, strict=True):
        reference.state[q] = copy.deepcopy(optimizer.state[p])
    frozen = params[0].detach().clone()
    give_gradients([*params, B, A], 2)
    give_gradients(alone, 2)
    for p, q in zip(params[1:], alone, strict=True):
        q.grad = p.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    reference.step()
    torch.testing.assert_close(params[0].detach(), frozen, atol=0, rtol=0)
    for p, q in zip(params[1:], alone, strict=True):
        torch.testing.assert_close(p, q, atol=1e-14, rtol=0)
    assert optimizer.state[B]["second_momentum_buffer"].shape == (12, 1)
    assert optimizer.state[A]["second_momentum_buffer"].shape == (1, 8)


def test_a_parameter_may_bring_part_of_its_state() -> None:
    matrix, vector = parameters((4, 3), (3,))
    optimizer = MuonAdamW(groups([matrix], [vector]))
    optimizer.state[matrix]["momentum_buffer"] = torch.ones_like(matrix)
    optimizer.state[vector]["exp_avg"] = torch.ones_like(vector)
    give_gradients([matrix, vector], 0)
    assert matrix.grad is not None
    assert vector.grad is not None
    optimizer.step()
    torch.testing.assert_close(optimizer.state[matrix]["momentum_buffer"], 0.9 + 0.1 * matrix.grad)
    torch.testing.assert_close(optimizer.state[vector]["exp_avg"], 0.8 + 0.2 * vector.grad)
    assert set(optimizer.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}


def test_without_gradient_nothing_happens() -> None:
    params = parameters((4, 4), (4, 4), (3,), (3,))
    start = [p.detach().clone() for p in params]
    optimizer = MuonAdamW(groups(params[:2], params[2:]))
    optimizer.step()
    give_gradients([params[1], params[3]], 0)
    optimizer.step()
    moved = [not torch.equal(p, s) for p, s in zip(params, start, strict=True)]
    assert moved == [False, True, False, True]
    assert [p in optimizer.state for p in params] == [False, True, False, True]
    assert optimizer.state[params[3]]["step"].item() == 1


def test_hooks_and_closure() -> None:
    params = parameters((4, 4))
    optimizer = MuonAdamW(groups(params, [])[:1])
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        seen.append("closure")
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None  # type: ignore[arg-type]
    assert seen == ["before", "closure", "after"]


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ({"lr": 0.1}, "kind 'muon' or 'adamw', got None"),
        ({"kind": "sgd", "lr": 0.1}, "got 'sgd'"),
        ({"kind": "muon"}, "no lr"),
        ({"kind": "muon", "lr": 0.1}, r"2-D parameters only, got shapes \[\(3,\)\]"),
    ],
)
def test_wrong_groups_are_refused(group: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MuonAdamW([{**group, "params": parameters((3,))}])


def test_quadratic_is_minimised() -> None:
    (W, b) = parameters((10, 6), (6,), dtype=torch.float32)
    target = torch.randn(10, 6, generator=torch.Generator().manual_seed(5))
    optimizer = MuonAdamW([{"kind": "muon", "params": [W], "lr": 0.4}, {"kind": "adamw", "params": [b], "lr": 0.2}])
    for _ in range(200):
        for group in optimizer.param_groups:
            group["lr"] *= 0.97
        optimizer.zero_grad()
        ((W - target).square().mean() + b.square().mean()).backward()
        optimizer.step()
    assert (W - target).abs().max() < 0.05
    assert b.abs().max() < 0.05
