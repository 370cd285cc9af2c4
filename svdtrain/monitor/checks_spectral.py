"""Rules about single matrices: near a limit, beyond it, switching."""

from __future__ import annotations

from svdtrain.monitor.findings import (
    CRITICAL,
    INFO,
    WARNING,
    Finding,
    Situation,
    count,
    names,
    value_of,
    warming_up,
)


def switch_now(now: Situation, active: bool) -> Finding | None:
    """Matrices that the newest analysis switched, or holds, against clobbering."""
    last = now.view.analyses.last
    if last is None:
        return None
    window = now.view.svd_interval * (2 if active else 1)
    switched = [
        s["layer"]
        for s in now.view.switches
        if s.get("change") == "to_lowrank"
        and s.get("reason") == "gradient_clobbering_risk"
        and s["step"] > now.view.step - window
    ]
    if not switched:
        return None
    layers = tuple(dict.fromkeys(reversed(switched)))
    return Finding(
        level=CRITICAL,
        message=f"{count(layers)} switched to low-rank against clobbering: {names(layers)}",
        layers=layers,
    )


def over_limit(now: Situation, active: bool) -> Finding | None:
    slack = 0.5 if active else 0.0  # released half a margin below the limit
    over = [a for a in now.approaches if a.limit.mode == 0 and a.limit.distance(a.value) < slack * a.limit.margin]
    if not over or warming_up(now.view):
        return None
    worst = min(over, key=lambda a: a.limit.distance(a.value) / abs(a.limit.bound))
    layers = tuple(dict.fromkeys(a.layer for a in sorted(over, key=lambda a: a.limit.distance(a.value))))
    return Finding(
        level=CRITICAL,
        message=f"{count(layers)} in full mode beyond the limit; worst {worst.layer}: {value_of(worst)}",
        layers=layers,
    )


def switch_imminent(now: Situation, active: bool) -> Finding | None:
    horizon = now.view.svd_interval * (2.0 if active else 1.0)
    soon = [
        a
        for a in now.approaches
        if a.limit.mode == 0 and a.forecast and 0 < a.forecast.steps <= horizon and a.z > (1.5 if active else 2.5)
    ]
    if not soon or warming_up(now.view):
        return None
    first = soon[0]
    assert first.forecast is not None
    layers = tuple(dict.fromkeys(a.layer for a in soon))
    message = f"{names(layers)} to low-rank in about {first.forecast.steps:.0f} steps: {value_of(first)}"
    return Finding(level=CRITICAL, message=message, layers=layers)


def near_limit(now: Situation, active: bool) -> Finding | None:
    factor = 1.5 if active else 1.0
    near = [
        a for a in now.approaches if a.limit.mode == 0 and 0 <= a.limit.distance(a.value) <= factor * a.limit.margin
    ]
    if not near or warming_up(now.view):
        return None
    worst = min(near, key=lambda a: a.limit.distance(a.value) / abs(a.limit.bound))
    layers = tuple(dict.fromkeys([worst.layer, *(a.layer for a in near)]))
    message = f"{count(layers)} close to a limit; nearest {worst.layer}: {value_of(worst)}"
    return Finding(level=WARNING, message=message, layers=layers)


def trend(now: Situation, active: bool) -> Finding | None:
    horizon = 20 * now.view.svd_interval
    moving = [
        a
        for a in now.approaches
        if a.limit.mode == 0
        and a.forecast
        and now.view.svd_interval < a.forecast.steps <= horizon
        and a.z > (2.0 if active else 3.0)
    ]
    if not moving or warming_up(now.view):
        return None
    first = moving[0]
    assert first.forecast is not None
    message = f"{first.layer} moves towards its limit: about {first.forecast.steps:.0f} steps; {value_of(first)}"
    return Finding(level=INFO, message=message, layers=tuple(dict.fromkeys(a.layer for a in moving)))


def flapping(now: Situation, active: bool) -> Finding | None:
    window = 12 * now.view.svd_interval
    counts: dict[str, int] = {}
    for switch in now.view.switches:
        if switch["step"] > now.view.step - window and switch.get("change") != "rank":
            counts[switch["layer"]] = counts.get(switch["layer"], 0) + 1
    layers = tuple(sorted((n for n, c in counts.items() if c >= (3 if active else 4)), key=lambda n: -counts[n]))
    if not layers:
        return None
    message = f"{count(layers)} go to and fro between the modes: {names(layers)} ({counts[layers[0]]} switches)"
    return Finding(level=WARNING, message=message, layers=layers)


def back_to_full(now: Situation, active: bool) -> Finding | None:
    window = now.view.svd_interval
    layers = tuple(
        dict.fromkeys(
            s["layer"] for s in now.view.switches if s.get("change") == "to_full" and s["step"] > now.view.step - window
        )
    )
    return (
        Finding(level=INFO, message=f"{count(layers)} back to full: {names(layers)}", layers=layers) if layers else None
    )
