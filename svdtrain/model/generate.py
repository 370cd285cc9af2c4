"""Text out of a model: one prefill, then one token a step through the KV cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svdtrain.model.gpt import GPT
from svdtrain.model.kv_cache import KVCache

__all__ = ["KVCache", "generate", "sample_token"]


def generate(
    model: GPT,
    tokens: list[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 42,
) -> Iterator[int]:
    """Yield max_tokens tokens that continue `tokens`; temperature 0 takes the most likely one each time.

    top_k: draw only among the k most likely. Raises ValueError for an empty prompt.
    """
    if not tokens:
        raise ValueError("generation needs at least one token to start from, for example the document separator")
    device = model.get_device()
    generator = torch.Generator(device=device).manual_seed(seed)
    cache = KVCache.for_model(model, batch_size=1, max_len=len(tokens) + max_tokens)
    pending = tokens
    for _ in range(max_tokens):
        logits = _next_logits(model, pending, cache)
        pending = [sample_token(logits, temperature=temperature, top_k=top_k, generator=generator)]
        yield pending[0]


@torch.inference_mode()
def _next_logits(model: GPT, tokens: list[int], cache: KVCache) -> Tensor:
    """Logits [vocab] after `tokens`, which continue the cache."""
    idx = torch.tensor([tokens], dtype=torch.long, device=model.get_device())
    return model(idx, kv_cache=cache)[0, -1]


@torch.inference_mode()
def sample_token(logits: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits [vocab]."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        threshold = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = (logits / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
