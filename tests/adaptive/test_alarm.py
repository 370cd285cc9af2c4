"""The alarm's logic: triggers against their own past, evidence in nats, hysteresis."""

from __future__ import annotations

import math
import random

import pytest

from svdtrain.adaptive.alarm import Alarm, Evidence, RecentScale, Triggers, blame
from svdtrain.config import SVDConfig

QUIET = {"a": -0.01, "b": -0.002}
HARM = {"a": 0.08, "b": 0.01, "c": 0.03, "d": -0.05}


def evidence(step: int, *, harm: float, low: float, rise: float, nats: dict[str, float]) -> Evidence:
    return Evidence(step=step, harm=harm, harm_low=low, rise=rise, interference=nats)


def bad(step: int) -> Evidence:
    return evidence(step, harm=0.3, low=0.2, rise=0.1, nats=HARM)


def calm(step: int) -> Evidence:
    return evidence(step, harm=0.3, low=0.2, rise=-0.01, nats=HARM)


def test_z_is_that_of_a_plain_average_first() -> None:
    scale = RecentScale(warmup=4)
    values = [1.0, 3.0, 2.0, 4.0]
    assert all(math.isnan(scale.update(value)) for value in values)
    mean = sum(values) / 4
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
    assert scale.update(7.0) == pytest.approx((7.0 - mean) / deviation)


def test_noise_rarely_fires_a_jump_does_and_becomes_normal_in_time() -> None:
    generator = random.Random(0)
    triggers = Triggers(threshold=4.0)
    fired = [triggers.fired(triggers.update({"loss": generator.gauss(3, 0.1)})) for _ in range(1000)]
    assert fired.count("loss") <= 2
    assert triggers.fired(triggers.update({"loss": 4.0, "grad_norm": 1.0})) == "loss"
    lasting = [triggers.fired(triggers.update({"loss": generator.gauss(4, 0.1)})) for _ in range(600)]
    assert lasting[0] == "loss"
    assert lasting[-100:].count("loss") <= 2


def test_one_outlier_does_not_hide_the_next() -> None:
    generator = random.Random(1)
    triggers = Triggers(threshold=4.0)
    for _ in range(100):
        triggers.update({"loss": generator.gauss(0, 1)})
    assert triggers.fired(triggers.update({"loss": 1e6})) == "loss"
    assert triggers.fired(triggers.update({"loss": 12.0})) == "loss"
    assert not triggers.fired(triggers.update({"loss": math.nan}))
    assert not triggers.fired(triggers.update({"loss": -1e6}))  # better is no reason


def test_a_jump_fires_at_once_in_a_loss_that_has_long_fallen() -> None:
    """A running average with forgetting still holds the first steps: this jump was half a deviation to it."""
    generator = random.Random(2)
    triggers = Triggers(threshold=4.0)
    falling = [0.5 + 8.5 * math.exp(-step / 60) + generator.gauss(0, 0.03) for step in range(350)]
    assert not any(triggers.fired(triggers.update({"loss": loss})) for loss in falling)
    assert triggers.fired(triggers.update({"loss": 0.9})) == "loss"


def test_what_is_two_sided_fires_when_it_falls() -> None:
    generator = random.Random(3)
    triggers = Triggers(threshold=4.0, two_sided=("turn",))
    for _ in range(100):
        triggers.update({"loss": generator.gauss(3, 0.1), "turn": generator.gauss(1.1, 0.02)})
    z = triggers.update({"loss": 1.0, "turn": 0.9})
    assert z["turn"] < -4
    assert triggers.fired(z) == "turn"


def test_triggers_survive_a_save() -> None:
    first = Triggers(threshold=4.0)
    for step in range(30):
        first.update({"loss": math.sin(step), "turn": float(step)})
    second = Triggers(threshold=4.0)
    second.load_state_dict(first.state_dict())
    assert first.update({"loss": 5.0, "turn": 1.0}) == second.update({"loss": 5.0, "turn": 1.0})


