"""`mixers_on_ranks.py MIXER DIRECTORY` in a real checkout, alone or under torchrun: four steps on the same rows."""

import os
import sys

import torch
import torch.distributed as dist
from real_mixers import VOCAB_SIZE, build, install, optimizers_of, step, stir, surface_here

from nanochat_patch import gloo


def main() -> None:
    alone = "RANK" not in os.environ
    if not alone:
        gloo.start()
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
