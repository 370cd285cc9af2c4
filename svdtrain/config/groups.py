"""The groups of settings beside the method's own: model, data, optimizer, loop, log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svdtrain.config.setting import advanced, require

Variant = Literal["2026", "2025"]


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
        require(
            len(self.mixer_pattern) > 0 and set(self.mixer_pattern) <= set("MA"),
            f"--mixer-pattern takes only the letters M and A, got {self.mixer_pattern!r}",
        )
        require(self.depth >= 1, f"--depth must be at least 1, got {self.depth}")
        require(self.max_seq_len >= 2, f"--max-seq-len must be at least 2, got {self.max_seq_len}")
        require(
            self.vocab_size == 0 or 300 <= self.vocab_size <= 65536,
            f"--vocab-size must be 0 (bytes) or from 300 to 65536 (tokens are stored as uint16), got {self.vocab_size}",
        )
        require(
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
    core_bundle: str = advanced("")
    """Directory of nanochat's evaluation bundle (core.yaml): the CORE score is measured in the loop."""


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
        require(0 <= self.warmdown_ratio <= 1, f"--warmdown-ratio must lie in [0, 1], got {self.warmdown_ratio}")
        require(self.clip_grad_norm >= 0, f"--clip-grad-norm must not be negative, got {self.clip_grad_norm}")


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
    core_every: int = advanced(0)
    """With core_bundle: measure the CORE score every N steps; 0: only at the end."""
    core_max_per_task: int = advanced(500)
    """Examples of each CORE task; 0: all."""
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
        require(self.num_iterations >= 1, f"--num-iterations must be at least 1, got {self.num_iterations}")
        require(self.device_batch_size >= 1, f"--device-batch-size must be at least 1, got {self.device_batch_size}")
        require(self.keep_checkpoints >= 2, "--keep-checkpoints must be at least 2, so that one survives a bad save")
        for name in (
            "eval_every", "sample_every", "save_every", "check_ranks_every", "core_every", "core_max_per_task",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
        require(self.log_every >= 1, f"--log-every must be at least 1, got {self.log_every}")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where records and alerts go beside metrics.jsonl."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Mirror of the log on Weights & Biases. The local log stays the truth."""
    wandb_project: str = advanced("svdtrain")
    """Project of the mirror."""
    wandb_entity: str = advanced("")
    """User or team that owns it; default: that of the login."""
    alert_command: str = advanced("")
    """Command run for each alert from `alert_level` on; the alert is in its environment and, as JSON, on its input."""
    alert_webhook: str = advanced("")
    """URL that gets these alerts as JSON."""
    alert_level: Literal["INFO", "WARNING", "CRITICAL"] = advanced("CRITICAL")
    """Lowest level that the command and the webhook hear of."""
