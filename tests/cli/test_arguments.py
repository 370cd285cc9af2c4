"""The command line: precedence, flat flags, one-line errors."""

import json

import pytest

from svdtrain.cli import (
    RunOptions,
    changed_settings,
    check_resumable,
    choose_run_directory,
    flag_names,
    main,
    parse_arguments,
)
from svdtrain.config import ModelConfig, RunConfig
from svdtrain.runlog import RunDirectory


def test_flags_are_flat_unique_and_help_lists_about_thirty(capsys) -> None:
    flags = flag_names()
    assert len(set(flags)) == len(flags)
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = {word for word in capsys.readouterr().out.replace(",", " ").split() if word in flags}
    assert {"--depth", "--num-iterations", "--max-seq-len", "--device-batch-size", "--total-batch-size"} <= shown
    assert len([flag for flag in shown if not flag.startswith("--no-")]) <= 32


def test_settings_that_help_leaves_out_are_flags_all_the_same() -> None:
    assert parse_arguments(["--clip-grad-norm", "0.5"]).config.optim.clip_grad_norm == 0.5


def test_depth_implies_sizes_and_flags_win(tmp_path) -> None:
    assert parse_arguments(["--depth", "12"]).config.model.max_seq_len == 2048
    assert parse_arguments(["--depth", "12", "--max-seq-len", "1024"]).config.model.max_seq_len == 1024
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": {"max_seq_len": 64}, "train": {"seed": 5}}))
    arguments = parse_arguments(["--preset", "d12", "--config", str(config), "--seed", "6"]).config
    assert (arguments.model.depth, arguments.model.max_seq_len, arguments.train.seed) == (12, 64, 6)


def test_a_saved_configuration_can_be_given_back(tmp_path) -> None:
    config = RunConfig(model=ModelConfig(depth=3))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert parse_arguments(["--config", str(path)]).config == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dept", "4"], "unknown flag --dept; did you mean --depth?"),
        (["--preset", "d99"], "--preset 'd99' does not exist"),
        (["--config", "/nowhere/config.json"], "--config /nowhere/config.json"),
        (["--depth", "0"], "--depth must be at least 1"),
        (["--depth", "many"], "--depth"),
        (["--svd-preset", "rapid"], "--svd-preset"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(argv: list[str], words: str, capsys) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_new_run_does_not_land_in_an_old_one(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="--resume auto"):
        choose_run_directory(RunOptions(run_dir=str(tmp_path)), 4)
    assert choose_run_directory(RunOptions(run_dir=str(tmp_path), resume="auto"), 4) == tmp_path


def test_resume_without_a_directory_takes_the_newest_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory(tmp_path / "runs" / "mine").write_config({})
    assert choose_run_directory(RunOptions(resume="auto"), 4).name == "mine"
    assert choose_run_directory(RunOptions(), 4).name.startswith("d4-")


def test_resume_refuses_another_configuration(tmp_path) -> None:
    saved = RunConfig(model=ModelConfig(depth=3)).to_dict()
    with pytest.raises(ValueError, match="made with --depth 3, now 4"):
        check_resumable(saved, RunConfig(), tmp_path)
    check_resumable(RunConfig().to_dict(), RunConfig(), tmp_path)


def test_a_resume_names_the_settings_it_changes() -> None:
    saved = RunConfig().to_dict()
    assert changed_settings(saved, RunConfig()) == changed_settings(None, RunConfig()) == ""
    before = saved["svd"]["svd_interval"]
    saved["svd"]["svd_interval"] = 7
    del saved["svd"]["svd_rule"]  # of a version that did not have it
    assert changed_settings(saved, RunConfig()) == f"--svd-interval 7 -> {before}"
