"""Generation with the cache says what generation without it says."""

import pytest
import torch

from svdtrain.model import GPT, GPTConfig, KVCache, generate
from svdtrain.model.generate import sample_token


def model_of(variant: str) -> GPT:
    """Short window 128, full context 256; a text of 300 tokens outgrows both."""
    config = GPTConfig(
        sequence_len=256, vocab_size=50, n_layer=4, n_head=2, n_kv_head=1, n_embd=32, variant=variant  # type: ignore[arg-type]
    )  # fmt: skip
    model = GPT(config, torch.float64)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for name, parameter in model.named_parameters():
        std = 0.3 if "lambda" in name else 1.5 * parameter.shape[-1] ** -0.5
        noise = torch.empty_like(parameter, dtype=torch.float32).normal_(0, std, generator=generator)
        parameter.data.add_(noise)
    return model


@torch.inference_mode()
def greedy_without_cache(model: GPT, tokens: list[int], max_tokens: int) -> list[int]:
    text = list(tokens)
    for _ in range(max_tokens):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(tokens) :]


@pytest.mark.parametrize("variant", ["2026", "2025"])
@pytest.mark.parametrize("prompt_length", [1, 120, 250])
def test_greedy_equals_no_cache(variant: str, prompt_length: int) -> None:
    model = model_of(variant)
    prompt = torch.randint(0, 50, (prompt_length,), generator=torch.Generator().manual_seed(2)).tolist()
    text = list(generate(model, prompt, 12, temperature=0))
    assert text == greedy_without_cache(model, prompt, 12)


@pytest.mark.parametrize("variant", ["2026", "2025"])
@pytest.mark.parametrize("chunks", [[300], [1, 299], [7, 1, 150, 142], [1] * 5 + [295]], ids=str)
@torch.inference_mode()
def test_prefill_in_chunks_gives_the_same_logits(variant: str, chunks: list[int]) -> None:
    model = model_of(variant)
    tokens = torch.randint(0, 50, (2, 300), generator=torch.Generator().manual_seed(3))
    cache = KVCache.for_model(model, batch_size=2, max_len=300)
    parts = [model(part, kv_cache=cache) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-10, rtol=1e-10)
    assert cache.position == 300


def test_reset_forgets() -> None:
    model = model_of("2026")
    cache = KVCache.for_model(model, batch_size=1, max_len=16)
    tokens = torch.arange(10)[None]
    first = model(tokens, kv_cache=cache)
    cache.reset()
    torch.testing.assert_close(model(tokens, kv_cache=cache), first, atol=0, rtol=0)


def test_full_cache_says_so() -> None:
    model = model_of("2025")
    cache = KVCache.for_model(model, batch_size=1, max_len=4)
    with pytest.raises(ValueError, match="holds 4 tokens, 5 are needed"):
        model(torch.arange(5)[None], kv_cache=cache)


def test_seed_decides_and_top_1_is_greedy() -> None:
    model = model_of("2026")
    draws = [list(generate(model, [1], 20, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert list(generate(model, [1], 20, top_k=1)) == list(generate(model, [1], 20, temperature=0))


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -50.0])
    generator = torch.Generator().manual_seed(0)
    draws = [sample_token(logits, temperature=0.5, top_k=2, generator=generator) for _ in range(2000)]
    assert set(draws) == {1, 2}
    expected = torch.tensor([2.0, 4.0]).softmax(0)[1]
    assert draws.count(2) / 2000 == pytest.approx(expected.item(), abs=0.03)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(model_of("2025"), [], 3))
