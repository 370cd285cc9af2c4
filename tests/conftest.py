"""Shared by all tests: no network, a cache of their own, the same random examples every time."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

# What passed once passes again; HYPOTHESIS_PROFILE=default draws anew at each run, to look for more.
settings.register_profile("same_draws", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same_draws"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never read or write the user's cache."""
    monkeypatch.setenv("SVDTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
