"""Every setting of a run, as frozen dataclasses. No torch import: `--help` and the login node stay fast.

Leaf names are unique across the groups because the command line flattens them (`--depth`, not `--model.depth`).
A wrong value raises ValueError that says what to change.
"""

from svdtrain.config.groups import DataConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig, Variant
from svdtrain.config.run import (
    LARGEST_SMALL_DEPTH,
    PRESETS,
    SMALL_RUN_LEARNING_RATES,
    TOKENS_PER_PARAMETER,
    RunConfig,
    defaults_for_depth,
    merge_settings,
    scaling_parameters,
)
from svdtrain.config.svd import (
    ALARM_ACTIONS,
    CALIBRATED_PRESETS,
    SVD_PRESETS,
    CalibratedThresholds,
    PolicyThresholds,
    SVDConfig,
    SVDPreset,
)

__all__ = [
    "ALARM_ACTIONS", "CALIBRATED_PRESETS", "LARGEST_SMALL_DEPTH", "PRESETS", "SMALL_RUN_LEARNING_RATES", "SVD_PRESETS",
    "TOKENS_PER_PARAMETER", "CalibratedThresholds", "DataConfig", "LogConfig", "ModelConfig", "OptimConfig",
    "PolicyThresholds", "RunConfig", "SVDConfig", "SVDPreset", "TrainConfig", "Variant", "defaults_for_depth",
    "merge_settings", "scaling_parameters",
]  # fmt: skip
