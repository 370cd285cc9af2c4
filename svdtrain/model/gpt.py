"""A GPT whose weights are interchangeable with nanochat's, in its 2026 (92d63d4) and 2025 (b399e43) forms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svdtrain.model.attention import CausalSelfAttention, MixerFactory
from svdtrain.model.attention_backends import check_backend
from svdtrain.model.gpt_config import ROTARY_BASE, GPTConfig
from svdtrain.model.initialize import init_2025, init_2026
from svdtrain.model.kv_cache import KVCache
from svdtrain.model.layers import MLP, Linear, rms_norm, rotary_tables
from svdtrain.model.loss import chunked_head_loss, soft_cap, soft_cap_cross_entropy

SMEAR_CHANNELS = 24
CPU_LOSS_CHUNK = 1024
ROTARY_LENGTH_FACTOR = 10  # positions prepared, in units of sequence_len, so that generation may run on


class Block(nn.Module):
    """Mixer and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int, mixer_factory: MixerFactory) -> None:
        super().__init__()
        self.attn: nn.Module = mixer_factory(config, layer)
        self.mlp = MLP(config.n_embd)

    def forward(
        self,
        x: Tensor,
        ve: Tensor | None,
        cos_sin: tuple[Tensor, Tensor],
        window_size: tuple[int, int],
        kv_cache: KVCache | None,
    ) -> Tensor:
        x = x + self.attn(rms_norm(x), ve, cos_sin, window_size, kv_cache)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """The network. Build it (on the meta device if you like), move it with `to_empty`, then `init_weights`.

    compute_dtype: type of activations and embeddings; other weights are fp32 and cast where they are used.
    mixer_factory: makes the sequence mixer of each block, see `MixerFactory`.
    attention_backend: see `attention_backends`.
    loss_chunk_tokens: N computes the training loss on N tokens at a time, 0 on all at once; None chooses: in chunks on
    a CPU, where passes over logits that left the cache cost as much as the products.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: GPTConfig,
        compute_dtype: torch.dtype = torch.float32,
        *,
        mixer_factory: MixerFactory = CausalSelfAttention,
        attention_backend: str = "auto",
        loss_chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype, self.loss_chunk_tokens = config, compute_dtype, loss_chunk_tokens
        self.window_sizes = config.window_sizes
        vocab = config.padded_vocab_size
        blocks = nn.ModuleList([Block(config, layer, mixer_factory) for layer in range(config.n_layer)])
        self.transformer = nn.ModuleDict({"wte": self._embedding(vocab, config.n_embd), "h": blocks})
        self.lm_head = Linear(config.n_embd, vocab)
        if config.variant == "2026":
            self._add_2026_parts(config, vocab)
        self.set_attention_backend(attention_backend)
        self._make_rotary()
        self.register_load_state_dict_post_hook(_remake_rotary)

    def _embedding(self, vocab: int, dim: int) -> nn.Embedding:
        # fp16 gradients cannot be unscaled, so fp16 keeps fp32 embeddings, as in nanochat.
        dtype = torch.float32 if self.compute_dtype == torch.float16 else self.compute_dtype
        return nn.Embedding(vocab, dim, dtype=dtype)

    def _add_2026_parts(self, config: GPTConfig, vocab: int) -> None:
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        kv_dim = config.n_kv_head * config.head_dim
        layers = [
            layer
            for layer, block in enumerate(self.blocks)
            if config.has_value_embedding(layer) and getattr(block.attn, "uses_value_embedding", True)
        ]
        self.value_embeds = nn.ModuleDict({str(layer): self._embedding(vocab, kv_dim) for layer in layers})

    def _make_rotary(self) -> None:
        """(Re)compute the rotary tables: they are no part of the state dict and `to_empty` leaves them undefined."""
        config = self.config
        length = config.sequence_len * ROTARY_LENGTH_FACTOR
        tables = rotary_tables(length, config.head_dim, ROTARY_BASE[config.variant], self.get_device())
        for name, table in zip(("cos", "sin"), tables, strict=True):
            # nanochat rounded the tables to bf16 in 2025 whatever the type of the activations; weights trained
            # with rounded angles expect them.
            rounded = table.bfloat16() if config.variant == "2025" else table
            self.register_buffer(name, rounded.to(self.compute_dtype), persistent=False)

    def set_attention_backend(self, backend: str) -> None:
        """Choose the attention kernel of every block (see `attention_backends`); ValueError if unknown."""
        check_backend(backend)
        for block in self.blocks:
            if isinstance(block.attn, CausalSelfAttention):
                block.attn.backend = backend

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, first to last."""
        return list(self.transformer["h"])  # type: ignore[arg-type]

    def get_device(self) -> torch.device:
        """Device of the weights."""
        return self.transformer["wte"].weight.device  # type: ignore[return-value]

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the first weights (generator on the weights' device) and compute the rotary tables."""
        (init_2026 if self.config.variant == "2026" else init_2025)(self, generator)
        self._make_rotary()

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters by role: wte, value_embeds, lm_head, transformer_matrices, scalars, total.

        transformer_matrices: the weights of the blocks' nn.Linear; what mixers have beside them (poles, gates, taps)
        counts as scalars.
        """
        total = sum(p.numel() for p in self.parameters())
        counts = {
            "wte": _numel(self.transformer["wte"]),
            "value_embeds": _numel(self.value_embeds) if self.config.variant == "2026" else 0,
            "lm_head": _numel(self.lm_head),
            "transformer_matrices": _linear_weights(self.transformer["h"]),
        }
        return {**counts, "scalars": total - sum(counts.values()), "total": total}

    def estimate_flops_per_token(self) -> int:
        """FLOPs per token, forward and backward: 6 per weight of a matrix product plus 12 H D per visible key.

        The PaLM convention (arXiv:2204.02311, appendix B) with each layer's window as the number of visible keys. A
        mixer in attention's place says itself what its recurrence costs: `flops_per_token()`.
        """
        weights = _linear_weights(self)
        mixing = [
            self._mixing_flops(block, left) for block, (left, _) in zip(self.blocks, self.window_sizes, strict=True)
        ]
        return 6 * weights + sum(mixing)

    def _mixing_flops(self, block: Block, left: int) -> int:
        """Of one layer, beside its weights; `left`: its window, -1 for everything."""
        own = getattr(block.attn, "flops_per_token", None)
        if callable(own):
            return int(own())  # type: ignore[call-overload]
        length = self.config.sequence_len
        return 12 * self.config.n_head * self.config.head_dim * (min(left, length) if left >= 0 else length)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: KVCache | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Tokens idx [B, T] -> logits [B, T, vocab] (soft-capped, fp32), or the loss in nats against targets [B, T].

        Targets of -1 do not count. With a cache, idx continues the tokens it holds, and the cache moves on.
        Raises ValueError when the sequence outgrows the rotary tables.
        """
        x = self._trunk(idx, kv_cache)
        if targets is None:
            return soft_cap(self.lm_head(x)[..., : self.config.vocab_size])
        chunk = self._loss_chunk(loss_reduction)
        if chunk:
            rows = x.reshape(-1, x.size(-1))
            return chunked_head_loss(
                rows, self.lm_head.weight, targets.reshape(-1), self.config.vocab_size, chunk, loss_reduction
            )
        return soft_cap_cross_entropy(self.lm_head(x)[..., : self.config.vocab_size], targets, loss_reduction)

    def _loss_chunk(self, loss_reduction: str) -> int:
        """Rows of logits per chunk of the loss, 0 for all: chunks pay only where gradients are wanted."""
        if loss_reduction == "none" or not torch.is_grad_enabled():
            return 0
        if self.loss_chunk_tokens is None:
            return CPU_LOSS_CHUNK if self.get_device().type == "cpu" else 0
        return self.loss_chunk_tokens

    def _trunk(self, idx: Tensor, kv_cache: KVCache | None) -> Tensor:
        """Everything before the head: idx [B, T] -> normed activations [B, T, D]."""
        start = 0 if kv_cache is None else kv_cache.position
        end = start + idx.size(1)
        if end > self.cos.size(1):
            raise ValueError(f"{end} tokens are more than the {self.cos.size(1)} positions the model has tables for")
        cos_sin = self.cos[:, start:end], self.sin[:, start:end]
        x = rms_norm(self.transformer["wte"](idx).to(self.compute_dtype))
        x = (
            self._run_2026(x, idx, cos_sin, kv_cache)
            if self.config.variant == "2026"
            else self._run_2025(x, cos_sin, kv_cache)
        )
        if kv_cache is not None:
            kv_cache.advance(idx.size(1))
        return rms_norm(x)

    def _run_2025(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], kv_cache: KVCache | None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, None, cos_sin, self.window_sizes[layer], kv_cache)
        return x

    def _run_2026(self, x: Tensor, idx: Tensor, cos_sin: tuple[Tensor, Tensor], kv_cache: KVCache | None) -> Tensor:
        """Blocks with smeared embeddings, x0 blending, value embeddings, and the middle of the stream backed out."""
        x = first = self._smear(x, kv_cache)
        middle = x
        resid, blend = self.resid_lambdas.to(x.dtype).unbind(), self.x0_lambdas.to(x.dtype).unbind()
        for layer, block in enumerate(self.blocks):
            x = torch.addcmul(resid[layer] * x, blend[layer], first)
            ve = self.value_embeds[str(layer)](idx).to(x.dtype) if str(layer) in self.value_embeds else None
            x = block(x, ve, cos_sin, self.window_sizes[layer], kv_cache)
            if layer == self.config.n_layer // 2:
                middle = x
        return x - self.backout_lambda.to(x.dtype) * middle

    def _smear(self, x: Tensor, kv_cache: KVCache | None) -> Tensor:
        """Add to each embedding [B, T, D] a gated share of its predecessor's; the first of a text has none."""
        previous = None
        if kv_cache is not None:
            previous, kv_cache.prev_embedding = kv_cache.prev_embedding, x[:, -1:]
        if previous is not None:
            return self._add_predecessor(x, torch.cat([previous, x[:, :-1]], dim=1))
        return torch.cat([x[:, :1], self._add_predecessor(x[:, 1:], x[:, :-1])], dim=1)

    def _add_predecessor(self, x: Tensor, predecessor: Tensor) -> Tensor:
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return torch.addcmul(x, gate, predecessor)


def _remake_rotary(model: GPT, incompatible_keys: object) -> None:
    """After weights were loaded into a model from the meta device, its tables must follow."""
    model._make_rotary()


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
