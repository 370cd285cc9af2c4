"""MuonAdamW, its parameter groups and the schedules."""

from svdtrain.optim.muon_adamw import MuonAdamW
from svdtrain.optim.param_groups import build_param_groups
from svdtrain.optim.schedule import (
    apply_schedule,
    batch_lr_scale,
    lr_multiplier,
    muon_momentum,
    scaled_weight_decay,
    weight_decay_multiplier,
)

__all__ = [
    "MuonAdamW",
    "apply_schedule",
    "batch_lr_scale",
    "build_param_groups",
    "lr_multiplier",
    "muon_momentum",
    "scaled_weight_decay",
    "weight_decay_multiplier",
]
