"""One optimizer step of one factor under the hyperparameters of the host's param group, with a state of our own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

State = dict[str, Any]
Group = Mapping[str, Any]
Rule = Callable[[nn.Parameter, State, Group], None]

# The quintic iteration of Muon (K. Jordan et al. 2024, kellerjordan.github.io/posts/muon): five steps bring singular
# values above 1e-3 of the norm to within about 30 % of 1; the norm is put right afterwards.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_MUON_STEPS = 5


def rule_for(group: Group, optimizer: torch.optim.Optimizer) -> tuple[Rule, frozenset[str]]:
    """How the factors of a matrix in this group are stepped, and the state keys that the rule uses.

    Muon where the group says so (kind "muon", or ns_steps), Adam or AdamW where it has betas, else SGD.
    """
    if is_muon(group):
        return muon_step, frozenset({"momentum_buffer"})
    if "betas" in group:
        moments = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
        coupled = isinstance(optimizer, torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW)
        return (adam_step if coupled else adamw_step), moments
    return sgd_step, frozenset({"momentum_buffer"})


def is_muon(group: Group) -> bool:
    """Whether matrices of this group get orthogonalised updates."""
    return group.get("kind") == "muon" or ("ns_steps" in group and "betas" not in group)


@torch.no_grad()
def adamw_step(p: nn.Parameter, state: State, group: Group) -> None:
    """torch's AdamW. state: step, exp_avg, exp_avg_sq (and max_exp_avg_sq)."""
    _adam(adamw, p, state, group)


@torch.no_grad()
def adam_step(p: nn.Parameter, state: State, group: Group) -> None:
    """torch's Adam: weight decay enters the gradient."""
    _adam(adam, p, state, group)


def _adam(function: Callable[..., None], p: nn.Parameter, state: State, group: Group) -> None:
    amsgrad = bool(group.get("amsgrad", False))
    if "step" not in state:
        state["step"] = torch.tensor(0.0)
    # A host may count with an int, or on the device for its fused kernel; the plain kernel wants a CPU tensor.
    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu()
    for key in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())):
        state.setdefault(key, torch.zeros_like(p))
    function(
        [p], [_gradient(p)], [state["exp_avg"]], [state["exp_avg_sq"]],
        [state["max_exp_avg_sq"]] if amsgrad else [], [state["step"]],
        foreach=False, fused=False, amsgrad=amsgrad, beta1=float(group["betas"][0]), beta2=float(group["betas"][1]),
        lr=float(group["lr"]), weight_decay=float(group.get("weight_decay", 0.0)), eps=float(group.get("eps", 1e-8)),
        maximize=bool(group.get("maximize", False)),
    )  # fmt: skip


@torch.no_grad()
def sgd_step(p: nn.Parameter, state: State, group: Group) -> None:
    """torch's SGD. state: momentum_buffer."""
    buffers = [state.get("momentum_buffer")]
    sgd(
        [p], [_gradient(p)], buffers, foreach=False, fused=False,
        weight_decay=float(group.get("weight_decay", 0.0)), momentum=float(group.get("momentum", 0.0)),
        lr=float(group["lr"]), dampening=float(group.get("dampening", 0.0)),
        nesterov=bool(group.get("nesterov", False)), maximize=bool(group.get("maximize", False)),
    )  # fmt: skip
    if buffers[0] is not None:
        state["momentum_buffer"] = buffers[0]


@torch.no_grad()
def muon_step(p: nn.Parameter, state: State, group: Group) -> None:
    """Muon: Nesterov momentum, orthogonalised, decoupled decay. state: momentum_buffer [m, n].

    Without the refinements of single implementations (variance reduction, row equilibration, cautious decay).
    """
    momentum, lr = float(group.get("momentum", 0.95)), float(group["lr"])
    buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
    G = _gradient(p)
    buffer.lerp_(G, 1 - momentum)
    update = orthogonalise(G.lerp(buffer, momentum) if group.get("nesterov", True) else buffer)
    p.mul_(1 - lr * float(group.get("weight_decay", 0.0)))
    p.add_(update, alpha=-lr * muon_scale(p.shape, group))


def muon_scale(shape: torch.Size, group: Group) -> float:
    """Factor on the learning rate of an m x n matrix, by the convention of the group's own optimizer."""
    m, n = shape
    if group.get("adjust_lr_fn") == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return math.sqrt(max(1.0, m / n))


def orthogonalise(X: Tensor) -> Tensor:
    """Approximate polar factor of X [m, n] with Frobenius norm min(m, n)^1/2; zero stays zero."""
    a, b, c = _QUINTIC
    work = X.bfloat16() if X.is_cuda and X.dtype != torch.float64 else X
    work = work.T if X.shape[0] > X.shape[1] else work
    work = work / torch.linalg.vector_norm(work).clamp_min(1e-30)
    for _ in range(_MUON_STEPS):
        gram = work @ work.T
        work = a * work + (b * gram + c * gram @ gram) @ work
    work = (work.T if X.shape[0] > X.shape[1] else work).to(X.dtype)
    size = torch.linalg.vector_norm(work)
    return work * (math.sqrt(min(X.shape)) / size.clamp_min(1e-30))


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad
