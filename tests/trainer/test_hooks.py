"""The engine: order, names, isolation, agreement."""

from types import SimpleNamespace
from typing import Any

import pytest

from svdtrain.trainer.distributed import World
from svdtrain.trainer.hooks import Hook, HookEngine, Priority
from svdtrain.trainer.state import Control


class Recorder(Hook):
    def __init__(self, name: str, priority: Priority, calls: list[str]) -> None:
        self.name, self.priority, self.calls = name, priority, calls

    def on_step_end(self, state: Any) -> None:
        self.calls.append(self.name)

    def close(self) -> None:
        self.calls.append(f"close {self.name}")


def fake_state() -> Any:
    return SimpleNamespace(metrics={}, control=Control(), world=World())


def test_order_is_priority_then_registration_and_close_is_reversed() -> None:
    calls: list[str] = []
    engine = HookEngine(
        [
            Recorder("sink", Priority.SINK, calls),
            Recorder("second", Priority.OBSERVE, calls),
            Recorder("third", Priority.OBSERVE, calls),
            Recorder("control", Priority.CONTROL, calls),
        ]
    )
    engine.emit("on_step_end", fake_state())
    assert calls == ["control", "second", "third", "sink"]
    calls.clear()
    engine.close()
    assert calls == ["close sink", "close third", "close second", "close control"]


@pytest.mark.parametrize("names", [("a", "a"), ("", "b")])
def test_names_must_be_given_and_unique(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="name of its own"):
        HookEngine([Recorder(name, Priority.OBSERVE, []) for name in names])


def test_last_events_reach_every_hook_even_if_one_fails(capsys) -> None:
    calls: list[str] = []

    class Failing(Hook):
        name = "failing"
        priority = Priority.CONTROL

        def on_exception(self, state: Any, error: BaseException) -> None:
            raise RuntimeError("broken hook")

        def close(self) -> None:
            raise RuntimeError("broken close")

    class Last(Recorder):
        def on_exception(self, state: Any, error: BaseException) -> None:
            calls.append(f"saw {error}")

    engine = HookEngine([Failing(), Last("last", Priority.SINK, calls)])
    engine.emit_isolated("on_exception", fake_state(), ValueError("boom"))
    engine.close()
    assert calls == ["saw boom", "close last"]
    assert "broken hook" in capsys.readouterr().err


def test_micro_batch_event_reaches_only_hooks_that_override_it() -> None:
    class Counting(Hook):
        name = "counting"
        count = 0

        def on_micro_batch_end(self, state: Any) -> None:
            self.count += 1

    counting = Counting()
    engine = HookEngine([Recorder("plain", Priority.OBSERVE, []), counting])
    assert engine._micro_batch_hooks == [counting]
    engine.emit_micro_batch_end(fake_state())
    assert counting.count == 1


def test_log_keeps_numbers_as_newest_metrics() -> None:
    state = fake_state()
    HookEngine([]).log(state, "eval", {"val/bpb": 1.5, "note": "x", "count": 3})
    assert state.metrics == {"val/bpb": 1.5}


def test_state_of_a_missing_hook_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"gone.*svd_preset"):
        HookEngine([]).load_state_dict({"gone": {"x": 1}})


def test_first_reason_of_a_request_stands() -> None:
    control = Control()
    control.request_stop("first")
    control.request_stop("second")
    assert control.stop == "first"
