"""One optimizer step of factors under the hyperparameters of the host's param group, with a state of our own.

Every rule steps each factor by itself; many come together so that they take few launches.
"""

# pyright: reportPrivateImportUsage=false
# (the torch._foreach functions are private by name only: torch's own optimizers are built on them)

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from svdtrain.adaptive.stacks import runs_of_equals

State = dict[str, Any]
Group = Mapping[str, Any]
Rule = Callable[[Sequence[nn.Parameter], Sequence[State], Group], None]
"""Steps parameters that have a gradient, each with its own state, which is filled where it is empty."""

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
        # By group, as torch has it: Adam takes both.
        decoupled = group.get("decoupled_weight_decay", True)
        return (adamw_step if decoupled else adam_step), moments
    return sgd_step, frozenset({"momentum_buffer"})


def has_own_rule(group: Group, optimizer: torch.optim.Optimizer) -> bool:
    """Whether `rule_for` is what this optimizer does itself, and not the nearest of three."""
    # A subclass with a step of its own may do anything with the same hyperparameters.
    known = [inspect.unwrap(kind.step) for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)]
    own = inspect.unwrap(type(optimizer).step)
    return is_muon(group) or group.get("kind") == "adamw" or own in known


def is_muon(group: Group) -> bool:
    """Whether matrices of this group get orthogonalised updates."""
    return group.get("kind") == "muon" or ("ns_steps" in group and "betas" not in group)


@torch.no_grad()
def adamw_step(params: Sequence[nn.Parameter], states: Sequence[State], group: Group) -> None:
    """torch's AdamW. State of each: step, exp_avg, exp_avg_sq (and max_exp_avg_sq)."""
    _adam(adamw, params, states, group)


@torch.no_grad()
def adam_step(params: Sequence[nn.Parameter], states: Sequence[State], group: Group) -> None:
    """torch's Adam: weight decay enters the gradient."""
    _adam(adam, params, states, group)


def _adam(function: Callable[..., None], params: Sequence[nn.Parameter], states: Sequence[State], group: Group) -> None:
    amsgrad = bool(group.get("amsgrad", False))
    for p, state in zip(params, states, strict=True):
        # A host may count with an int, or on the device for its fused kernel; the plain kernels want a CPU tensor.
        state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device="cpu")
        for key in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())):
            _start_at_zero(state, key, p)
    for alike, own in _taken_apart(params, states, [("any", p.numel()) for p in params]):
        function(
            alike, [_gradient(p) for p in alike], [s["exp_avg"] for s in own], [s["exp_avg_sq"] for s in own],
            [s["max_exp_avg_sq"] for s in own] if amsgrad else [], [s["step"] for s in own],
            foreach=True, fused=False, amsgrad=amsgrad,
            beta1=float(group["betas"][0]), beta2=float(group["betas"][1]), lr=float(group["lr"]),
            weight_decay=float(group.get("weight_decay", 0.0)), eps=float(group.get("eps", 1e-8)),
            maximize=bool(group.get("maximize", False)),
        )  # fmt: skip


@torch.no_grad()
def sgd_step(params: Sequence[nn.Parameter], states: Sequence[State], group: Group) -> None:
    """torch's SGD. State of each: momentum_buffer."""
    for alike, own in _taken_apart(params, states, [("any", p.numel()) for p in params]):
        buffers = [state.get("momentum_buffer") for state in own]
        sgd(
            alike, [_gradient(p) for p in alike], buffers, foreach=_of_one_type(alike, buffers), fused=False,
            weight_decay=float(group.get("weight_decay", 0.0)), momentum=float(group.get("momentum", 0.0)),
            lr=float(group["lr"]), dampening=float(group.get("dampening", 0.0)),
            nesterov=bool(group.get("nesterov", False)), maximize=bool(group.get("maximize", False)),
        )  # fmt: skip
        for state, buffer in zip(own, buffers, strict=True):
            if buffer is not None:
                state["momentum_buffer"] = buffer


@torch.no_grad()
def muon_step(params: Sequence[nn.Parameter], states: Sequence[State], group: Group) -> None:
    """Muon: Nesterov momentum, orthogonalised, decoupled decay. State of each p [m, n]: momentum_buffer [m, n].

    Without the refinements of single implementations (variance reduction, row equilibration, cautious decay).
    """
    for p, state in zip(params, states, strict=True):
        _start_at_zero(state, "momentum_buffer", p)
    for alike, own in _taken_apart(params, states, [_padded_kind(p) for p in params]):
        _muon_step_of_alike(alike, [state["momentum_buffer"] for state in own], group)


