"""The host keeps W; B and A are stepped beside it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adaptive_toy import Toy, backward, batch, make_toy
from torch import Tensor, nn
from torch.func import functional_call

from svdtrain.adaptive.attach import AttachedSVD, attach
from svdtrain.adaptive.moments import first_to_factors
from svdtrain.adaptive.update_rules import muon_scale, orthogonalise, rule_for
from svdtrain.config import SVDConfig

Q = "h.0.attn.c_q"
OFF = SVDConfig(svd_preset="off", svd_targets="all")
HOSTS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
}


class Stacked(torch.optim.Optimizer):
    """A host like nanochat's: one momentum for a whole group, stacked under its first parameter, as one big step."""

    def __init__(self, params: Any) -> None:
        super().__init__([{"params": list(params), "kind": "muon", "lr": 0.02, "momentum": 0.9}], defaults={})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            state = self.state[group["params"][0]]
            G = torch.stack([p.grad for p in group["params"]])
            buffer = state.setdefault("momentum_buffer", torch.zeros_like(G))
            buffer.lerp_(G, 0.1)
            U, _, Vh = torch.linalg.svd(buffer, full_matrices=False)
            for p, update in zip(group["params"], U @ Vh, strict=True):
                p.sub_(group["lr"] * update)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, dtype: Any = torch.float32) -> list:
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        losses.append(backward(model, step, dtype=dtype))
        optimizer.step()
    return losses


@pytest.mark.parametrize("kind", HOSTS)
def test_twenty_steps_equal_autograd_on_b_and_a(kind: str) -> None:
    ranks = {Q: 7, "h.1.mlp.c_fc": 3}
    model = make_toy(dtype=torch.float64)
    optimizer = HOSTS[kind](model.parameters())
    svd = attach(model, optimizer, OFF)
    reference = make_toy(dtype=torch.float64)
    parts: dict[str, tuple[Tensor, nn.Parameter, nn.Parameter]] = {}
    for name, r in ranks.items():
        svd.set_mode(name, r)
        factors = svd.targets[name].factors
        assert factors is not None
        B, A = (nn.Parameter(t.detach().clone()) for t in (factors.B, factors.A))
        parts[name] = (factors.W_p.clone(), B, A)
    plain = [p for name, p in reference.named_parameters() if name.removesuffix(".weight") not in ranks]
    reference_optimizer = HOSTS[kind]([*plain, *(t for _, B, A in parts.values() for t in (B, A))])

    run(model, optimizer, 0, 20, torch.float64)
    for step in range(20):
        reference_optimizer.zero_grad()
        x, y = batch(step, dtype=torch.float64)
        dense = {f"{name}.weight": W_p + B @ A for name, (W_p, B, A) in parts.items()}
        (functional_call(reference, dense, (x,)) - y).square().mean().backward()
        reference_optimizer.step()

    own = dict(model.named_parameters())
    for name, p in reference.named_parameters():
        short = name.removesuffix(".weight")
        expected = parts[short][0] + parts[short][1] @ parts[short][2] if short in parts else p
        torch.testing.assert_close(own[name], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("host", ["adamw", "stacked"])
def test_hosts_groups_and_state_never_change_shape(host: str) -> None:
    model = make_toy()
    if host == "stacked":
        optimizer: torch.optim.Optimizer = Stacked(p for n, p in model.named_parameters() if "attn" in n)
    else:
        optimizer = HOSTS["adamw"](model.parameters())
    run(model, optimizer, 0, 1)
    skeleton = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    keys = [(id(p), sorted(state)) for p, state in optimizer.state.items()]
    svd = attach(model, optimizer, SVDConfig(svd_preset="off"))
    for step, r in enumerate((8, 5, None, 6)):
        svd.set_mode(Q, r)
        losses = run(model, optimizer, 3 * step, 3 * step + 3)
        assert all(bool(loss.isfinite()) for loss in losses)
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == skeleton
        assert [(id(p), sorted(state)) for p, state in optimizer.state.items()] == keys
    fresh = make_toy()
    if host == "adamw":  # the host's own checkpoint loads into a program that knows nothing of this
        HOSTS["adamw"](fresh.parameters()).load_state_dict(optimizer.state_dict())


def test_low_rank_mode_moves_w_only_in_rank_2r_and_full_mode_resumes_the_hosts_momentum() -> None:
    model = make_toy()
    optimizer = Stacked(p for n, p in model.named_parameters() if "attn" in n)
    svd = attach(model, optimizer, SVDConfig(svd_preset="off"))
    run(model, optimizer, 0, 3)
    svd.set_mode(Q, 3)
    W = svd.targets[Q].W
    before = W.detach().clone()
    run(model, optimizer, 3, 4)
    change = W.detach() - before
    assert float(change.norm()) > 0
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 6
    buffer = optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"][0].clone()
    svd.set_mode(Q, None)
    run(model, optimizer, 4, 5)
    G = W.grad
    torch.testing.assert_close(
        optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"][0], buffer.lerp(G, 0.1)
    )


def test_factors_start_from_the_hosts_momentum_and_follow_its_schedule() -> None:
    model = make_toy()
    optimizer = HOSTS["sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 5))
    svd = attach(model, optimizer, OFF)
    for step in range(3):
        run(model, optimizer, step, step + 1)
        scheduler.step()
    svd.set_mode(Q, 6)
    factors = svd.targets[Q].factors
    assert factors is not None
    M = optimizer.state[factors.W]["momentum_buffer"]
    expected = first_to_factors(M, factors.B.detach(), factors.A.detach())
    saved = svd.state_dict()["adapter"][Q]
    torch.testing.assert_close(saved["B"]["momentum_buffer"], expected[0])
    torch.testing.assert_close(saved["A"]["momentum_buffer"], expected[1])
    for step in range(3, 6):
        run(model, optimizer, step, step + 1)
        scheduler.step()
    before = factors.W.detach().clone()
    run(model, optimizer, 6, 7)  # the learning rate is zero now
    assert torch.equal(factors.W, before)


@pytest.mark.parametrize("kind", HOSTS)
def test_resume_is_exact(kind: str) -> None:
    def switch(svd: AttachedSVD) -> None:
        plan = {3: 8, 7: 5, 11: None, 13: 6}
        if svd.step in plan:
            svd.set_mode(Q, plan[svd.step])

    def train(model: Toy, optimizer: torch.optim.Optimizer, svd: AttachedSVD, last: int) -> list[Tensor]:
        losses = []
        while svd.step < last:
            switch(svd)
            losses += run(model, optimizer, svd.step, svd.step + 1)
        return losses

    def build(seed: int) -> tuple[Toy, torch.optim.Optimizer, AttachedSVD]:
        model = make_toy(seed)
        optimizer = HOSTS[kind](model.parameters())
        return model, optimizer, attach(model, optimizer, SVDConfig(svd_switching=False, svd_interval=2))

    model, optimizer, svd = build(0)
    straight = train(model, optimizer, svd, 16)
    for cut in (5, 9, 15):
        first, first_optimizer, first_svd = build(0)
        losses = train(first, first_optimizer, first_svd, cut)
        file = io.BytesIO()
        torch.save([first_svd.state_dict(), first_optimizer.state_dict(), first.state_dict()], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second, second_optimizer, second_svd = build(7)
        second_optimizer.load_state_dict(saved[1])  # in any order: the host's layout is always the same
        second_svd.load_state_dict(saved[0])
        second.load_state_dict(saved[2])
        losses += train(second, second_optimizer, second_svd, 16)
        assert torch.equal(torch.stack(losses), torch.stack(straight))


def test_state_of_the_other_adapter_is_refused() -> None:
    model = make_toy()
    svd = attach(model, HOSTS["sgd"](model.parameters()), SVDConfig(svd_adapter="reregister"))
    svd.set_mode(Q, 5)
    other = make_toy()
    other_svd = attach(other, HOSTS["sgd"](other.parameters()))
    with pytest.raises(ValueError, match="another svd_adapter"):
        other_svd.load_state_dict(copy.deepcopy(svd.state_dict()))


@pytest.mark.parametrize(("m", "n"), [(20, 6), (6, 20), (12, 12)])
def test_orthogonalised_update(m: int, n: int) -> None:
    X = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = orthogonalise(X)
    assert float(update.norm()) == pytest.approx(min(m, n) ** 0.5)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    inner = U.T @ update @ Vh.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-9)  # same singular vectors
    strong = inner.diagonal()[0.05 * S[0] < S]
    assert 0.6 < float(strong.min()) <= float(strong.max()) < 1.4
    assert not orthogonalise(torch.zeros(m, n)).any()


def test_muon_scale_follows_the_groups_convention() -> None:
    tall, wide = torch.Size((80, 20)), torch.Size((20, 80))
    assert muon_scale(tall, {}) == 2.0
    assert muon_scale(wide, {}) == 1.0
    assert muon_scale(wide, {"adjust_lr_fn": "match_rms_adamw"}) == pytest.approx(0.2 * 80**0.5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_our_muon_step_is_torchs_but_for_the_norm() -> None:
    """torch iterates in bf16 and does not renormalise: directions agree, lengths within the iteration's error."""
    p, q = (nn.Parameter(torch.ones(24, 16)) for _ in range(2))
    host = torch.optim.Muon([p], lr=0.1, weight_decay=0.2)
    rule, _ = rule_for(host.param_groups[0], host)
    state: dict[str, Any] = {}
    for step in range(3):
        G = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        p.grad, q.grad = G.clone(), G.clone()
        host.step()
        rule([q], [state], host.param_groups[0])
        torch.testing.assert_close(host.state[p]["momentum_buffer"], state["momentum_buffer"])
    moved_p, moved_q = ((0.98**3 - t.detach()).flatten() for t in (p, q))
    assert float(torch.nn.functional.cosine_similarity(moved_p, moved_q, dim=0)) > 0.99


def test_match_rms_gives_low_rank_steps_the_norm_of_the_hosts() -> None:
    def norms(match: bool) -> tuple[float, float]:
        model = make_toy(dtype=torch.float64)
        optimizer = HOSTS["sgd"](model.parameters())
        svd = attach(model, optimizer, SVDConfig(svd_preset="off", svd_match_rms=match))
        svd.set_mode(Q, 6)
        W = svd.targets[Q].W
        before = W.detach().clone()
        plain = make_toy(dtype=torch.float64)
        plain_optimizer = HOSTS["sgd"](plain.parameters())
        run(model, optimizer, 0, 1, torch.float64)
        run(plain, plain_optimizer, 0, 1, torch.float64)
        full = plain.h[0].attn.c_q.weight - before
        return float((W - before).detach().norm()), float(full.detach().norm())

    matched, full = norms(True)
    assert matched == pytest.approx(full, rel=1e-6)
    unmatched, full = norms(False)
    assert abs(unmatched / full - 1) > 0.1
