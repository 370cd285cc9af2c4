"""Rows of a wandb run become records; what goes wrong there is one line."""

import pytest

from svdtrain.monitor.reader import NoRun
from svdtrain.monitor.session import Session
from svdtrain.monitor.wandb_source import WandbSource


class Run:
    state = "finished"

    def __init__(self, rows) -> None:
        self.rows = rows

    def scan_history(self, min_step: int):
        return [row for row in self.rows if row["_step"] >= min_step]


class Api:
    def __init__(self, run) -> None:
        self._run = run

    def run(self, path: str):
        if isinstance(self._run, Exception):
            raise self._run
        return self._run


def test_rows_become_records(tmp_path) -> None:
    rows = [
        {"_step": s, "_timestamp": 1e9 + s, "train/loss": 3.0, "val/bpb": 1.5, "svd/h.0.attn.c_q/r": 8.0, "note": "x"}
        for s in (1, 2)
    ]
    session = Session(tmp_path, WandbSource("me/project/abc", Api(Run(rows))))
    session.poll()
    assert session.view.series("train/loss").points() == ([1, 2], [3.0, 3.0])
    assert session.view.series("val/bpb").last == 1.5
    assert session.view.analyses.layers() == ["h.0.attn.c_q"]
    assert session.state.value == "finished"


def test_trouble_is_one_line() -> None:
    with pytest.raises(NoRun, match="ENTITY/PROJECT/ID"):
        WandbSource("abc", Api(None))
    with pytest.raises(NoRun, match="not found") as told:
        list(WandbSource("a/b/c", Api(RuntimeError("run\nnot found"))).new_lines())
    assert "\n" not in str(told.value)
