"""The worked hook of docs/HOOKS.md works as printed."""

import re
from pathlib import Path

import pytest

from svdtrain.trainer.hooks import Hook
from tests.main_job import records, tiny_settings, tiny_trainer, write_corpus

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "HOOKS.md"


def test_the_worked_hook_stops_training_and_saves(tmp_path) -> None:
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)[0]
    names: dict = {}
    exec(code, names)
    settings = tiny_settings(write_corpus(tmp_path / "text"), train={"eval_every": 5})
    trainer = tiny_trainer(tmp_path / "run", settings, extra_hooks=[names["StopWhenGoodEnough"](100.0)])
    trainer.fit()
    assert trainer.state.step == 0  # asked at the evaluation before the first step
    assert "below 100" in records(tmp_path / "run", "end")[0]["reason"]
    assert trainer.store.steps() == [0]
    assert trainer.state.run.read_config() == trainer.state.config.to_dict()  # the monitor and a resume want it


@pytest.mark.parametrize("event", [name for name in vars(Hook) if name.startswith("on_")])
def test_every_event_is_documented(event: str) -> None:
    assert f"`{event}(" in DOCUMENT.read_text()
