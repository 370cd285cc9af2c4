"""The hook: when it evaluates, and that it leaves the model in training mode."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from test_core import TOKENIZER, next_letter, write_bundle
from torch import Tensor, nn

from svdtrain.evaluation import CoreBundle
from svdtrain.hooks.core_metric import CoreMetric


class Model(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        assert not self.training
        return next_letter(tokens)


def test_every_n_steps_and_after_the_last(tmp_path: Path) -> None:
    logged: list[tuple[str, int, dict]] = []
    state: Any = SimpleNamespace(
        model=Model(), tokenizer=TOKENIZER, device=torch.device("cpu"), step=0, num_iterations=5
    )
    state.log = lambda kind, fields: logged.append((kind, state.step, fields))
    hook = CoreMetric(CoreBundle.read(write_bundle(tmp_path / "bundle")), every=2)
    for step in range(1, 6):
        state.step = step
        hook.on_step_end(state)
        assert state.model.training
    hook.on_stop(state)
    assert [(kind, step) for kind, step, _ in logged] == [("eval", 2), ("eval", 4), ("eval", 5)]
    assert logged[0][2]["core/said"] == 1.0
    state.step = 3  # stopped early
    hook.on_stop(state)
    assert len(logged) == 3
