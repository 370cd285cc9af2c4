"""Gradients averaged over ranks once a step, in a few large messages that leave while backward still runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svdtrain.trainer.distributed import World, collective

BUCKET_BYTES = 32 << 20


class GradientAverager:
    """Replaces every gradient by its mean over ranks.

    Parameters are put into buckets in reverse order, which is about the order in which backward finishes them. During
    the last micro-batch (`arm`) a bucket is sent as soon as all its gradients are there; `finish` sends the rest and
    waits. Buckets leave in their fixed order on every rank, whatever order backward takes: messages always match. The
    result does not depend on how early a bucket left. Gradients must be dense.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        self._world = world
        self._buckets = _buckets([p for p in parameters if p.requires_grad]) if world.size > 1 else []
        self._bucket_of = {id(p): index for index, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] = []
        self._armed = False
        self._sent: list[tuple[Any, Tensor, list[Tensor]]] = []
        for bucket in self._buckets:
            for p in bucket:
                p.register_post_accumulate_grad_hook(self._gradient_is_there)

    def arm(self) -> None:
        """The coming backward is the step's last."""
        self._armed = self._world.size > 1
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self, loss: Tensor) -> None:
        """After the last backward: every gradient, and `loss` [], becomes its mean over ranks, in place."""
        if self._world.size == 1:
            return
        self._armed = False
        with collective("averaging gradients"):
            while len(self._sent) < len(self._buckets):
                self._send()
            work = dist.all_reduce(loss, async_op=True)
            for handle, flat, gradients in self._sent:
                self._take(handle, flat, gradients)
            _wait(work)
        loss /= self._world.size
        self._sent.clear()

    def _gradient_is_there(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        self._missing[self._bucket_of[id(parameter)]] -= 1
        with collective("averaging gradients"):
            while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
                self._send()

    def _send(self) -> None:
        """Start the next bucket's all-reduce; a parameter without a gradient takes no part (on no rank)."""
        gradients = [p.grad for p in self._buckets[len(self._sent)] if p.grad is not None]
        if not gradients:
            self._sent.append((None, torch.empty(0), []))
            return
        flat = torch.cat([g.reshape(-1) for g in gradients])
        self._sent.append((dist.all_reduce(flat, async_op=True), flat, gradients))

    def _take(self, handle: Any, flat: Tensor, gradients: list[Tensor]) -> None:
        if not gradients:
            return
        _wait(handle)
        flat /= self._world.size
        for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def _wait(handle: Any) -> None:
    if handle is not None:
        handle.wait()


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Reverse order, one type and device per bucket, closed once BUCKET_BYTES are reached."""
    buckets: list[list[nn.Parameter]] = []
    open_buckets: dict[Any, list[nn.Parameter]] = {}
    for p in reversed(parameters):
        key = (p.dtype, p.device)
        bucket = open_buckets.get(key)
        if bucket is None or sum(q.numel() * q.element_size() for q in bucket) >= BUCKET_BYTES:
            bucket = open_buckets[key] = []
            buckets.append(bucket)
        bucket.append(p)
    return buckets
