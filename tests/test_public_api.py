"""The top level: what is promised is there, and importing it stays cheap."""

import subprocess
import sys

import pytest

import svdtrain


@pytest.mark.parametrize("name", svdtrain.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(svdtrain, name).__name__ == name


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = svdtrain.no_such_name


@pytest.mark.parametrize("module", ["svdtrain", "svdtrain.config", "svdtrain.runlog", "svdtrain.cli"])
def test_import_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
