"""The compiled model never notices."""

from __future__ import annotations

import pytest
import torch
from adaptive_toy import backward, make_toy
from torch import fx

from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.config import SVDConfig


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_recompile_through_twenty_switches_and_rank_changes() -> None:
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def counting(graph: fx.GraphModule, example_inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = make_toy(depth=1)
    compiled = torch.compile(model, backend=counting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    svd = AdaptiveSVD(compiled, optimizer, SVDConfig(svd_preset="off"))
    assert list(svd.targets) == ["h.0.attn.c_q", "h.0.attn.c_v", "h.0.attn.c_proj"]
    losses = []
    for step in range(24):
        losses.append(float(backward(compiled, step)))
        svd.project_gradients()
        optimizer.step()
        svd.after_step(step)
        optimizer.zero_grad()
        if step > 0:
            compiled_so_far = len(graphs)
            for name in svd.targets:
                svd.set_mode(name, (8, 6, None)[step % 3])
    assert compiled_so_far == len(graphs) == 1
    assert sum(target.num_switches for target in svd.targets.values()) > 20
    assert losses[-1] < losses[0]
    torch._dynamo.reset()
