"""Judging rows, and the page that is made of them."""

import importlib.util
from pathlib import Path
from types import ModuleType

from ssm_blocks.experiments import catalogue
from ssm_blocks.experiments.experiment import Row, criterion, settings_hash, spread
from ssm_blocks.experiments.store import Store

ROOT = Path(__file__).resolve().parents[2]


def test_criteria_take_the_median_of_the_seeds() -> None:
    assert criterion("x", [0.1, 0.95, 0.99], above=0.9).passed
    assert not criterion("x", [0.1, 0.2, 0.99], above=0.9).passed
    assert criterion("x", [0.1, 0.2, 0.99], below=0.5).passed
    missing = criterion("x", [], below=0.5)
    assert (missing.passed, missing.reason) == (False, "not run")
    assert spread([1.0, 3.0, 2.0], ".1f") == "2.0 (1.0 to 3.0)"


def publish() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish_ssm", ROOT / "scripts" / "experiments" / "publish_ssm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_up_row(arm_name: str, seed: int, final: float) -> Row:
    found = catalogue.experiment("d4")
    arm = next(arm for arm in found.arms() if arm.name == arm_name)
    at = {"token": final, "final": final, "sequence": 0.0, "chance": 0.125}
    return {
        "arm": arm_name, "seed": seed, "settings_hash": settings_hash(arm, found.complete_settings(quick=False)),
        "by_length": {"20": at, "40": at}, "state_size": 1234, "parameters": 10, "steps": 5, "seconds": 60.0,
        "hardware": "a machine", "torch": "2", "command": "the command", "processes": 2,
    }  # fmt: skip


def test_the_page_is_made_of_the_rows(tmp_path: Path, capsys) -> None:
    store = Store(tmp_path / "results" / "ssm" / "d4.jsonl")
    for seed, final in enumerate((0.97, 0.93, 0.99)):
        store.append(made_up_row("cs_neg_deltanet", seed, final))
        store.append(made_up_row("deltanet", seed, final))
    store.append({**made_up_row("deltanet", 5, 0.0), "settings_hash": "stale"})
    assert publish().main(["--docs", str(tmp_path)]) == 0
    assert "1 rows of other settings" in capsys.readouterr().out
    page = (tmp_path / "RESULTS_SSM.md").read_text()
    assert "| cs_neg_deltanet, final at T=20 | > 0.9 | 0.970 (0.930 to 0.990) | 3 | met |" in page
    assert "| deltanet, final at T=20 | < 0.5 | 0.970 (0.930 to 0.990) | 3 | **not met** |" in page
    assert "| minimal state: cs_neg_deltanet passes | > 0.9 | no rows | 0 | not run yet |" in page
    assert "| cs_neg_deltanet | 3 | 0.970 (0.930 to 0.990) |" in page
    assert "| *chance* | | 0.125 | 0.125 |" in page
    assert "1,234" in page
    assert "* `the command`: 6 runs, 6.0 minutes of processes, 2 at a time, on a machine, torch 2." in page
    assert "| [001: d4](#001-d4) |" in page
    assert "| 1 of 8 | deltanet, final at T=20; minimal state: cs_neg_deltanet passes;" in page
    assert (tmp_path / "figures" / "ssm_d4.png").stat().st_size > 1000


def test_words_stand_in_a_table_as_they_are_and_chance_below_their_column() -> None:
    module, found = publish(), catalogue.experiment("scifar")
    rows = [
        {"arm": "random_16", "seed": seed, "accuracy": accuracy, "ranks": ranks}
        for seed, (accuracy, ranks) in enumerate([(0.5, [7, 7, 1, 1]), (0.7, [2, 6, 6, 2]), (0.6, [7, 7, 1, 1])])
    ]
    wanted = ("test accuracy", "ranks of the layers, by seed")
    columns = [column for column in found.columns if column.title in wanted]
    assert [module.cell(column, rows) for column in columns] == ["0.6000 (0.5000 to 0.7000)", "7 7 1 1; 2 6 6 2"]
    assert module._chance(columns, rows) == "| *chance* | | 0.100 |  |"


def test_one_reason_for_two_criteria_is_given_once() -> None:
    module, found = publish(), catalogue.experiment("delay")
    rows = [
        {"arm": f"{name}_torch_{length}", "seed": 0, "ms": ms}
        for length in (8192, 16384)
        for name, ms in (("dense", 1.0), ("hss", 2.0))
    ]
    lines = [line for line in module.criteria(found, rows) if line.startswith("* Not met")]
    assert len(lines) == 1
    assert "T=8192; dense time / HSS time at T=16384: " in lines[0]


def test_without_rows_there_is_no_page(tmp_path: Path, capsys) -> None:
    assert publish().main(["--docs", str(tmp_path)]) == 1
    assert "no rows" in capsys.readouterr().err
    assert not (tmp_path / "RESULTS_SSM.md").exists()
