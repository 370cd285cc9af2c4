"""Interference with what was learned first: I_W = <G_ref, dW>, in nats, by matrix and by direction.

G_ref is the gradient of a reference loss: the mean loss of a fixed batch of first-seen data. To first order I_W is what
the updates of one matrix since the last measurement did to that loss; positive is harm. It adds up over matrices and
over orthogonal directions, so it says which matrix clobbers, and through which part of its spectrum.

Curvature. <G_ref, dW> at the end of the window overestimates the change by half of dW H dW, at its start it
underestimates it by as much. The mean of both (the trapezoid rule) is exact to second order, and half their difference
*is* the curvature: no quiet window is needed. Before there are two measurements nothing is known, and it says nan.

Cost of a measurement: one forward and backward pass of the reference batch and one pass over the matrices. Memory
between measurements: one copy of every matrix, and its last G_ref in bfloat16 (6 bytes a weight, weights in float32).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from svdtrain.adaptive.precision import full_precision

ReferenceLoss = Callable[[], Tensor]
_RESAMPLES = 1000
_CONFIDENCE = 0.9


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One measurement: what happened to the reference loss since the last one. All losses and changes in nats."""

    nats: dict[str, float]
    """Interference by matrix; nan at the first measurement."""
    curvature: float
    """Second-order part that the gradient at the window's end alone would add, over all matrices."""
    loss: float
    """The reference loss now."""
    loss_change: float
    """Its measured change: the sum of `nats`, what all other parameters did, and third-order terms."""
    interval: tuple[float, float] = (math.nan, math.nan)
    """90 % bootstrap interval of `total`, over the losses given (needs two or more of them)."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The same by matrix."""
    seconds: float = 0.0

    @property
    def total(self) -> float:
        """Interference of all matrices together."""
        return math.fsum(self.nats.values()) if not any(map(math.isnan, self.nats.values())) else math.nan

    @property
    def unexplained(self) -> float:
        """Measured change less interference: parameters that are not watched, and third-order terms."""
        return self.loss_change - self.total

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a record; those not known yet are left out."""
        numbers = {
            "interference/total": self.total,
            "interference/low": self.interval[0],
            "interference/high": self.interval[1],
            "interference/curvature": self.curvature,
            "interference/unexplained": self.unexplained,
            "reference/loss": self.loss,
            "reference/loss_change": self.loss_change,
            **{f"interference/{name}": value for name, value in self.nats.items()},
        }
        known = {key: value for key, value in numbers.items() if not math.isnan(value)}
        return {**known, "interference/seconds": round(self.seconds, 4)}


class Interference:
    """Measures interference of some matrices with one reference batch.

    `measure()` reads, `split()` then says through which directions, `advance()` starts the next window; call all three
    between optimizer steps. Training is left as it was: gradients come from `torch.autograd.grad`, so no p.grad is
    written, no hook on it fires, and the random generators are put back.
    """

    def __init__(
        self,
        targets: Mapping[str, nn.Parameter],
        reference_loss: ReferenceLoss | Sequence[ReferenceLoss],
        *,
        average: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        """`reference_loss` runs a forward and returns the mean loss, [] in nats; or several, of equal weight, which the
        bootstrap then draws from. `average`: mean over ranks of a small CPU tensor, where each has its own part."""
        self.targets = dict(targets)
        self.reference_losses = [reference_loss] if callable(reference_loss) else list(reference_loss)
        if not self.targets or not self.reference_losses:
            raise ValueError("interference needs at least one matrix and one reference loss")
        self._average = average
        self._W: dict[str, Tensor] = {}
        self._G: dict[str, Tensor] = {}
        self._G_now: dict[str, Tensor] = {}
        self._loss = self._loss_now = math.nan

    def measure(self) -> Reading:
        """Forward and backward of the reference batch, and the interference since `advance()` was called last.

        Raises ValueError when a loss is no scalar or does not depend on a matrix.
        """
        started = time.perf_counter()
        losses, products = self._gradients()
        old = self._old_products() if self._W else torch.full_like(products[0], math.nan)
        # Read back once. Rows: losses (one a part), the old gradient's products, the new one's (one row a part).
        numbers = self._average(torch.cat([losses, old, products.flatten()]).double().cpu())
        losses, old = numbers[: len(losses)], numbers[len(losses) : len(losses) + len(old)]
        products = numbers[len(losses) + len(old) :].view(len(losses), -1)
        before, self._loss_now = self._loss, float(losses.mean())
        new = products.mean(0)
        nats, parts = (old + new) / 2, (old + new) / 2 + products - new
        low, high = bootstrap_interval(parts)
        low_total, high_total = bootstrap_interval(parts.sum(1))
        return Reading(
            nats=dict(zip(self.targets, nats.tolist(), strict=True)),
            curvature=float((new - old).sum()) / 2,
            loss=self._loss_now,
            loss_change=self._loss_now - before,
            interval=(float(low_total), float(high_total)),
            intervals=dict(zip(self.targets, zip(low.tolist(), high.tolist(), strict=True), strict=True)),
            seconds=time.perf_counter() - started,
        )

    def split(self, name: str, *, left: Tensor | None = None, inputs: Tensor | None = None) -> dict[str, float]:
        """The interference of one matrix by direction, in nats; after `measure`, before `advance`.

        left: U_k [m, k], principal left directions of W: <U_k U_k^T G, dW> and the rest. inputs: P [n, k], principal
        directions of the reference's inputs: <G P P^T, dW> and the rest.
        """
        assert name in self._G_now, "measure() first"
        if name not in self._W:
            return {}
        W = self.targets[name]
        with full_precision(W.device):
            dW = (W - self._W[name]).float()
            G = (self._G[name].float() + self._G_now[name].float()) / 2
            values = {"total": (G * dW).sum()}
            if left is not None:
                U = left.to(dW.dtype)
                values["left_principal"] = ((U.T @ G) * (U.T @ dW)).sum()
            if inputs is not None:
                P = inputs.to(dW.dtype)
                values["input_principal"] = ((G @ P) * (dW @ P)).sum()
            numbers = self._average(torch.stack(list(values.values())).double().cpu()).tolist()
        found = dict(zip(values, numbers, strict=True))
        for side in ("left", "input"):
            if f"{side}_principal" in found:
                found[f"{side}_minor"] = found["total"] - found[f"{side}_principal"]
        return found

    def update(self, name: str) -> Tensor | None:
        """dW [m, n] since `advance()` was called last; None before the first."""
        return self.targets[name].detach() - self._W[name] if name in self._W else None

    @torch.no_grad()
    def advance(self) -> None:
        """The next window starts at the weights as they are now, with the gradient that `measure` has found."""
        assert self._G_now, "measure() first"
        for name, W in self.targets.items():
            if name in self._W:
                self._W[name].copy_(W)
            else:
                self._W[name] = W.detach().clone()
            self._G[name] = self._G_now.pop(name).bfloat16()
        self._loss = self._loss_now

    def memory_bytes(self) -> int:
        """Kept between measurements."""
        return sum(t.numel() * t.element_size() for held in (self._W, self._G) for t in held.values())

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives; the same window goes on after `load_state_dict`."""
        return {"W": dict(self._W), "G": dict(self._G), "loss": self._loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ValueError where it belongs to other matrices."""
        if set(state["W"]) - set(self.targets):
            raise ValueError("this interference state belongs to other matrices; resume with the same svd_targets")
        self._W = {name: t.to(self.targets[name].device, copy=True) for name, t in state["W"].items()}
        self._G = {name: t.to(self.targets[name].device, copy=True) for name, t in state["G"].items()}
        self._loss = state["loss"]

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """Losses [parts] and <G of each part, dW> [parts, matrices]; the mean gradient stays in `_G_now`."""
        device = next(iter(self.targets.values())).device
        losses, products = [], []
        self._G_now = {}
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            for reference_loss in self.reference_losses:
                loss, gradients = _gradient(reference_loss, self.targets)
                losses.append(loss.float())
                products.append(self._products(gradients))
                for name, G in zip(self.targets, gradients, strict=True):
                    share = G / len(self.reference_losses)
                    self._G_now[name] = self._G_now[name] + share if name in self._G_now else share
        return torch.stack(losses), torch.stack(products)

    @torch.no_grad()
    def _products(self, gradients: Sequence[Tensor]) -> Tensor:
        if not self._W:
            return gradients[0].new_full((len(gradients),), math.nan, dtype=torch.float32)
        pairs = zip(self.targets.items(), gradients, strict=True)
        return torch.stack([_inner(G, W - self._W[name]) for (name, W), G in pairs])

    @torch.no_grad()
    def _old_products(self) -> Tensor:
        return torch.stack([_inner(self._G[name], W - self._W[name]) for name, W in self.targets.items()])


def _gradient(reference_loss: ReferenceLoss, targets: Mapping[str, nn.Parameter]) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        loss = reference_loss()
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                "reference_loss must return one number with a gradient (the mean loss of the reference batch), got "
                f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
            )
        gradients = torch.autograd.grad(loss.reshape(()), list(targets.values()), allow_unused=True)
    unused = [name for name, G in zip(targets, gradients, strict=True) if G is None]
    if unused:
        raise ValueError(f"reference_loss does not depend on {unused[:3]}; run it through the model in training")
    return loss.detach().reshape(()), tuple(gradients)


def _inner(G: Tensor, dW: Tensor) -> Tensor:
    """<G, dW> [] in float32; torch sums in a tree, so millions of entries keep their digits."""
    return (G.float() * dW.float()).sum()


def bootstrap_interval(rows: Tensor, confidence: float = _CONFIDENCE) -> tuple[Tensor, Tensor]:
    """Percentile interval of the mean over dim 0 of rows [R, ...]; nan for R < 2 (Efron 1979).

    The draws come from a generator of its own with a fixed seed: the same rows give the same interval.
    """
    rows = rows.double().cpu()
    if len(rows) < 2:
        nothing = torch.full_like(rows[0], math.nan)
        return nothing, nothing
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(rows), (_RESAMPLES, len(rows)), generator=generator, device="cpu")
    means = rows[draws].mean(1)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64, device="cpu")
    low, high = torch.quantile(means, tails, dim=0)
    return low, high
