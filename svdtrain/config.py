"""Every setting of a run, as frozen dataclasses. No torch import: `--help` and the login node stay fast.

Leaf names are unique across the groups because the command line flattens them (`--depth`, not `--model.depth`).
A wrong value raises ValueError that says what to change.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Variant = Literal["2026", "2025"]
SVDPreset = Literal["conservative", "fast", "off"]


def advanced(default: Any) -> Any:
    """A setting that --help leaves out: a flag all the same, and a key of --config."""
    return field(default=default, metadata={"advanced": True})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. One dial, `depth`; width is 64 x depth and the number of heads follows."""

    depth: int = 4
    """Number of transformer blocks; width = 64 x depth."""
    variant: Variant = "2026"
    """2026: value embeddings, residual lambdas, smear, back-out, sliding windows. 2025: without them."""
    max_seq_len: int = 512
    """Context length in tokens."""
    vocab_size: int = 4096
    """Vocabulary of the trained tokenizer, special tokens included. 0: bytes."""
    window_pattern: str = advanced("SSSL")
    """Attention windows, tiled over the layers: S = a quarter of the context, L = all. The last layer is always L."""

    mixer: str = "attention"
    """Sequence mixer of the blocks: attention, a name of ssm_blocks.available(), or MODULE:NAME for one of yours."""
    mixer_pattern: str = "M"
    """Blocks with the mixer (M) and with attention (A), tiled over the layers: MMMA is three to one."""

    def __post_init__(self) -> None:
        _require(
            len(self.mixer_pattern) > 0 and set(self.mixer_pattern) <= set("MA"),
            f"--mixer-pattern takes only the letters M and A, got {self.mixer_pattern!r}",
        )
        _require(self.depth >= 1, f"--depth must be at least 1, got {self.depth}")
        _require(self.max_seq_len >= 2, f"--max-seq-len must be at least 2, got {self.max_seq_len}")
        _require(
            self.vocab_size == 0 or 300 <= self.vocab_size <= 65536,
            f"--vocab-size must be 0 (bytes) or from 300 to 65536 (tokens are stored as uint16), got {self.vocab_size}",
        )
        _require(
            len(self.window_pattern) > 0 and set(self.window_pattern) <= set("SL"),
            f"--window-pattern takes only the letters S and L, got {self.window_pattern!r}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from."""

    data: str = "stdlib"
    """`stdlib`, a directory of parquet shards (column `text`), a .txt or .jsonl file, or hf:NAME[:CONFIG]."""
    max_train_tokens: int = advanced(100_000_000)
    """Tokenise at most this many training tokens into the cache."""
    cache_dir: str = advanced("")
    """Tokenised text and tokenizers. Default: $SVDTRAIN_CACHE or ~/.cache/svdtrain."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """MuonAdamW and its schedules, with nanochat's names. Learning rates are for 524,288 tokens a step and are
    scaled by the square root of the batch ratio."""

    matrix_lr: float = 0.02
    """Muon learning rate of the matrices."""
    embedding_lr: float = 0.3
    """AdamW learning rate of the embeddings."""
    unembedding_lr: float = advanced(0.008)
    """AdamW learning rate of the output head."""
    scalar_lr: float = advanced(0.5)
    """AdamW learning rate of the residual scalars."""
    weight_decay: float = advanced(0.28)
    """Cautious weight decay of the matrices."""
    warmup_steps: int = advanced(40)
    """Linear warm-up of the learning rate, in steps."""
    warmdown_ratio: float = 0.65
    """Share of the steps over which the learning rate falls."""
    final_lr_frac: float = advanced(0.05)
    """Learning rate at the last step, as a share of the first."""
    clip_grad_norm: float = advanced(0.0)
    """Clip the global gradient norm to this value; 0 switches it off."""

    def __post_init__(self) -> None:
        _require(0 <= self.warmdown_ratio <= 1, f"--warmdown-ratio must lie in [0, 1], got {self.warmdown_ratio}")
        _require(self.clip_grad_norm >= 0, f"--clip-grad-norm must not be negative, got {self.clip_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how large, how often."""

    num_iterations: int = 200
    """Number of optimizer steps."""
    device_batch_size: int = 4
    """Sequences per micro-batch on one device."""
    total_batch_size: int = 2048
    """Tokens per optimizer step, over all devices. Must divide by device_batch_size x max_seq_len x devices."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the activations; auto takes bf16 where the processor has it in hardware."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the model; auto: on a GPU."""
    seed: int = 1337
    """Seed of the weights and of the data order."""
    eval_every: int = 50
    """Evaluate validation bits per byte every N steps; 0: only at the end."""
    eval_tokens: int = advanced(20_480)
    """Validation tokens per evaluation."""
    sample_every: int = 0
    """Print a sample every N steps; 0: only at the end."""
    save_every: int = 0
    """Save a checkpoint every N steps; 0: only at the end."""
    async_save: bool = advanced(True)
    """Write checkpoints in the background while training goes on."""
    check_ranks_every: int = advanced(100)
    """With several processes: compare all weights between them every N steps; 0: never."""
    keep_checkpoints: int = advanced(2)
    """Number of newest checkpoints to keep; at least 2."""
    log_every: int = advanced(1)
    """Write a training record every N steps."""

    def __post_init__(self) -> None:
        _require(self.num_iterations >= 1, f"--num-iterations must be at least 1, got {self.num_iterations}")
        _require(self.device_batch_size >= 1, f"--device-batch-size must be at least 1, got {self.device_batch_size}")
        _require(self.keep_checkpoints >= 2, "--keep-checkpoints must be at least 2, so that one survives a bad save")
        for name in ("eval_every", "sample_every", "save_every", "check_ranks_every"):
            _require(getattr(self, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
        _require(self.log_every >= 1, f"--log-every must be at least 1, got {self.log_every}")


@dataclass(frozen=True, kw_only=True)
class PolicyThresholds:
    """The numbers that the decision compares against. Shares are of ||G||_F^2, angles in radians."""

    danger: float
    """Principal share of the gradient above which training clobbers."""
    safe: float
    """Minor share of the gradient above which low-rank training loses nothing."""
    angle: float
    """Largest principal angle between two analyses below which the subspace counts as stable, radians."""
    reconstruction: float = 0.01
    """Relative Frobenius error below which the rank-r approximation is safe."""


SVD_PRESETS: dict[str, PolicyThresholds] = {
    "conservative": PolicyThresholds(danger=0.4, safe=0.6, angle=0.1),
    "fast": PolicyThresholds(danger=0.3, safe=0.5, angle=0.15),
}

ALARM_ACTIONS = ("lowrank", "protect", "replay", "lr")


@dataclass(frozen=True, kw_only=True)
class SVDConfig:
    """The adaptive-SVD method. Also the third argument of `svdtrain.attach`."""

    svd_preset: SVDPreset = "fast"
    """Thresholds of the decision; off: no analysis, no switching."""
    svd_targets: str = "attn"
    """attn, mlp, all, or a regular expression searched in the parameter name."""
    svd_interval: int = 20
    """Steps between two full analyses."""
    svd_warmup: int = advanced(10)
    """Steps before the first decision."""
    svd_engine: Literal["tracked", "exact"] = advanced("tracked")
    """tracked: every step is watched and decisions are made from tracked bases, exact only where a matrix changes;
    exact: every matrix is decomposed at every interval and nothing is looked at in between (the slow reference)."""
    svd_monitor_every: int = advanced(1)
    """tracked: steps between two looks at the gradients and updates of all matrices."""
    svd_min_rank: int = advanced(8)
    """The rank r of the trained part never falls below this."""
    svd_adapter: Literal["auto", "reregister", "shadow"] = advanced("auto")
    """How B and A reach the optimizer; auto: reregister in our trainer, shadow in a foreign loop."""
    svd_moments: Literal["map", "reset"] = advanced("map")
    """Optimizer moments of B and A at a switch: mapped from W's by the chain rule, or zero."""
    svd_switching: bool = advanced(True)
    """False: watch only, never switch."""
    svd_rule: Literal["calibrated", "original"] = "calibrated"
    """What decides: evidence against chance (lift, z, rotation ratio), or the fixed shares of the original design."""
    svd_min_dwell: int = advanced(3)
    """Analyses that a matrix stays in a mode before the calibrated rule may change it again."""
    svd_protect: Literal["minor", "core", "middle", "principal", "random", "activation"] = "minor"
    """What low-rank mode trains (minor, middle, principal, random singular directions), or what it keeps updates out
    of: core (the principal-principal block), activation (the principal inputs of a reference set)."""
    svd_protect_share: float = advanced(0.25)
    """activation: share of the input directions that are protected."""
    svd_protect_strength: float = advanced(0.0)
    """activation: 0 protects them outright; above 0 shrinks updates softly, 4 is a good start."""
    svd_match_rms: bool = advanced(False)
    """Scale updates in low-rank mode to the norm that the full update would have had."""
    svd_on_alarm: str = "lowrank"
    """What an alarm does, comma-separated: lowrank, protect (their inputs), lr (lower it) act on the matrices that it
    names, replay mixes in first-seen text; none: only report."""
    svd_interference_every: int = advanced(20)
    """Steps between two measurements of forgetting and interference; 0: no measurements, no alarm."""
    svd_replay_share: float = advanced(0.02)
    """replay: share of the rows of a batch that is replaced by first-seen ones while an alarm is up; .01 to .05."""
    svd_alarm_lr: float = advanced(0.5)
    """lr: factor on the learning rate of the named matrices while an alarm is up."""
    svd_alarm_rank: float = advanced(0.25)
    """lowrank: rank of the named matrices, as a share of their smaller side."""
    svd_alarm_nats: float = advanced(0.05)
    """Rise of the loss on first-seen text, in nats a token, from which there is an alarm."""
    svd_alarm_z: float = advanced(4.0)
    """Standard deviations above normal from which a cheap statistic asks for a measurement at once."""
    svd_alarm_patience: int = advanced(3)
    """Calm measurements in a row that end an alarm."""
    svd_reference_rows: int = advanced(0)
    """Rows of first-seen text whose gradient is taken; 0: a sixteenth of the batch. Compiled, whole micro-batches."""
    svd_probe_rows: int = advanced(4)
    """Rows, at least, of the probe and of the control set; never fewer than reference rows."""

    def __post_init__(self) -> None:
        _require(self.svd_interval >= 1, f"--svd-interval must be at least 1, got {self.svd_interval}")
        _require(self.svd_monitor_every >= 1, f"--svd-monitor-every must be at least 1, got {self.svd_monitor_every}")
        _require(self.svd_min_rank >= 1, f"--svd-min-rank must be at least 1, got {self.svd_min_rank}")
        _require(self.svd_warmup >= 0, f"--svd-warmup must not be negative, got {self.svd_warmup}")
        _require(self.svd_min_dwell >= 0, f"--svd-min-dwell must not be negative, got {self.svd_min_dwell}")
        _require(
            0 < self.svd_protect_share < 1,
            f"--svd-protect-share must lie between 0 and 1, e.g. 0.25; got {self.svd_protect_share}",
        )
        _require(
            self.svd_protect_strength >= 0,
            f"--svd-protect-strength must not be negative, got {self.svd_protect_strength}",
        )
        self._check_alarm()

    def _check_alarm(self) -> None:
        for name in ("svd_interference_every", "svd_reference_rows"):
            _require(getattr(self, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
        for name in ("svd_replay_share", "svd_alarm_lr", "svd_alarm_rank"):
            value = getattr(self, name)
            _require(0 < value < 1, f"--{name.replace('_', '-')} must lie between 0 and 1, got {value}")
        for name in ("svd_alarm_nats", "svd_alarm_z"):
            _require(getattr(self, name) > 0, f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        for name in ("svd_alarm_patience", "svd_probe_rows"):
            _require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
        actions = self.alarm_actions
        _require(
            not ({"lowrank", "protect"} <= set(actions)),
            "--svd-on-alarm takes lowrank or protect, not both: a matrix is confined in one way at a time",
        )
        _require(
            not ("lr" in actions and self.svd_adapter == "shadow"),
            "--svd-on-alarm lr needs --svd-adapter auto or reregister: shadow steps B and A out of its reach",
        )
        _require(
            not ("lr" in actions and self.svd_match_rms),
            "--svd-on-alarm lr cannot work with --svd-match-rms, which sets the size of updates itself",
        )

    @property
    def alarm_actions(self) -> tuple[str, ...]:
        """What an alarm does, of lowrank, protect, replay and lr; () for none."""
        named = tuple(dict.fromkeys(part.strip() for part in self.svd_on_alarm.split(",")))
        if named == ("none",):
            return ()
        unknown = [part for part in named if part not in ALARM_ACTIONS]
        _require(
            not unknown,
            f"--svd-on-alarm takes {', '.join(ALARM_ACTIONS)} (several with commas) or none, got {self.svd_on_alarm!r}",
        )
        return named

    @property
    def thresholds(self) -> PolicyThresholds:
        """Thresholds of the chosen preset (those of `conservative` when the preset is off)."""
        return SVD_PRESETS.get(self.svd_preset, SVD_PRESETS["conservative"])


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where records and alerts go beside metrics.jsonl."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Mirror of the log on Weights & Biases. The local log stays the truth."""
    wandb_project: str = advanced("svdtrain")
    """Project of the mirror."""
    alert_command: str = advanced("")
    """Command run for each alert from `alert_level` on; the alert is in its environment and, as JSON, on its input."""
    alert_webhook: str = advanced("")
    """URL that gets these alerts as JSON."""
    alert_level: Literal["INFO", "WARNING", "CRITICAL"] = advanced("CRITICAL")
    """Lowest level that the command and the webhook hear of."""


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
        _require(not unknown, f"unknown configuration group(s): {sorted(unknown)}; known: {sorted(groups)}")
        return cls(**{name: _build_group(groups[name], given) for name, given in values.items()})


def _build_group(group: dataclasses.Field, given: dict[str, Any]) -> Any:
    group_class: Any = group.default_factory
    known = {f.name for f in dataclasses.fields(group_class)}
    unknown = set(given) - known
    _require(not unknown, f"unknown setting(s) in {group.name!r}: {sorted(unknown)}; known: {sorted(known)}")
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
