"""What the scripts of the experiments compute from their runs, and that the published pages are what they write."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts" / "experiments"))

import publish
import runs
import shift_page
import shift_summary


def row(arm: str, loss_b: float, forgetting: float, **more: Any) -> dict[str, Any]:
    return {
        "arm": arm, "order": "a-b", "seed": 1, "loss_b": loss_b, "forgetting": forgetting, "steps_under_alarm": 3,
        "hardware": "a machine", **more,
    }  # fmt: skip


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    found = {"auroc": 0.9, "auroc_first_steps": 0.8, "first": 12, "lead": 5}
    alarm = {"first": 14, "lead": 3, "false_per_1000": 0.0, "asked_per_1000": 20.0}
    watched = {"quiet_steps": 40, "harmful_steps": 7, "late_step": 17, "alarm": alarm, "statistics": {"turn": found}}
    made = [
        row("plain lr x0.5", 4.0, 0.1),
        row("plain lr x1", 3.0, 0.3, detection=watched),
        row("alarm replay", 3.5, 0.1),
        row("alarm lr", 4.5, 0.05),
    ]
    shift_summary.against_frontier(made)
    return made


def test_an_arm_is_held_against_plain_training_at_the_same_loss(rows: list[dict[str, Any]]) -> None:
    replay, slow = rows[2], rows[3]
    assert replay["frontier_forgetting"] == pytest.approx(0.2)
    assert replay["against_frontier"] == pytest.approx(-0.5)
    assert slow["frontier_forgetting"] is None  # it learnt less of B than any plain arm: nothing to compare with


def test_the_page_says_how_many_pairs_could_be_compared(rows: list[dict[str, Any]]) -> None:
    page = shift_page.shift(rows, "the command")
    assert "| alarm replay | 3.500 | 0.100 | -50.0 % | 1 of 1 | 3 |" in page
    assert "| alarm lr | 4.500 | 0.050 | outside of it | 0 of 1 | 3 |" in page
    assert "| turn | 0.80 | 0.90 | 5 | 1 of 1 |" in page


def test_auroc_counts_pairs() -> None:
    positive, negative = [1.0, 2.0, 2.0, 5.0], [0.0, 2.0, 3.0]
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative)
    assert shift_summary.auroc(positive, negative) == pytest.approx(wins / 12)
    assert shift_summary.auroc([], negative) is None


def test_runs_spread_over_the_gpus_and_wait_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    places = runs.Places(2)
    seen: list[str] = []

    def third() -> None:
        with places.taken() as environment:
            seen.append(environment["CUDA_VISIBLE_DEVICES"])

    waiting = threading.Thread(target=third, daemon=True)
    with places.taken() as one:
        with places.taken() as two:
            assert (one["CUDA_VISIBLE_DEVICES"], two["CUDA_VISIBLE_DEVICES"]) == ("4", "6")
            waiting.start()
            waiting.join(0.05)
            assert waiting.is_alive()
        waiting.join(10)
        assert seen == ["6"]


@pytest.mark.parametrize("name", sorted(publish.COSTS))
def test_the_published_costs_are_those_of_the_rows(name: str) -> None:
    content = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    assert publish.COSTS[name](content).strip() in (ROOT / "docs" / "RESULTS.md").read_text()
