"""The experiments' machinery: command line, store, resuming, schedule, judging, publishing."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from ssm_blocks.experiments import catalogue, runner
from ssm_blocks.experiments.__main__ import main
from ssm_blocks.experiments.ablations import BLOCK_DIAGONAL, FIRST_DESIGN
from ssm_blocks.experiments.experiment import Row, settings_hash
from ssm_blocks.experiments.models import LSTM, SequenceModel
from ssm_blocks.experiments.store import Store
from ssm_blocks.experiments.training import Best, Curriculum, Schedule, Training, ms_per_step, train
from ssm_blocks.mixer import build
from ssm_blocks.tasks.cifar import SOURCE
from ssm_blocks.tasks.groups import group_task

ROOT = Path(__file__).resolve().parents[2]
ROW = {"arm": "a", "seed": 0, "settings_hash": "0"}


def run(*words: object) -> int:
    return main([str(word) for word in words])


# the command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nonsense",), "unknown experiment 'nonsense'"),
        (("d4", "--arms", "nonsense"), "no arm nonsense"),
        (("d4", "--device", "nonsense"), "--device nonsense"),
        (("d4", "--parallel", "0"), "at least 1"),
        (("d4", "--seeds", "0"), "at least 1"),
        (("d4", "--seeds", "three"), "invalid int value"),
        (("d4", "--sedes", "3"), "unrecognized arguments"),
        (("scifar", "--data", "nowhere"), "--data nowhere: no train*.parquet"),
    ],
)
def test_wrong_commands_end_with_one_line_and_code_2(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv(SOURCE, "")  # which --data sets
    assert run(*words, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_list_names_the_arms(capsys) -> None:
    assert run("d4", "--list") == 0
    assert "cs_neg_deltanet_2" in capsys.readouterr().out


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_every_experiment_is_complete(name: str) -> None:
    found = catalogue.experiment(name)
    arms = found.arms()
    assert len({arm.name for arm in arms}) == len(arms)
    assert len({settings_hash(arm, {}) for arm in arms}) == len(arms), "two arms are the same"
    assert found.settings(quick=True) != found.settings(quick=False)
    criteria = found.judge([])
    assert criteria
    assert not any(c.passed for c in criteria), "met without a single row"
    assert set(found.reasons) <= {c.name for c in criteria}
    for config in (arm.config for arm in arms):
        assert json.loads(json.dumps(config)) == config, "configs are plain JSON"


def test_a_quick_run_end_to_end_and_nothing_left_to_do(tmp_path: Path, capsys) -> None:
    command = (
        "d4",
        "--quick",
        "--device",
        "cpu",
        "--arms",
        "deltanet,cs_neg_deltanet",
        "--seeds",
        2,
        "--out",
        tmp_path,
    )
    assert run(*command) == 0
    rows = Store(tmp_path / "d4.jsonl").rows()
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for arm in ("deltanet", "cs_neg_deltanet") for seed in (0, 1)
    ]
    row = rows[0]
    assert row["command"] == (
        "python -m ssm_blocks.experiments d4 --quick --seeds 2 --device cpu --arms deltanet,cs_neg_deltanet"
    )
    assert row["steps"] == 2
    assert set(row["by_length"]) == {"8", "16"}
    assert {"config", "settings", "hardware", "torch", "seconds", "parameters", "state_size"} <= set(row)
    before = (tmp_path / "d4.jsonl").read_text()
    capsys.readouterr()
    assert run(*command) == 0
    assert "0 runs, 4 already done" in capsys.readouterr().out
    assert (tmp_path / "d4.jsonl").read_text() == before


def test_one_more_seed_runs_only_that_seed(tmp_path: Path) -> None:
    plan = {"quick": True, "device": "cpu", "out": tmp_path, "command": "", "parallel": 1, "arms": {"deltanet"}}
    jobs, _ = runner.plan(["d4"], seeds=2, **plan)
    Store(tmp_path / "d4.jsonl").append(runner.run_job(jobs[0]))
    left, skipped = runner.plan(["d4"], seeds=2, **plan)
    assert ([job.seed for job in left], skipped) == ([1], 1)
    full, skipped = runner.plan(["d4"], seeds=1, **{**plan, "quick": False})
    assert (len(full), skipped) == (1, 0), "a quick row does not stand for a full one"


def test_the_same_seed_gives_the_same_result(tmp_path: Path) -> None:
    plan = {"quick": True, "device": "cpu", "out": tmp_path, "command": "", "parallel": 1, "arms": {"cs_deltanet"}}
    jobs, _ = runner.plan(["d4"], seeds=2, **plan)
    one, again, other = (runner.run_job(job) for job in (jobs[0], jobs[0], jobs[1]))
    assert one["loss"] == again["loss"] != other["loss"]


def test_a_failing_run_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    def explode(job: runner.Job) -> Row:
        if job.seed == 0:
            raise RuntimeError("out of memory")
        return {**ROW, "arm": job.arm.name, "seed": job.seed, "seconds": 0.0}

    monkeypatch.setattr(runner, "run_job", explode)
    assert run("d4", "--arms", "deltanet", "--seeds", 2, "--device", "cpu", "--out", tmp_path) == 1
    assert "deltanet seed 0 FAILED: RuntimeError: out of memory" in capsys.readouterr().out
    assert [row["seed"] for row in Store(tmp_path / "d4.jsonl").rows()] == [1]


def test_long_runs_start_first_and_timings_come_last(tmp_path: Path, monkeypatch) -> None:
    started = []

    def note(job: runner.Job) -> Row:
        started.append(job.arm.name)
        return {**ROW, "seconds": 0.0}

    monkeypatch.setattr(runner, "run_job", note)
    arms = {"time_monarch", "monarch", "monarch_120_long", "monarch_120"}
    jobs, _ = runner.plan(
        ["s5"], seeds=1, quick=True, device="cpu", out=tmp_path, command="", parallel=1, arms=arms
    )  # fmt: skip
    assert runner.run_all(jobs, 1, tmp_path, lambda line: None) == 0
    assert started == ["monarch_120_long", "monarch_120", "monarch", "time_monarch"]


# the store -----------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_skipped_and_closed(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "x.jsonl")
    assert store.rows() == []
    store.append({**ROW, "value": 1})
    with store.path.open("a") as file:
        file.write('{"arm": "b", "se')
    store.append({**ROW, "seed": 1})
    with pytest.warns(UserWarning, match="x.jsonl:2 is no row"):
        rows = store.rows()
    assert [row["seed"] for row in rows] == [0, 1]


def test_of_two_rows_for_one_run_the_last_counts(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.jsonl")
    store.append({**ROW, "value": 1})
    store.append({**ROW, "value": 2})
    assert [row["value"] for row in store.rows()] == [2]


# training ------------------------------------------------------------------------------------------------------------


def test_the_schedule_rises_falls_and_can_be_cut_short_without_a_jump() -> None:
    schedule = Schedule(1.0, 10, 100)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == 0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    before = schedule.rate(50)
    schedule.finish_by(50, 60)
    assert schedule.rate(50) == pytest.approx(before)
    assert schedule.rate(60) == 0
    schedule.finish_by(55, 80)
    assert schedule.end == 60, "an end is never moved back"


def test_the_curriculum_goes_on_by_success_or_by_time() -> None:
    curriculum = Curriculum(Training(steps=120, lengths=(5, 10, 20), advance_loss=0.5))
    curriculum.update(10, 0.9)
    assert curriculum.length == 5
    curriculum.update(11, 0.4)
    assert curriculum.length == 10
    curriculum.update(59, 0.9)
    assert curriculum.length == 10
    curriculum.update(60, 0.9)
    assert curriculum.length == 20
    assert curriculum.is_last
    curriculum.update(120, 0.0)
    assert curriculum.length == 20


def test_a_solved_task_ends_early_and_is_solved() -> None:
    task = group_task("parity")
    torch.manual_seed(0)
    model = SequenceModel(2, 2, width=8, mixer=LSTM)
    training = Training(steps=2000, batch=32, lr=3e-2, lengths=(8,), solved_loss=0.05, cooldown=10, check_every=10)
    report = train(model, lambda step, n: task.batch(0, step, size=32, length=n), training)
    assert report.ended == "solved"
    assert report.steps < 1500
    tokens, targets = task.batch(0, 0, size=64, length=8, split="test")
    assert (model(tokens).argmax(-1) == targets).float().mean() > 0.95


def test_a_diverging_run_stops_and_says_so() -> None:
    model = SequenceModel(2, 2, width=8, mixer=LSTM)
    training = Training(steps=100, lengths=(8,), check_every=5)

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.sum() * float("nan")

    report = train(model, lambda step, n: group_task("parity").batch(0, step, size=4, length=n), training, loss_of)
    assert (report.ended, report.steps) == ("diverged", 5)


def test_the_best_weights_are_kept() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    best = Best(model)
    for loss, weight in ((0.5, 1.0), (0.1, 2.0), (0.3, 3.0)):
        torch.nn.init.constant_(model.weight, weight)
        best.see(loss)
    best.restore()
    assert (best.loss, model.weight.item()) == (0.1, 2.0)


def test_impossible_training_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Training(steps=0)


def test_time_per_step_is_measured() -> None:
    model = SequenceModel(2, 2, width=8, mixer=LSTM)
    batch = group_task("parity").batch(0, 0, size=4, length=8)
    assert 0 < ms_per_step(model, batch, repeats=2, rounds=1) < 1000


def test_the_lstm_steps_as_it_reads() -> None:
    torch.manual_seed(0)
    lstm = build(LSTM, 6)
    x = torch.randn(2, 5, 6)
    y, last = lstm(x, return_state=True)
    state = lstm.init_state(2)
    assert lstm.state_numel() == 12
    for t in range(5):
        out, state = lstm.step(x[:, t], state)
        torch.testing.assert_close(out, y[:, t])
    torch.testing.assert_close(state, last)
    with pytest.raises(ValueError, match="packed"):
        lstm(x[:1], cu_seqlens=torch.tensor([0, 5]))


# the ablations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [FIRST_DESIGN, BLOCK_DIAGONAL])
def test_the_three_forms_of_the_ablations_agree(path: str) -> None:
    torch.manual_seed(0)
    mixer = build(path, 8, num_heads=2, block_size=3).double()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    y, last = mixer(x, return_state=True)
    mixer.backend = "reference"
    reference, reference_last = mixer(x, return_state=True)
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(last, reference_last)
    state = mixer.init_state(2, dtype=torch.float64)
    for t in range(13):
        out, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(out, y[:, t])


def test_unmixed_blocks_never_meet() -> None:
    """What is written into one block stays there: the state outside it does not change."""
    torch.manual_seed(0)
    mixer = build(BLOCK_DIAGONAL, 4, num_heads=1, block_size=2, conv_size=0).double()
    torch.nn.init.zeros_(mixer.B)
    first = torch.tensor([[[1.0, 2, 0, 0]]], dtype=torch.float64)
    for name, stays in ((BLOCK_DIAGONAL, True), ("monarch", False)):
        other = build(name, 4, num_heads=1, block_size=2, conv_size=0).double()
        other.load_state_dict(mixer.state_dict())
        state = {**other.init_state(1, dtype=torch.float64), "h": first}
        _, state = other(torch.randn(1, 9, 4, dtype=torch.float64), state, return_state=True)
        assert (state["h"][..., 2:].abs().max().item() == 0) == stays


def test_the_first_design_forgets_or_ignores_its_input() -> None:
    """Gates of .9 leave .9^40 after 20 steps; gates of 1 make the step the same for every input."""
    torch.manual_seed(0)
    mixer = build(FIRST_DESIGN, 4, num_heads=1, block_size=2, conv_size=0).double()
    torch.nn.init.zeros_(mixer.B)
    torch.nn.init.zeros_(mixer.gates.weight)
    torch.nn.init.constant_(mixer.gates.bias, torch.logit(torch.tensor(0.9)).item())
    state = mixer.init_state(1, dtype=torch.float64)
    _, last = mixer(torch.randn(1, 20, 4, dtype=torch.float64), state, return_state=True)
    assert last["h"].norm().item() == pytest.approx(0.9**40 * state["h"].norm().item(), rel=1e-5)


# Slurm ---------------------------------------------------------------------------------------------------------------


def batch_script(tmp_path: Path, *words: str, job: bool = True) -> subprocess.CompletedProcess[str]:
    """slurm/ssm.sh with an srun that only says what it was asked for."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(ROOT), "SVDTRAIN_PYTHON": "python3"}
    if job:
        environment["SLURM_JOB_ID"] = "1"
    command = ["bash", "slurm/ssm.sh", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_batch_script_hands_its_arguments_on(tmp_path: Path) -> None:
    done = batch_script(tmp_path, "s5", "--seeds", "3")
    assert done.stdout.split() == [
        "python3", "-m", "ssm_blocks.experiments", "s5", "--seeds", "3", "--out", "runs/ssm"
    ]  # fmt: skip
    for refused, message in (
        (batch_script(tmp_path), "name the experiments"),
        (batch_script(tmp_path, "s5", job=False), "sbatch slurm/ssm.sh"),
    ):
        assert refused.returncode == 2
        assert message in refused.stderr
