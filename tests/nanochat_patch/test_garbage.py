"""nanochat switches the garbage collector off after the first step: what a step leaves behind must go by itself."""

import gc
from pathlib import Path

import pytest
import torch
from test_ranks import Net

from nanochat_patch.options import Launch, Options
from nanochat_patch.session import Session
from svdtrain.config import SVDConfig

CASES = {
    "watched": SVDConfig(svd_switching=False, svd_interval=2),
    "switching": SVDConfig(svd_rule="original", svd_interval=2, svd_warmup=1, svd_min_rank=2),
}


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_waits_for_the_collector(case: str, tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.8)
    session = Session(Options(launch=Launch(nanochat="x", run_dir=str(tmp_path)), svd=CASES[case]))
    session.optimizer_built(model, "setup_optimizer", optimizer)
    gc.collect()
    gc.disable()
    gc.freeze()  # what other tests of this process still hold, and may let go of in the meantime, is not ours
    try:
        for step in range(12):
            x = torch.randn(32, 24, generator=torch.Generator().manual_seed(step))
            (model(x) - x.roll(1, dims=1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [tuple(found.shape) for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()
    session.records.end("finished")
    assert session.svd is not None
    assert bool(session.svd.changes) == (case == "switching")
    assert left == []
