"""The experiments by name; their files are imported when asked for."""

from __future__ import annotations

import importlib

from ssm_blocks.experiments.experiment import Experiment

NAMES = ("d4", "mqar", "parity", "s5", "sinusoid", "delay", "delta_speed", "scifar")
"""Each is a module of this package with an `EXPERIMENT`."""


def experiment(name: str) -> Experiment:
    """Raises ValueError for unknown names."""
    if name not in NAMES:
        raise ValueError(f"unknown experiment {name!r}: {', '.join(NAMES)} or all")
    found = importlib.import_module(f"ssm_blocks.experiments.{name}").EXPERIMENT
    assert found.name == name
    return found