def test_it_rises_on_evidence_names_the_worst_and_falls_after_patience() -> None:
    alarm = Alarm(nats=0.05, patience=2)
    assert alarm.consider(evidence(1, harm=0.01, low=0.005, rise=0.01, nats=HARM)) == "quiet"
    assert alarm.consider(bad(2)) == "raised"
    assert (alarm.up, alarm.since, alarm.named) == (True, 2, ("a", "c"))
    assert alarm.consider(calm(3)) == "kept"
    assert alarm.consider(bad(4)) == "kept"
    assert alarm.consider(calm(5)) == "kept"  # counted anew since step 4
    assert alarm.consider(calm(6)) == "cleared"
    assert (alarm.up, alarm.named) == (False, ())


def test_matrices_that_do_harm_later_are_added() -> None:
    alarm = Alarm(nats=0.05, patience=2)
    alarm.consider(bad(1))
    alarm.consider(evidence(2, harm=0.3, low=0.2, rise=0.1, nats={"a": 0.0, "d": 0.2}))
    assert alarm.named == ("a", "c", "d")


@pytest.mark.parametrize(
    "weak",
    [
        {"harm": 0.04},  # too little
        {"low": -0.01},  # may be noise
        {"low": math.nan},  # one row: nothing known of the noise
        {"rise": -0.01},  # over already
        {"rise": math.nan},
    ],
)
def test_nothing_less_raises_it(weak: dict) -> None:
    alarm = Alarm(nats=0.05, patience=1)
    assert alarm.consider(evidence(1, **{"harm": 0.3, "low": 0.2, "rise": 0.1, "nats": HARM, **weak})) == "quiet"
    assert not alarm.up


def test_harm_by_others_names_nobody() -> None:
    alarm = Alarm(nats=0.05, patience=1)
    assert alarm.consider(evidence(1, harm=0.3, low=0.2, rise=0.1, nats=QUIET)) == "raised"
    assert alarm.named == ()


def test_alarm_survives_a_save() -> None:
    first = Alarm(nats=0.05, patience=2)
    first.consider(bad(1))
    first.consider(calm(2))
    second = Alarm(nats=0.05, patience=2)
    second.load_state_dict(first.state_dict())
    assert second.named == first.named
    assert first.consider(calm(3)) == second.consider(calm(3)) == "cleared"


def test_blame() -> None:
    assert blame({"a": 6.0, "b": 3.0, "c": 1.0}) == ("a", "b")
    assert blame({"a": 6.0, "b": 3.0, "c": 1.0}, share=1.0) == ("a", "b", "c")
    assert blame({"a": -6.0, "b": 3.0}) == ("b",)
    assert blame(QUIET) == ()
    assert blame({"a": -1.0}) == blame({}) == blame({"a": math.nan}) == ()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"svd_on_alarm": "panic"}, "--svd-on-alarm takes"),
        ({"svd_on_alarm": "none,lr"}, "--svd-on-alarm takes"),
        ({"svd_on_alarm": ""}, "--svd-on-alarm takes"),
        ({"svd_on_alarm": "lowrank,protect"}, "not both"),
        ({"svd_on_alarm": "lr", "svd_match_rms": True}, "--svd-match-rms"),
        ({"svd_replay_share": 1.5}, "--svd-replay-share"),
        ({"svd_alarm_lr": 0.0}, "--svd-alarm-lr"),
        ({"svd_alarm_nats": 0.0}, "--svd-alarm-nats"),
        ({"svd_alarm_patience": 0}, "--svd-alarm-patience"),
        ({"svd_interference_every": -1}, "--svd-interference-every"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        SVDConfig(**settings)
    assert "\n" not in str(error.value)


def test_actions_combine() -> None:
    assert SVDConfig(svd_on_alarm="replay, lr,replay").alarm_actions == ("replay", "lr")
    assert SVDConfig(svd_on_alarm="none").alarm_actions == ()
    assert SVDConfig().alarm_actions == ("lowrank",)
