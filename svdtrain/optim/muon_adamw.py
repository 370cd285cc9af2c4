"""One optimizer for the whole model: Muon for matrices, AdamW for everything else, state per parameter.

State per parameter (not per stack) lets a parameter leave its group, or factors of another shape join, at any step
without touching the state of the others. Equal shapes are stacked for the length of a step only.

Over several ranks each orthogonalises its share of every stack and all get the results. State stays whole on every
rank: a checkpoint does not depend on the number of ranks, and a matrix may change its mode at any step.
"""

# pyright: reportPrivateImportUsage=false
# (the torch._foreach functions are private by name only: torch's own optimizers are built on them)

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from svdtrain.optim.muon import (
    apply_update,
    nesterov_momentum,
    orthogonalized_update,
    second_momentum_shape,
    shape_scale,
)

MUON_DEFAULTS: dict[str, Any] = {"momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.0}
ADAMW_DEFAULTS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
_DEFAULTS = {"muon": MUON_DEFAULTS, "adamw": ADAMW_DEFAULTS}


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups of kind "muon" (2-D parameters), AdamW for groups of kind "adamw".

    muon groups: lr, momentum, ns_steps, beta2, weight_decay; state momentum_buffer [m, n] and second_momentum_buffer
    [m, 1] or [1, n]. adamw groups: lr, betas, eps, weight_decay; state exp_avg, exp_avg_sq and step (0-d, on the CPU).
    State that is missing starts at zero, entry by entry, so that a new parameter may bring only some of it.
    Moments of bf16 and fp16 parameters are fp32. Nothing in a step waits for the GPU.
    ranks: the process group over which Muon's work is shared; every rank must hold the same parameters and gradients.
    Raises ValueError for a group without a kind or lr, or a muon parameter that is not 2-D.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]], *, ranks: Any = None) -> None:
        self._ranks = ranks
        super().__init__(param_groups, defaults={})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        kind = param_group.get("kind")
        if kind not in _DEFAULTS:
            raise ValueError(f"a parameter group needs kind 'muon' or 'adamw', got {kind!r}")
        if "lr" not in param_group:
            raise ValueError(f"the {kind} parameter group has no lr")
        super().add_param_group({**_DEFAULTS[kind], **param_group})
        if kind == "muon":
            _check_matrices(self.param_groups[-1]["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shares: list[Share] = []
        for group in sorted(self.param_groups, key=lambda group: group["kind"] != "muon"):
            params = [p for p in group["params"] if p.grad is not None]
            for alike in _stackable(params, by_shape=group["kind"] == "muon"):
                if group["kind"] == "adamw":
                    self._adamw_step(alike, group)  # while Muon's results travel
                elif self._ranks is None:
                    self._muon_step(alike, group)
                else:
                    shares.append(self._muon_share(alike, group))
        for share in shares:
            share.receive()
        return loss

    def _muon_share(self, params: list[Tensor], group: dict[str, Any]) -> Share:
        """This rank's part of a stack, on its way to the others. Every rank's momentum moves, because it is cheap."""
        share = Share(params, self._ranks)
        states = [self._muon_state(p) for p in params]
        mine = params[share.own]
        others = [i for i in range(len(params)) if i not in range(*share.own.indices(len(params)))]
        if others:
            buffers = [states[i]["momentum_buffer"] for i in others]
            torch._foreach_lerp_(buffers, [_gradient(params[i]) for i in others], 1 - group["momentum"])
        if mine:
            self._muon_step(mine, group)
        share.send([s["second_momentum_buffer"] for s in states])
        return share

    def _muon_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._muon_state(p) for p in params]
        grads = [_gradient(p) for p in params]
        lookahead = nesterov_momentum(grads, [s["momentum_buffer"] for s in states], group["momentum"])
        second = [s["second_momentum_buffer"] for s in states]
        stacked_second = torch.stack(second)
        U = orthogonalized_update(
            torch.stack(lookahead),
            stacked_second,
            beta2=group["beta2"],
            steps=group["ns_steps"],
            polar_dtype=_polar_dtype(params[0]),
        )
        lr = group["lr"] * shape_scale(params[0].shape)
        W = apply_update(torch.stack(params), U, lr, group["weight_decay"])
        torch._foreach_copy_(second, list(stacked_second.unbind()))
        torch._foreach_copy_(params, list(W.unbind()))

    def _muon_state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        if "second_momentum_buffer" not in state:
            state["second_momentum_buffer"] = p.new_zeros(second_momentum_shape(p.shape))
        return state

    def _adamw_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._adamw_state(p) for p in params]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        # bf16 has no room for small changes, so the arithmetic is fp32 and only the result is rounded.
        precise = [_precise(p) for p in params]
        torch._fused_adamw_(
            precise,
            [_gradient(p).to(w.dtype) for p, w in zip(params, precise, strict=True)],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            _steps_on(params[0].device, steps),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        if precise[0].dtype != params[0].dtype:
            torch._foreach_copy_(params, precise)

    def _adamw_state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(_precise(p))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep the type they were saved in: torch would round fp32 moments of bf16 weights."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name != "step" and value.dtype != p.dtype:
                    self.state[p][name] = value.to(p.device, copy=True)


class Share:
    """A stack of K equal matrices over R ranks: rank i owns ceil(K / R) of them in a row, the last ranks fewer or none.

    Weights and second moments go out in one message per stack, and come back into the tensors of every rank.
    """

    def __init__(self, params: list[Tensor], ranks: Any) -> None:
        self._params, self._ranks = params, ranks
        world, rank = dist.get_world_size(ranks), dist.get_rank(ranks)
        self._per_rank = -(-len(params) // world)
        self._world = world
        self.own = slice(min(rank * self._per_rank, len(params)), min((rank + 1) * self._per_rank, len(params)))

    def send(self, second: list[Tensor]) -> None:
        """Start to exchange: own weights and `second` are final, those of the others still old."""
        self._second = second
        rows = [torch.cat([p.reshape(-1), s.reshape(-1)]) for p, s in self._pairs(self.own)]
        width = self._params[0].numel() + second[0].numel()
        padding = self._params[0].new_zeros(self._per_rank - len(rows), width)
        self._sent = torch.cat([*(row[None] for row in rows), padding])  # kept until the message has left
        self._received = self._sent.new_empty(self._world * self._per_rank, width)
        self._handle = _all_gather(self._received, self._sent, self._ranks)

    def receive(self) -> None:
        """Wait, and take over what the other ranks computed."""
        self._handle.wait()
        for row, (p, s) in zip(self._received, self._pairs(slice(None)), strict=False):
            p.copy_(row[: p.numel()].view_as(p))
            s.copy_(row[p.numel() :].view_as(s))

    def _pairs(self, which: slice) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._params[which], self._second[which], strict=True))


