"""Settings: round trip, errors that say what to do, presets that are valid."""

import dataclasses

import pytest

from svdtrain.config import (
    PRESETS,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SVDConfig,
    TrainConfig,
    defaults_for_depth,
)

GROUPS = (ModelConfig, DataConfig, OptimConfig, TrainConfig, SVDConfig, LogConfig)


def test_round_trip() -> None:
    config = RunConfig(model=ModelConfig(depth=7), svd=SVDConfig(svd_targets="mlp"))
    assert RunConfig.from_dict(config.to_dict()) == config


def test_leaf_names_are_unique_because_the_command_line_flattens_them() -> None:
    names = [f.name for group in GROUPS for f in dataclasses.fields(group)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset: str) -> None:
    RunConfig.from_dict(PRESETS[preset])


@pytest.mark.parametrize("depth", [1, 4, 6, 7, 12, 20, 26])
def test_every_depth_gives_a_batch_that_divides(depth: int) -> None:
    config = RunConfig.from_dict(defaults_for_depth(depth))
    assert config.train.total_batch_size % (config.train.device_batch_size * config.model.max_seq_len) == 0
    assert config.model.depth == depth


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(depth=0), "--depth"),
        (lambda: ModelConfig(vocab_size=100), "--vocab-size"),
        (lambda: ModelConfig(window_pattern="SX"), "--window-pattern"),
        (lambda: TrainConfig(keep_checkpoints=1), "--keep-checkpoints"),
        (lambda: TrainConfig(eval_every=-1), "--eval-every"),
        (lambda: SVDConfig(svd_interval=0), "--svd-interval"),
        (lambda: RunConfig.from_dict({"modle": {}}), "modle"),
        (lambda: RunConfig.from_dict({"model": {"dept": 3}}), "dept"),
    ],
)
def test_wrong_values_say_what_to_change(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", ["preset", "engine", "adapter", "moments", "rule", "protect"])
def test_a_misspelt_choice_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--svd-{name} must be one of .*'misspelt'"):
        SVDConfig(**{f"svd_{name}": "misspelt"})
