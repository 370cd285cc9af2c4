"""The shape of the network, and what one dial, the depth, makes of it."""

from __future__ import annotations

from dataclasses import dataclass

from svdtrain.config import Variant

HEAD_DIM = 128
VOCAB_MULTIPLE = 64
WINDOW_MULTIPLE = 128
ROTARY_BASE = {"2026": 100_000.0, "2025": 10_000.0}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the network; names are nanochat's. Raises ValueError where heads and width do not fit."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "SSSL"
    variant: Variant = "2026"

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"width {self.n_embd} does not split into {self.n_head} heads of even size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads cannot share {self.n_kv_head} key/value heads evenly")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern takes only the letters S and L, got {self.window_pattern!r}")
        if self.variant not in ROTARY_BASE:
            raise ValueError(f"variant is one of {sorted(ROTARY_BASE)}, got {self.variant!r}")

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        vocab_size: int,
        sequence_len: int,
        variant: Variant = "2026",
        window_pattern: str = "SSSL",
    ) -> GPTConfig:
        """One dial: width 64 x depth, rounded up to whole heads of 128, as many key/value heads as query heads."""
        n_head = -(-64 * depth // HEAD_DIM)
        return cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=n_head * HEAD_DIM,
            window_pattern=window_pattern,
            variant=variant,
        )

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head: a multiple of 64 in 2026, the vocabulary itself in 2025."""
        multiple = VOCAB_MULTIPLE if self.variant == "2026" else 1
        return -(-self.vocab_size // multiple) * multiple

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer, counted from the last, in 2026; none in 2025."""
        return self.variant == "2026" and (self.n_layer - 1 - layer) % 2 == 0

    @property
    def window_sizes(self) -> list[tuple[int, int]]:
        """(left, right) per layer: how far back a query sees; left is -1 for everything (2025).

        Short is a quarter of the context rounded up to 128. The last layer is always long.
        """
        if self.variant == "2025":
            return [(-1, 0)] * self.n_layer
        short = -(-self.sequence_len // (4 * WINDOW_MULTIPLE)) * WINDOW_MULTIPLE
        tiled = [self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.n_layer - 1)]
        return [(short if letter == "S" else self.sequence_len, 0) for letter in [*tiled, "L"]]
