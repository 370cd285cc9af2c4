"""Following a file that somebody else writes, breaks, replaces or deletes."""

import json
import os

import pytest
from run_logs import healthy_run, train, write_run

from svdtrain.monitor.reader import LogFollower, NoRun, find_run, list_runs, read_config
from svdtrain.runlog import encode_record


def append(path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def test_only_whole_lines_are_handed_out_and_each_once(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, "one\ntwo\nthr")
    follower = LogFollower(path)
    assert list(follower.new_lines()) == [b"one", b"two"]
    assert list(follower.new_lines()) == []
    append(path, "ee\nfour")
    assert list(follower.new_lines()) == [b"three"]


def test_a_line_longer_than_a_chunk_survives(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("svdtrain.monitor.reader.CHUNK_BYTES", 7)
    path = tmp_path / "metrics.jsonl"
    append(path, "x" * 50 + "\n" + "y" * 3 + "\n")
    assert list(LogFollower(path).new_lines()) == [b"x" * 50, b"y" * 3]


def test_an_endless_line_is_dropped_and_not_kept_in_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("svdtrain.monitor.reader.CHUNK_BYTES", 16)
    monkeypatch.setattr("svdtrain.monitor.reader.MAX_LINE_BYTES", 64)
    path = tmp_path / "metrics.jsonl"
    append(path, "z" * 1000 + "\nafter\n")
    follower = LogFollower(path)
    assert list(follower.new_lines()) == [b"after"]
    assert len(follower._rest) == 0


def test_a_file_that_was_cut_is_read_again(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, "one\ntwo\n")
    follower = LogFollower(path)
    list(follower.new_lines())
    path.write_text("new\n")
    assert list(follower.new_lines()) == [b"new"]
    assert follower.generation == 1


def test_a_replaced_file_of_the_same_length_is_read_again(tmp_path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    path.write_text("one\n")
    follower = LogFollower(path)
    list(follower.new_lines())
    other.write_text("two\n")
    os.replace(other, path)
    assert list(follower.new_lines()) == [b"two"]


def test_a_deleted_run_is_gone_and_may_come_back(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, "one\n")
    follower = LogFollower(path)
    list(follower.new_lines())
    path.unlink()
    assert list(follower.new_lines()) == []
    assert follower.gone
    assert follower.age_s(0.0) == float("inf")
    append(path, "again\n")
    assert list(follower.new_lines()) == [b"again"]
    assert not follower.gone


def test_the_newest_of_two_runs_is_found(tmp_path) -> None:
    old, new = healthy_run(tmp_path / "old"), healthy_run(tmp_path / "new")
    os.utime(old / "metrics.jsonl", (1, 1))
    (tmp_path / "latest").symlink_to("old")
    assert find_run(str(tmp_path)) == new
    assert list_runs(tmp_path) == [new, old]
    assert find_run(str(old)) == old
    assert find_run(str(old / "metrics.jsonl")) == old


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p.mkdir(), (p / "x.txt").touch())])
def test_a_directory_that_is_no_run_is_one_line(tmp_path, make) -> None:
    path = tmp_path / "nothing"
    make(path)
    with pytest.raises(NoRun) as told:
        find_run(str(path))
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


def test_a_damaged_configuration_is_an_empty_one(tmp_path) -> None:
    run = write_run(tmp_path / "run", [train(1)])
    (run / "config.json").write_text("{")
    assert read_config(run) == {}
    (run / "config.json").write_text(json.dumps([1]))
    assert read_config(run) == {}
    assert encode_record(train(1)) in (run / "metrics.jsonl").read_text()
