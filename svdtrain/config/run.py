"""A whole run: all groups together, and good starting points by depth and by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from svdtrain.config.groups import DataConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig
from svdtrain.config.setting import require
from svdtrain.config.svd import SVDConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run needs; saved as config.json in its directory."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    svd: SVDConfig = field(default_factory=SVDConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Inverse of `to_dict`; raises ValueError on a key that does not exist."""
        groups = {f.name: f for f in dataclasses.fields(cls)}
        unknown = set(values) - set(groups)
        require(not unknown, f"unknown configuration group(s): {sorted(unknown)}; known: {sorted(groups)}")
        return cls(**{name: _build_group(groups[name], given) for name, given in values.items()})


def _build_group(group: dataclasses.Field, given: dict[str, Any]) -> Any:
    group_class: Any = group.default_factory
    known = {f.name for f in dataclasses.fields(group_class)}
    unknown = set(given) - known
    require(not unknown, f"unknown setting(s) in {group.name!r}: {sorted(unknown)}; known: {sorted(known)}")
    return group_class(**given)


def merge_settings(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, `over` on top of `base`."""
    merged = {group: dict(values) for group, values in base.items()}
    for group, values in over.items():
        merged[group] = {**merged.get(group, {}), **values}
    return merged


TOKENS_PER_PARAMETER = 12
LARGEST_SMALL_DEPTH = 6  # up to here the defaults are those of a laptop, above it those of a GPU

# Eight times nanochat's. Its square-root rule goes 256 times below the batch it was tuned at and ends too low: at
# depth 4, 400 steps of 2,048 tokens of the standard library's sources end at 1.93 bpb with factor 1, 1.67 with 8.
SMALL_RUN_LEARNING_RATES = {"matrix_lr": 0.16, "embedding_lr": 2.4, "unembedding_lr": 0.064, "scalar_lr": 1.5}


def defaults_for_depth(depth: int) -> dict[str, Any]:
    """Sizes that go well with a depth; the same nested form as `RunConfig.to_dict`, changed settings only.

    Up to depth 6: the laptop sizes of the dataclasses above. Deeper: nanochat's, with 12 training tokens for each
    parameter of the matrices and the output head.
    """
    if depth <= LARGEST_SMALL_DEPTH:
        return {"model": {"depth": depth}, "optim": dict(SMALL_RUN_LEARNING_RATES)}
    vocab_size, total_batch_size = 32768, 524_288
    num_tokens = TOKENS_PER_PARAMETER * scaling_parameters(depth, vocab_size)
    return {
        "model": {"depth": depth, "max_seq_len": 2048, "vocab_size": vocab_size},
        "data": {"max_train_tokens": 100_000_000_000},
        "train": {
            "device_batch_size": 32 if depth <= 20 else 16,
            "total_batch_size": total_batch_size,
            "num_iterations": max(1, num_tokens // total_batch_size),
            "eval_every": 250,
            "eval_tokens": 20 * total_batch_size,
            "save_every": 1000,
        },
    }


def scaling_parameters(depth: int, vocab_size: int) -> int:
    """Parameters of the blocks' matrices and of the output head, which predict the compute-optimal number of tokens."""
    width = 64 * depth
    return 12 * depth * width**2 + vocab_size * width


PRESETS: dict[str, dict[str, Any]] = {
    "d4": defaults_for_depth(4),
    "d12": defaults_for_depth(12),
    # The run this method was designed for.
    "d20": merge_settings(
        defaults_for_depth(20),
        {
            "model": {"variant": "2025", "vocab_size": 65536},
            "data": {"data": "hf:HuggingFaceFW/fineweb-edu:sample-100BT", "max_train_tokens": 12_000_000_000},
            "train": {"num_iterations": 21_400, "total_batch_size": 524_288},
        },
    ),
    "d20-2026": merge_settings(
        defaults_for_depth(20),
        {
            "model": {"vocab_size": 65536},
            "data": {"data": "hf:HuggingFaceFW/fineweb-edu:sample-100BT", "max_train_tokens": 12_000_000_000},
            "train": {"num_iterations": 21_400},
        },
    ),
}
"""Named starting points; --config and flags go on top."""