def _all_gather(out: Tensor, own: Tensor, ranks: Any) -> Any:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the newer name of the same
    return gather(out, own, group=ranks, async_op=True)


def _check_matrices(params: list[Tensor]) -> None:
    wrong = [tuple(p.shape) for p in params if p.dim() != 2]
    if wrong:
        raise ValueError(f"Muon takes 2-D parameters only, got shapes {wrong}; put them into an adamw group")


def _stackable(params: list[Tensor], *, by_shape: bool) -> list[list[Tensor]]:
    """Parameters of one device and type (and shape), in order of first appearance."""
    buckets: dict[Any, list[Tensor]] = defaultdict(list)
    for p in params:
        buckets[(p.device, p.dtype, p.shape if by_shape else None)].append(p)
    return list(buckets.values())


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _precise(p: Tensor) -> Tensor:
    return p.float() if p.dtype in (torch.bfloat16, torch.float16) else p


def _polar_dtype(p: Tensor) -> torch.dtype:
    """bf16 on CUDA (the iteration tolerates it), the parameter's own type elsewhere and always for fp64."""
    return torch.bfloat16 if p.device.type == "cuda" and p.dtype != torch.float64 else p.dtype


def _steps_on(device: torch.device, steps: list[Tensor]) -> list[Tensor]:
    """Step counts for the fused kernel, which wants them beside the weights; a fill per distinct value, no copy."""
    if device.type == "cpu":
        return steps
    filled = {value: torch.full((), value, device=device) for value in {float(step) for step in steps}}
    return [filled[float(step)] for step in steps]
