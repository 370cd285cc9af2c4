"""scripts/check_fla.py: what counts as off, as refused, and what its page says. Definitions stand in for kernels."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssm_blocks.ops.reference import delta_rule_reference

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
WHY = "has no right gradients here"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


script = load("check_fla")


class RefusesGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        raise RuntimeError("not on this GPU")


def checked(monkeypatch: pytest.MonkeyPatch, kernel, why: str):
    _, reference, names = script.KERNELS["gated_delta_rule"]
    monkeypatch.setitem(script.KERNELS, "gated_delta_rule", (kernel, reference, names))
    monkeypatch.setattr(script.fla, "trouble_with_decays", lambda device: why)
    return script.check_operator("gated_delta_rule", 3, CPU)


def refusing(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return delta_rule_reference(RefusesGradients.apply(inputs[0]), *inputs[1:])


def test_a_refusal_that_our_code_avoids_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be compared is: outputs and state."""
    row = checked(monkeypatch, refusing, WHY)
    assert row.good
    assert row.ratios == {"o": 0, "state": 0}
    assert row.outcome == f"refused: {WHY}"
    assert "not on this GPU" in row.error
    assert "| refused | refused |" in script.table_line(row)


def test_a_refusal_that_our_code_would_meet_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    row = checked(monkeypatch, refusing, "")
    assert not row.good
    assert row.outcome.startswith("OFF RuntimeError")


def test_a_kernel_that_fails_or_is_wrong_is_off_whatever_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("out of memory")

    def wrong(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        o, S = refusing(*inputs)
        return 1.1 * o, S

    for kernel in (failing, wrong):
        row = checked(monkeypatch, kernel, WHY)
        assert not row.good
        assert "OFF" in script.line(row)


def test_only_kernels_with_decays_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.fla, "trouble_with_decays", lambda device: WHY)
    assert {name for name in (*script.OPERATORS, *script.LAYERS) if script.avoided(name, CPU)} == set(script.DECAYING)


@pytest.mark.parametrize("name", ["delta_rule", "dplr", "linear_attention"])
def test_operators_are_compared_with_every_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reference, names = script.KERNELS[name]
    monkeypatch.setitem(script.KERNELS, name, (reference, reference, names))
    row = script.check_operator(name, 2, CPU)
    assert row.outcome == "ok"
    assert row.ratios.keys() == {"o", "state", *(f"grad {n}" for n in names)}


def test_rows_are_kept_with_those_of_the_same_machine_only(tmp_path: Path) -> None:
    row = script.Row(what="op dplr", length=100, ratios={"o": 0.001}, seconds=1.0)
    here = {"device": "a GPU", "versions": {"triton": "3.6.0"}}
    path = tmp_path / "fla.json"
    assert script.read_rows(path, here) == {}
    path.write_text(json.dumps({**here, "rows": [asdict(row)]}))
    assert script.read_rows(path, here) == {("op dplr", 100): row}
    with pytest.raises(SystemExit, match="another --out"):
        script.read_rows(path, {**here, "versions": {"triton": "3.7.1"}})


def test_an_unknown_name_lists_the_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["check_fla.py", "--only", "delta"])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert "linear_attention" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "rows"), [("check_fla", "fla.json"), ("bench_mixers", "mixers.json")])
def test_the_page_shows_what_was_measured(
    name: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing again changes nothing."""
    module = load(name)
    page = tmp_path / "SSM.md"
    page.write_text(module.PAGE.read_text())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PAGE", page)
    if name == "check_fla":
        monkeypatch.setattr(module, "RESULTS", tmp_path / rows)
        (tmp_path / rows).write_text((ROOT / "docs" / "results" / rows).read_text())
        module.publish()
    else:
        module.publish(module.read_rows(ROOT / "docs" / "results" / rows))
    assert page.read_text() == (ROOT / "docs" / "SSM.md").read_text()
