"""`mixers_on_ranks.py MIXER DIRECTORY` in a real checkout, alone or under torchrun: four steps on the same rows."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from real_mixers import VOCAB_SIZE, build, install, optimizers_of, step, stir, surface_here
from torch import Tensor

plain_all_reduce, plain_all_gather = dist.all_reduce, dist.all_gather


class Finished:
    """gloo has no futures for what nanochat's optimizers call: below are the same operations, finished at once."""

    def get_future(self) -> Any:
        future: Any = torch.futures.Future()
        future.set_result(None)
        return future


def mean(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    plain_all_reduce(total)
    return total / dist.get_world_size()


def gathered(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    plain_all_gather(parts, tensor.clone())
    return parts


def all_reduce(tensor: Tensor, op: Any = None, async_op: bool = False) -> Finished:
    tensor.copy_(mean(tensor))
    return Finished()


def reduce_scatter_tensor(output: Tensor, input: Tensor, op: Any = None, async_op: bool = False) -> Finished:
    assert input.size(0) % dist.get_world_size() == 0
    output.copy_(mean(input).chunk(dist.get_world_size())[dist.get_rank()])
    return Finished()


def all_gather_into_tensor(output: Tensor, input: Tensor, async_op: bool = False) -> Finished:
    output.copy_(torch.cat(gathered(input)))
    return Finished()


def reduce_scatter(output: Tensor, inputs: list[Tensor], op: Any = None, async_op: bool = False) -> Finished:
    output.copy_([mean(tensor) for tensor in inputs][dist.get_rank()])
    return Finished()


def all_gather(outputs: list[Tensor], input: Tensor, async_op: bool = False) -> Finished:
    for output, part in zip(outputs, gathered(input), strict=True):
        output.copy_(part)
    return Finished()


def main() -> None:
    alone = "RANK" not in os.environ
    if not alone:
        dist.init_process_group("gloo")
        for function in (all_reduce, reduce_scatter_tensor, all_gather_into_tensor, reduce_scatter, all_gather):
            setattr(dist, function.__name__, function)
    surface = surface_here()
    install(surface, sys.argv[1])
    model = build(n_layer=2, n_embd=72)  # 2,018 numbers beside the matrices, in pieces that two ranks cannot share
    stir(model)  # weights without gradient would show Adam's magnified rounding
    optimizers = optimizers_of(surface, model)
    for number in range(4):
        rows = torch.randint(VOCAB_SIZE, (2, 2, 33), generator=torch.Generator().manual_seed(number))
        step(model, optimizers, rows.flatten(0, 1) if alone else rows[dist.get_rank()])
    torch.save(model.state_dict(), f"{sys.argv[2]}/{'alone' if alone else dist.get_rank()}.pt")
    if not alone:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
