"""The import rules of the architecture, read off the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"svdtrain.config", "svdtrain.runlog"}  # no torch, importable by everybody

ALLOWED = {
    "svdtrain.spectral": {"svdtrain.spectral"},
    "svdtrain.adaptive": {"svdtrain.adaptive", "svdtrain.spectral"},
    "svdtrain.model": {"svdtrain.model", "ssm_blocks.mixer"},
    "svdtrain.optim": {"svdtrain.optim"},
    "svdtrain.data": {"svdtrain.data"},
    "svdtrain.evaluation": {"svdtrain.evaluation"},
    "svdtrain.trainer": {"svdtrain.trainer", "svdtrain.optim", "svdtrain.data"},
    "svdtrain.hooks": {
        "svdtrain.hooks", "svdtrain.trainer", "svdtrain.adaptive", "svdtrain.spectral", "svdtrain.model",
        "svdtrain.monitor", "svdtrain.evaluation",
    },
    "svdtrain.integrations": {"svdtrain.integrations", "svdtrain.adaptive"},
    "svdtrain.monitor": {"svdtrain.monitor"},
    "svdtrain.report": {"svdtrain.report", "svdtrain.monitor"},
    "svdtrain.launch": {"svdtrain.launch"},
    "ssm_blocks": {"ssm_blocks"},
}  # fmt: skip
NO_TORCH = ("svdtrain.config", "svdtrain.runlog", "svdtrain.monitor", "svdtrain.launch")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth of nesting."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            found.add(node.module or "")
    return found


SOURCES = sorted([*(ROOT / "svdtrain").rglob("*.py"), *(ROOT / "ssm_blocks").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_follow_the_architecture(path: Path) -> None:
    module = module_of(path)
    package = next((p for p in ALLOWED if module == p or module.startswith(p + ".")), None)
    if package is None:  # the top level puts everything together
        return
    ours = {name for name in imports_of(path) if name.split(".")[0] in {"svdtrain", "nanochat_patch", "ssm_blocks"}}
    allowed = ALLOWED[package] | LEAVES
    wrong = {name for name in ours if not any(name == a or name.startswith(a + ".") for a in allowed)}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


@pytest.mark.parametrize("path", [p for p in SOURCES if module_of(p).startswith(NO_TORCH)], ids=module_of)
def test_torch_free_modules_do_not_import_torch(path: Path) -> None:
    assert not {name for name in imports_of(path) if name.split(".")[0] == "torch"}
