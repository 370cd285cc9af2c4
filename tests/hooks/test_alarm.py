"""A change of text raises the alarm, every action does what it says, and a resume in the middle of it is exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from svdtrain.config import SVDConfig
from svdtrain.hooks.adaptive_svd import AdaptiveSVDHook
from svdtrain.hooks.alarm import AlarmHook
from svdtrain.hooks.alarm_actions import Confine, LearningRate
from svdtrain.trainer.hooks import Hook
from svdtrain.trainer.loop import Trainer
from tests.main_job import records
from tests.resume.test_resume import StopAt, assert_same
from tests.shift_job import ONSET, STEPS, shift_settings, shift_trainer, write_two_texts

COMBINED = {"lowrank": "lowrank,replay", "protect": "protect,replay,lr"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> dict[str, Trainer]:
    """One straight run for each combination of actions; none: only reports."""
    found = {}
    for name, actions in {"none": "none", **COMBINED}.items():
        run = tmp_path_factory.mktemp(name) / "run"
        found[name] = shift_trainer(run, shift_settings(texts, svd_on_alarm=actions, svd_replay_share=0.25))
        found[name].fit()
    return found


def run_of(trainer: Trainer) -> Path:
    return trainer.state.run.path


def raised_at(trainer: Trainer) -> int:
    return next(r["step"] for r in records(run_of(trainer), "alarm") if r["transition"] == "raised")


def test_the_shift_is_found_soon_and_quiet_training_raises_nothing(runs) -> None:
    for trainer in runs.values():
        assert ONSET < raised_at(trainer) <= ONSET + 6
        assert [r["transition"] for r in records(run_of(trainer), "alarm")].count("raised") == 1


def test_the_record_names_matrices_nats_and_directions(runs) -> None:
    trainer = runs["none"]
    record = records(run_of(trainer), "alarm")[0]
    assert record["trigger"] in ("loss", "grad_norm", "turn", "lift", "interval")
    assert record["alarm/harm"] > 0.1
    harms = [matrix["nats"] for matrix in record["matrices"]]
    assert harms == sorted(harms, reverse=True)
    assert min(harms) > 0
    for matrix in record["matrices"]:
        assert matrix["left_principal"] + matrix["left_minor"] == pytest.approx(matrix["nats"], rel=1e-3, abs=1e-7)
        assert matrix["input_principal"] + matrix["input_minor"] == pytest.approx(matrix["nats"], rel=1e-3, abs=1e-7)
    (alert,) = [r for r in records(run_of(trainer), "alert") if r["rule"] == "interference"]
    assert alert["level"] == "WARNING"
    assert record["matrices"][0]["name"] in alert["message"]


def test_none_only_reports(runs) -> None:
    assert not records(run_of(runs["none"]), "switch")
    assert runs["none"].state.stream.schedule == []


@pytest.mark.parametrize("name", COMBINED)
def test_confinement_falls_on_the_matrices_named(runs, name) -> None:
    trainer, run = runs[name], run_of(runs[name])
    named = {matrix["name"] for r in records(run, "alarm") for matrix in r["matrices"]}
    switched = {r["layer"] for r in records(run, "switch") if r["change"] == "to_lowrank"}
    assert switched == named
    controller = next(h for h in trainer.engine.hooks if h.name == "adaptive_svd").running
    for target in controller.targets.values():
        if target.name not in named:
            assert target.form is None
        elif name == "lowrank":
            assert target.factors is not None
            assert target.factors.r == round(0.25 * min(target.W.shape))
        else:
            assert target.guard is not None
            assert set(target.guard.tensors) == {"P"}
    assert controller.held == named


@pytest.mark.parametrize("name", COMBINED)
def test_it_keeps_what_was_learned_first(runs, name) -> None:
    def probe(trainer: Trainer) -> float:
        return records(run_of(trainer), "forgetting")[-1]["probe/loss"]

    assert probe(runs[name]) < probe(runs["none"]) - 0.1


@pytest.mark.parametrize(("name", "offset"), [("lowrank", 0), ("lowrank", 1), ("protect", -1), ("protect", 4)])
def test_resume_is_exact_around_the_alarm(runs, texts, tmp_path, name, offset) -> None:
    straight = runs[name]
    settings = shift_settings(texts, svd_on_alarm=COMBINED[name], svd_replay_share=0.25)
    stop = raised_at(straight) + offset
    shift_trainer(tmp_path / "run", settings, extra_hooks=[StopAt(stop)]).fit()
    resumed = shift_trainer(tmp_path / "run", settings)
    resumed.fit(resume=True)
    assert resumed.state.resumed_from == stop
    assert_same(saved(straight), saved(resumed))
    assert resumed.state.stream.schedule == straight.state.stream.schedule


class Confined(Hook):
    """Holds all matrices from after step 6 to after step 8, and notes their ranks."""

    name = "confined"

    def __init__(self, config: SVDConfig) -> None:
        self.svd = AdaptiveSVDHook(config)
        self.confine = Confine("lowrank", self.svd)
        self.analysed: list[dict[str, int | None]] = []
        self.trained: set[int] = set()

    def on_step_end(self, state: Any) -> None:
        self.svd.controller = next(h for h in state.engine.hooks if h.name == "adaptive_svd").running
        targets = self.svd.running.targets
        if state.step in (6, 8):
            self.analysed.append({name: target.r for name, target in targets.items()})
        if state.step == 6:
            self.confine.begin(state, list(targets), None)  # type: ignore[arg-type]
            self.trained = {target.num_free_directions for target in targets.values()}
            self.confine.load_state_dict(self.confine.state_dict())
        if state.step == 8:
            self.confine.end(state)
            self.analysed.append({name: target.r for name, target in targets.items()})


@pytest.mark.parametrize(("share", "min_rank", "r"), [(0.25, 8, 32), (0.01, 8, 8), (0.999, 8, 127)])
def test_the_rank_of_an_alarm_is_possible_and_forgotten_when_it_is_over(texts, tmp_path, share, min_rank, r) -> None:
    """.999 of 128 rounds to 128, which ended the run; .25 stayed the rank of every later analysis."""
    settings = shift_settings(texts, svd_alarm_rank=share, svd_min_rank=min_rank)
    settings["train"]["num_iterations"] = 9
    settings["svd"] |= {"svd_interval": 4, "svd_interference_every": 0, "svd_targets": "attn"}
    confined = Confined(SVDConfig(**settings["svd"]))
    shift_trainer(tmp_path / "run", settings, extra_hooks=[confined]).fit()
    before, _, after = confined.analysed
    assert confined.trained == {r}
    assert any(value not in (None, r) for value in before.values())
    assert after == before


class Halves(Confined):
    """Halves the weights of all matrices after step 8."""

    @torch.no_grad()
    def on_step_end(self, state: Any) -> None:
        if state.step == 6:
            super().on_step_end(state)
        if state.step == 8:
            targets = self.svd.running.targets.values()
            self.halved = [float(target.W.mul_(0.5).norm()) for target in targets if target.lowrank]


def test_weights_that_a_hook_has_changed_stay_changed_in_low_rank_mode(texts, tmp_path, caplog) -> None:
    """The next step wrote W_p + B A over them, and nobody said so."""
    settings = shift_settings(texts, svd_interference_every=0, svd_targets="attn")
    settings["train"]["num_iterations"] = 9
    settings["optim"] |= {"matrix_lr": 1e-6}
    halves = Halves(SVDConfig(**settings["svd"]))
    shift_trainer(tmp_path / "run", settings, extra_hooks=[halves]).fit()
    targets = halves.svd.running.targets.values()
    assert len(halves.halved) == len(targets)
    assert [float(target.W.detach().norm()) for target in targets] == pytest.approx(halves.halved, rel=1e-2)
    assert "was written between two steps" in caplog.text


def saved(trainer: Trainer) -> dict[str, Any]:
    checkpoint = trainer.store.load(STEPS)
    state = {key: value for key, value in checkpoint.state.items() if key not in ("run_seconds", "metrics")}
    state["hooks"].pop("stop_at", None)
    return {"model": checkpoint.model, "optimizer": checkpoint.optimizer, "state": state}


def test_all_ends_when_the_loss_stops_rising(texts, tmp_path) -> None:
    """The text changes back: matrices return to full training, replay stops."""

    class Back(Hook):
        name = "back"

        def on_step_start(self, state: Any) -> None:
            if state.step == ONSET + 6:
                state.stream.stream.onset = 10_000

    faster = {"svd_interference_every": 2, "svd_alarm_patience": 2}
    settings = shift_settings(texts, svd_on_alarm="lowrank,replay,lr", **faster)
    trainer = shift_trainer(tmp_path / "run", settings, extra_hooks=[Back()])
    trainer.fit()
    transitions = [r["transition"] for r in records(tmp_path / "run", "alarm")]
    assert transitions[0] == "raised"
    assert transitions[-1] == "cleared"
    schedule = trainer.state.stream.schedule
    assert [share for _, share, _, _ in schedule] == [0.02, 0.0]
    hook = next(h for h in trainer.engine.hooks if isinstance(h, AlarmHook))
    controller = next(h for h in trainer.engine.hooks if h.name == "adaptive_svd").running
    assert not controller.held
    assert all(target.form is None for target in controller.targets.values())
    assert next(a for a in hook.actions if isinstance(a, LearningRate))._names == []


@pytest.mark.parametrize("lowrank", [False, True])
def test_lr_is_the_step_at_a_lower_rate(texts, tmp_path, lowrank) -> None:
    """Against the same step with the group's own lr lowered, from the same state, for a matrix alone in its group."""
    name, updates = "h.0.mlp.c_fc", []

    class Lower(Hook):
        name = "lower"

        def __init__(self, through_alarm: bool) -> None:
            self.through_alarm = through_alarm

        def on_train_start(self, state: Any) -> None:
            svd = next(h for h in state.engine.hooks if h.name == "adaptive_svd")
            if lowrank:
                svd.switch(state, name, "lowrank", reason="test")
            if self.through_alarm:
                hook = next(h for h in state.engine.hooks if isinstance(h, AlarmHook))
                action = next(a for a in hook.actions if isinstance(a, LearningRate))
                action.begin(state, [name], None)  # type: ignore[arg-type]

        def on_step_start(self, state: Any) -> None:
            factors = controller_of(state).targets[name].factors
            trained = {id(controller_of(state).targets[name].W)} if factors is None else {id(factors.B), id(factors.A)}
            for group in state.optimizer.param_groups:
                if not self.through_alarm and trained & {id(p) for p in group["params"]}:
                    group["lr"] *= 0.5

    def controller_of(state: Any) -> Any:
        return next(h for h in state.engine.hooks if h.name == "adaptive_svd").running

    settings = shift_settings(texts, svd_on_alarm="lr", svd_alarm_lr=0.5, svd_targets=r"h\.0\.mlp\.c_fc")
    settings["train"]["num_iterations"] = 1
    settings["optim"]["warmup_steps"] = 0
    for through_alarm in (True, False):
        trainer = shift_trainer(
            tmp_path / str(through_alarm), copy.deepcopy(settings), extra_hooks=[Lower(through_alarm)]
        )
        W = trainer.state.model.transformer["h"][0].mlp.c_fc.weight
        before = W.detach().clone()
        trainer.fit()
        updates.append(W.detach() - before)
    assert float(updates[0].norm()) > 0
    torch.testing.assert_close(updates[0], updates[1], rtol=0, atol=1e-6 * float(before.norm()))
