"""The run directory: records survive kills and odd values."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdtrain.runlog import RunDirectory, decode_record, encode_record, newest_run, read_records, surviving_records

VALUES = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False), st.text(), st.booleans())


@given(st.dictionaries(st.text(min_size=1), VALUES))
def test_records_round_trip(fields: dict) -> None:
    record = {**fields, "kind": "train"}
    decoded = decode_record(encode_record(record))
    strings_that_mean_floats = {"nan", "inf", "-inf"}
    kept = {k: v for k, v in record.items() if v not in strings_that_mean_floats}
    assert decoded is not None
    assert {k: decoded[k] for k in kept} == kept


def test_nan_survives_as_strict_json() -> None:
    line = encode_record({"kind": "train", "train/loss": math.nan, "numbers": [math.inf, 1.0]})
    assert "NaN" not in line
    assert "Infinity" not in line
    decoded = decode_record(line)
    assert decoded is not None
    assert math.isnan(decoded["train/loss"])


def test_torn_last_line_is_the_end_of_the_file_and_later_records_start_a_new_line(tmp_path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.open_metrics()
    run.append("start", 0)
    run.append("train", 1, {"train/loss": 2.0})
    run.close()
    with open(run.metrics_path, "a") as file:
        file.write('{"kind": "train", "step": 2, "tr')  # killed here
    assert [r["step"] for r in read_records(run.metrics_path)] == [0, 1]
    again = RunDirectory(tmp_path / "run")
    again.open_metrics()
    again.append("resume", 1)
    again.close()
    assert [(r["kind"], r["restart"]) for r in read_records(run.metrics_path)] == [
        ("start", 0),
        ("train", 0),
        ("resume", 1),
    ]


def test_latest_points_at_the_newest_run(tmp_path) -> None:
    assert newest_run(tmp_path) is None
    for name in ("first", "second"):
        RunDirectory(tmp_path / name).write_config({"model": {}})
    assert newest_run(tmp_path) == tmp_path / "second"


def test_a_reading_rank_writes_nothing(tmp_path) -> None:
    run = RunDirectory(tmp_path / "run", writable=False)
    run.write_config({})
    run.open_metrics()
    run.append("train", 1)
    assert not (tmp_path / "run").exists()


def test_only_the_newest_of_repeated_steps_survives(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    written = [("start", 0, 0), ("train", 1, 0), ("train", 2, 0), ("train", 3, 0)]
    written += [("resume", 2, 1), ("train", 3, 1), ("train", 4, 1), ("resume", 1, 2), ("train", 2, 2)]
    lines = [encode_record({"kind": kind, "step": step, "restart": restart}) for kind, step, restart in written]
    path.write_text("\n".join(lines) + "\n")
    kept = [(r["step"], r["restart"]) for r in surviving_records(path) if r["kind"] == "train"]
    assert kept == [(1, 0), (2, 2)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_once_and_later_records_are_dropped(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    run.open_metrics()
    run.close()
    run._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - not opened by its name, for it reads for ever
    with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl \(No space left on device\); free space"):
        run.append("train", 1, {"train/loss": 1.0})
    run.append("end", 1)
    run.close()
