"""The mirror on wandb: what it sends, and that nothing of it can stop training."""

import sys
import types

import pytest

from scripts.replay_wandb import rows_of
from svdtrain.hooks.wandb_sink import WandbSink, effective_mode, kept_run_id
from tests.main_job import records, tiny_settings, tiny_trainer, write_corpus


class FakeRun:
    def __init__(self, fail_at: int | None = None) -> None:
        self.rows: list[dict] = []
        self.alerts: list[dict] = []
        self.finished = False
        self.fail_at = fail_at

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, row: dict) -> None:
        if self.fail_at is not None and row["step"] >= self.fail_at:
            raise ConnectionError("the network\nis gone")
        self.rows.append(row)

    def alert(self, **fields: object) -> None:
        self.alerts.append(fields)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """A module in wandb's place; `fake.run` is what init returns, `fake.options` what it was given."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    module = types.ModuleType("wandb")
    module.run, module.options = FakeRun(), []

    def init(**options):
        module.options.append(options)
        return module.run

    module.init = init
    module.Settings = dict
    module.api = types.SimpleNamespace(api_key="key")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def train(tmp_path, sink: WandbSink, *, steps: int = 4, resume: bool = False) -> None:
    settings = tiny_settings(write_corpus(tmp_path), train={"num_iterations": steps}, svd={"svd_interval": 2})
    tiny_trainer(tmp_path / "run", settings, extra_hooks=[sink]).fit(resume=resume)


def test_everything_is_mirrored_under_the_same_id(tmp_path, fake) -> None:
    train(tmp_path, WandbSink("online", project="p"))
    logged = {key for row in fake.run.rows for key in row}
    assert {"train/loss", "val/bpb", "train/tok_per_sec", "svd/h.0.attn.c_q/principal_alignment"} <= logged
    losses = [row["train/loss"] for row in fake.run.rows if "train/loss" in row]
    assert losses == [r["train/loss"] for r in records(tmp_path / "run", "train")]
    assert fake.run.finished
    train(tmp_path, WandbSink("online"), resume=True)
    first, second = fake.options
    assert first["id"] == second["id"] == kept_run_id(tmp_path / "run")
    assert (first["project"], first["resume"], first["mode"]) == ("p", "allow", "online")


def test_without_login_one_line_and_training_goes_on(tmp_path, fake) -> None:
    fake.api.api_key = None
    with pytest.warns(UserWarning, match="no login") as told:
        train(tmp_path, WandbSink("online"))
    assert len(told) == 1
    assert fake.options == []
    assert len(records(tmp_path / "run", "train")) == 4


def test_a_network_that_dies_is_told_once(tmp_path, fake) -> None:
    fake.run.fail_at = 2
    with pytest.warns(UserWarning, match="the network is gone") as told:
        train(tmp_path, WandbSink("online"))
    assert len(told) == 1
    assert len(records(tmp_path / "run", "train")) == 4


def test_the_environment_can_only_make_it_quieter(monkeypatch) -> None:
    for environment, mode, effective in (
        ("offline", "online", "offline"), ("disabled", "online", "disabled"), ("online", "offline", "offline"),
        ("", "online", "online"), ("nonsense", "offline", "offline"),
    ):  # fmt: skip
        monkeypatch.setenv("WANDB_MODE", environment)
        assert effective_mode(mode) == effective


def test_disabled_never_imports_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    train(tmp_path, WandbSink("disabled"), steps=1)


@pytest.mark.slow
def test_a_real_offline_run(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tmp_path, WandbSink("online"))
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


def test_replay_sends_each_step_once(tmp_path, fake) -> None:
    train(tmp_path, WandbSink("disabled"), steps=4)
    rows = list(rows_of(tmp_path / "run"))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert {"train/loss", "svd/h.0.attn.c_q/r", "val/bpb"} <= rows[4].keys()
