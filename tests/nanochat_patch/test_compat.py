"""A checkout that lacks something is refused by the name of what it lacks; options that cannot work are, too."""

import sys
from pathlib import Path

import pytest
from fake_nanochat import undone, write_checkout

from nanochat_patch import options
from nanochat_patch.__main__ import main
from nanochat_patch.compat import UnsupportedNanochat, enter_checkout, find_surface, split_optimizers
from nanochat_patch.options import Launch, Options
from svdtrain.config import SVDConfig


@pytest.mark.parametrize(("form", "name"), [("2026", "setup_optimizer"), ("2025", "setup_optimizers")])
def test_both_forms_are_known(tmp_path: Path, form: str, name: str) -> None:
    with undone():
        enter_checkout(write_checkout(tmp_path, form))
        assert find_surface().setup_name == name


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("nanochat/gpt.py", "GPT.setup_optimizer =", "GPT.make_optimizer =", "setup_optimizer"),
        ("nanochat/gpt.py", "class GPT(", "class Model(", "nanochat.gpt"),
        ("nanochat/checkpoint_manager.py", "def save_checkpoint", "def save", "save_checkpoint"),
        (
            "nanochat/checkpoint_manager.py",
            "load_checkpoint(checkpoint_dir,",
            "load_checkpoint(where,",
            "checkpoint_dir",
        ),
        ("nanochat/common.py", "def finish", "def done", "nanochat.common.DummyWandb: no attribute 'finish'"),
        ("wandb.py", "def init", "def start", "init"),
        ("nanochat/common.py", "class DummyWandb", "import no_such_package\nclass DummyWandb", "no_such_package"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, file: str, old: str, new: str, named: str) -> None:
    path = write_checkout(tmp_path, "2026")
    text = (path / file).read_text()
    assert old in text
    if old.startswith("class GPT"):
        text = text[: text.index("GPT.setup_optimizer =")]
    (path / file).write_text(text.replace(old, new))
    with undone():
        enter_checkout(path)
        with pytest.raises(UnsupportedNanochat, match=named):
            find_surface()


@pytest.mark.parametrize("name", ["none", "file"])
def test_no_directory_at_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["nanochat_patch", "--nanochat", str(tmp_path / name)])
    with undone(), pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"nanochat_patch: error: --nanochat {tmp_path / name}: no such directory\n"


def test_a_directory_that_is_no_checkout(tmp_path: Path) -> None:
    with undone(), pytest.raises(UnsupportedNanochat, match=r"nanochat/gpt\.py is missing"):
        enter_checkout(tmp_path)


def test_a_stranger_of_that_name_is_noticed(tmp_path: Path) -> None:
    with undone():
        enter_checkout(write_checkout(tmp_path / "one", "2026"))
        __import__("nanochat.gpt")
        with pytest.raises(UnsupportedNanochat, match="import nanochat"):
            enter_checkout(write_checkout(tmp_path / "two", "2026"))


def test_three_optimizers_are_not_understood() -> None:
    with pytest.raises(UnsupportedNanochat, match="of 3"):
        split_optimizers("setup_optimizers", [object()] * 3)


def test_flags_before_the_dashes_are_ours() -> None:
    parsed = options.parse(
        [
            "--nanochat",
            "x",
            "--svd-interval",
            "5",
            "--no-svd-switching",
            "--rank-check",
            "stop",
            "--",
            "--depth=4",
            "--",
        ]
    )
    assert (parsed.launch.nanochat, parsed.launch.rank_check) == ("x", "stop")
    assert (parsed.svd.svd_interval, parsed.svd.svd_switching) == (5, False)
    assert parsed.base_train == ("--depth=4", "--")


@pytest.mark.parametrize(
    ("svd", "said"),
    [
        (SVDConfig(svd_adapter="reregister"), "stacked state"),
        (SVDConfig(svd_protect="activation"), "reference set"),
        (SVDConfig(svd_on_alarm="lr", svd_probe_rows=8), "--svd-on-alarm, --svd-probe-rows: there is no alarm here"),
    ],
)
def test_settings_that_cannot_work_here(svd: SVDConfig, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(launch=Launch(nanochat="x"), svd=svd)


def test_the_checkout_must_be_named() -> None:
    with pytest.raises(ValueError, match="--nanochat DIR"):
        options.parse(["--svd-interval", "5"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--svd-intervall", "5"], "Perhaps you meant: svd-interval"),
        (["--svd-interval", "often"], "--svd-interval: invalid literal"),
        (["--script", "chat_rl"], "invalid choice 'chat_rl' for argument '--script'"),
        (["--depth=4"], "Unrecognized options: --depth=4 (flags of nanochat's own script stand behind ` -- `)"),
        (["--mixer", "nonsense"], "unknown mixer 'nonsense'"),
    ],
)
def test_a_bad_flag_is_one_line(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nanochat_patch", "--nanochat", "x", *flags])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nanochat_patch: error: ")
    assert said in line


def test_a_script_that_this_checkout_lacks_is_named(tmp_path: Path) -> None:
    path = write_checkout(tmp_path, "2026")
    with undone(), pytest.raises(UnsupportedNanochat, match=r"no scripts/mid_train\.py"):
        enter_checkout(path, "mid_train")


def test_an_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with undone():
        monkeypatch.setattr(sys, "argv", ["nanochat_patch", "--nanochat", str(tmp_path), "--run-dir", str(run_dir)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"nanochat_patch: error: {tmp_path} is no nanochat checkout: nanochat/gpt.py is missing\n"
    )
    assert not run_dir.exists()