def _muon_step_of_alike(params: list[Tensor], buffers: list[Tensor], group: Group) -> None:
    """`muon_step` of nearly equal shapes; every line is that of one matrix, over all of them."""
    momentum, lr, decay = float(group.get("momentum", 0.95)), float(group["lr"]), float(group.get("weight_decay", 0.0))
    grads = [_gradient(p) for p in params]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    ahead = torch._foreach_lerp(grads, buffers, momentum) if group.get("nesterov", True) else buffers
    stack = _padded_stack(list(ahead))
    updates = orthogonalise(stack).unbind()
    torch._foreach_mul_(params, 1 - lr * decay)
    if all(p.shape == stack.shape[1:] for p in params):
        torch._foreach_add_(params, list(updates), alpha=-lr * muon_scale(params[0].shape, group))
        return
    for p, update in zip(params, updates, strict=True):
        m, n = p.shape
        own_norm = math.sqrt(min(m, n) / min(update.shape))  # that of the padded one is min(update.shape)^1/2
        p.add_(update[:m, :n], alpha=-lr * muon_scale(p.shape, group) * own_norm)


def _padded_kind(p: Tensor) -> tuple[Hashable, int]:
    """What factors share that are orthogonalised as one stack, and the size that each takes there at most.

    Ranks drift apart in training, so factors whose shorter sides fall into the same eighth of the longer one go
    together: rows and columns of zeros stay zero in the iteration and change nothing else.
    """
    short, long = sorted(p.shape)
    eighths = math.ceil(8 * short / long)
    return (p.shape[0] > p.shape[1], long, eighths), long * math.ceil(eighths * long / 8)


def _padded_stack(matrices: Sequence[Tensor]) -> Tensor:
    """Stack [N, m, n] of matrices of at most m x n, the smaller ones filled up with zeros."""
    m, n = (max(t.shape[side] for t in matrices) for side in (0, 1))
    if all(t.shape == (m, n) for t in matrices):
        return torch.stack(list(matrices))
    stack = matrices[0].new_zeros(len(matrices), m, n)
    corners = [row[: t.shape[0], : t.shape[1]] for row, t in zip(stack.unbind(), matrices, strict=True)]
    torch._foreach_copy_(corners, list(matrices))
    return stack


def muon_scale(shape: torch.Size, group: Group) -> float:
    """Factor on the learning rate of an m x n matrix, by the convention of the group's own optimizer."""
    m, n = shape
    if group.get("adjust_lr_fn") == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return math.sqrt(max(1.0, m / n))


def orthogonalise(X: Tensor) -> Tensor:
    """Approximate polar factor of each X [..., m, n] with Frobenius norm min(m, n)^1/2; zero stays zero."""
    a, b, c = _QUINTIC
    m, n = X.shape[-2:]
    work = X.reshape(-1, m, n)
    work = work.bfloat16() if X.is_cuda and X.dtype != torch.float64 else work
    work = work / _frobenius(work)
    for _ in range(_MUON_STEPS):
        # The Gram matrix of the shorter side, so that nothing is transposed and rows of the result lie as in X.
        gram = work.mT @ work if m > n else work @ work.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        work = torch.baddbmm(work, work, gram, beta=a) if m > n else torch.baddbmm(work, gram, work, beta=a)
    work = work.to(X.dtype)
    return (work * (math.sqrt(min(m, n)) / _frobenius(work))).reshape(X.shape)


def _frobenius(X: Tensor) -> Tensor:
    """Norms [N, 1, 1] of a stack [N, m, n], kept from zero."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(1e-30)


def _taken_apart(
    params: Sequence[nn.Parameter], states: Sequence[State], kinds: Sequence[tuple[Hashable, int]]
) -> list[tuple[list[Tensor], list[State]]]:
    """What is stepped together: of one device, type and kind (with the size of each), no more at once than fits."""
    keys = [(p.device, p.dtype, kind) for p, (kind, _) in zip(params, kinds, strict=True)]
    runs = runs_of_equals(keys, [size for _, size in kinds])
    return [([params[i] for i in run], [states[i] for i in run]) for run in runs]


def _of_one_type(params: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> bool:
    """Whether torch's functions over lists take these: a host may keep float32 momentum for 16-bit weights."""
    return all(b is None or b.dtype == p.dtype for p, b in zip(params, buffers, strict=True))


def _start_at_zero(state: State, key: str, p: Tensor) -> None:
    if key not in state:
        state[key] = torch.zeros_like(p)


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
