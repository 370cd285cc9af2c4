"""docs/SSM.md names every mixer, and its first example runs."""

import re
from pathlib import Path

import pytest
import torch

import ssm_blocks.mixer
from ssm_blocks import available
from svdtrain.build import build_model
from svdtrain.config import ModelConfig, RunConfig, TrainConfig
from svdtrain.model.generate import generate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "SSM.md"


@pytest.mark.parametrize("name", available())
def test_every_mixer_is_in_the_table(name: str) -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert any(f"`{name}`" in row.split("|")[1] for row in rows)


def test_the_first_example_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    found: dict = {}
    exec(code, found)
    assert found["y"].shape == (1, 100, 256)
    assert torch.isfinite(found["y"]).all()


def test_the_mixer_on_the_page_trains_by_its_name(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, in bfloat16, in a GPT that the command line's settings make; decoding is one pass."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[-1]
    (tmp_path / "mixer_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ssm_blocks.mixer, "_registry", dict(ssm_blocks.mixer._registry))
    settings = RunConfig(
        model=ModelConfig(depth=2, max_seq_len=32, mixer="mixer_of_the_page:average", mixer_pattern="MA"),
        train=TrainConfig(dtype="bf16"),
    )
    model = build_model(settings, vocab_size=97, device=torch.device("cpu"))
    tokens = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens).backward()
    assert model.blocks[0].attn.attn_mixer.v_proj.weight.grad is not None
    assert len(list(generate(model, tokens[0].tolist(), 3))) == 3
    mixer = ssm_blocks.build("average", 8)
    x = torch.randn(2, 6, 8)
    state = mixer.init_state(2)
    for t in range(6):
        y, state = mixer.step(x[:, t], state)
    torch.testing.assert_close(y, mixer(x)[:, -1])
