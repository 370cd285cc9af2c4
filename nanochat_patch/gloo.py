"""nanochat's distributed optimizers on several processes of a CPU: for the tests and the benchmark.

nanochat starts torch's process group on GPUs only, and asks its optimizers' collectives for averages and for futures,
neither of which gloo has. These are the same operations out of sums and gathers, finished when they return.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_all_reduce, _all_gather = dist.all_reduce, dist.all_gather


def start() -> None:
    """Begin the process group of this torchrun on gloo and give torch.distributed what nanochat asks of it."""
    dist.init_process_group("gloo")
    for function in (all_reduce, reduce_scatter_tensor, all_gather_into_tensor, reduce_scatter, all_gather):
        setattr(dist, function.__name__, function)


class Finished:
    """Stands for work that is done."""

    def get_future(self) -> torch.futures.Future[None]:
        """Of no value, as nobody reads it."""
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future

    def wait(self) -> bool:
        """There is nothing to wait for."""
        return True


def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Finished:
    """See torch.distributed."""
    average = op == dist.ReduceOp.AVG
    _all_reduce(tensor, op=dist.ReduceOp.SUM if average else op, group=group)
    if average:
        tensor.div_(dist.get_world_size(group))
    return Finished()


def reduce_scatter_tensor(output: Tensor, input: Tensor, op: Any = None, async_op: bool = False) -> Finished:
    """See torch.distributed; averages."""
    _check_average(op)
    assert input.size(0) % dist.get_world_size() == 0
    output.copy_(_mean(input).chunk(dist.get_world_size())[dist.get_rank()])
    return Finished()


def reduce_scatter(output: Tensor, inputs: list[Tensor], op: Any = None, async_op: bool = False) -> Finished:
    """See torch.distributed; averages."""
    _check_average(op)
    output.copy_([_mean(tensor) for tensor in inputs][dist.get_rank()])
    return Finished()


def all_gather_into_tensor(output: Tensor, input: Tensor, async_op: bool = False) -> Finished:
    """See torch.distributed."""
    output.copy_(torch.cat(_gathered(input)))
    return Finished()


def all_gather(outputs: list[Tensor], input: Tensor, async_op: bool = False) -> Finished:
    """See torch.distributed; the input may be one of the outputs."""
    for output, part in zip(outputs, _gathered(input), strict=True):
        output.copy_(part)
    return Finished()


def _check_average(op: Any) -> None:
    assert op == dist.ReduceOp.AVG, f"written for averages, asked for {op}"


def _mean(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    _all_reduce(total)
    return total / dist.get_world_size()


def _gathered(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    _all_gather(parts, tensor.clone())
    return parts
