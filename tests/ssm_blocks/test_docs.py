"""docs/SSM.md names every mixer, and its first example runs."""

import re
from pathlib import Path

import pytest
import torch

from ssm_blocks import available

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
