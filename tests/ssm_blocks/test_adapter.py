"""A mixer in a GPT block's place: signatures, cache, decoding equal to prefill."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ssm_blocks import available, build, non_matrix_parameters
from ssm_blocks.adapter import AttentionAdapter, is_attention_layer, mixer_factory
from svdtrain.model.attention import CausalSelfAttention
from svdtrain.model.generate import generate
from svdtrain.model.gpt import GPT, GPTConfig
from svdtrain.model.kv_cache import KVCache
from tests.ssm_blocks.mixer_checks import rand

CONFIG = GPTConfig(sequence_len=64, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def model(name: str, pattern: str = "M") -> GPT:
    factory = mixer_factory(name, CausalSelfAttention, pattern)
    with torch.device("meta"):
        network = GPT(CONFIG, mixer_factory=factory)
    network.to_empty(device="cpu")
    network.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # away from the zero output projections
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return network


@pytest.mark.parametrize("name", available())
def test_decoding_equals_one_pass(name: str) -> None:
    network = model(name)
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = network(tokens)
        cache = KVCache.for_model(network, batch_size=2, max_len=12)
        got = [network(tokens[:, :5], kv_cache=cache), network(tokens[:, 5:7], kv_cache=cache)]
        got += [network(tokens[:, t : t + 1], kv_cache=cache) for t in range(7, 12)]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-4, rtol=1e-3)


def bytes_after(pattern: str, max_len: int, name: str = "neg_deltanet") -> int:
    """Of a cache for max_len tokens after a prefill and one more token."""
    network = model(name, pattern)
    cache = KVCache.for_model(network, batch_size=1, max_len=max_len)
    with torch.no_grad():
        network(torch.zeros(1, max_len - 1, dtype=torch.long), kv_cache=cache)
        network(torch.zeros(1, 1, dtype=torch.long), kv_cache=cache)
    return cache.num_bytes()


def test_memory_of_decoding_does_not_grow_with_the_length() -> None:
    """Of mixers alone it is constant; with one layer of attention in two, it grows by that layer's keys and values."""
    state = sum(x.numel() for x in build("neg_deltanet", 32).init_state(1).values())
    assert bytes_after("M", 12) == bytes_after("M", 400) == 4 * (2 * state + 32)
    assert bytes_after("MA", 400) - bytes_after("MA", 12) == 4 * 2 * 32 * (400 - 12)


@pytest.mark.parametrize("name", available())
def test_memory_of_every_mixer_is_constant(name: str) -> None:
    assert bytes_after("M", 2, name) == bytes_after("M", 130, name)


def test_mixers_and_attention_in_one_model() -> None:
    network = model("deltanet", "MA")
    assert isinstance(network.blocks[0].attn, AttentionAdapter)
    assert isinstance(network.blocks[1].attn, CausalSelfAttention)
    assert len(list(generate(network, [1, 2, 3], 5))) == 5


def test_pattern() -> None:
    assert [is_attention_layer("MMMA", layer) for layer in range(8)] == [False, False, False, True] * 2
    for wrong in ("", "MX"):
        with pytest.raises(ValueError, match="letters M"):
            is_attention_layer(wrong, 0)
    with pytest.raises(ValueError, match="available: "):
        mixer_factory("mamba", CausalSelfAttention)


def test_a_block_starts_as_the_identity() -> None:
    adapter = AttentionAdapter("monarch", 16, 0)
    adapter.init_weights(torch.Generator().manual_seed(0))
    assert torch.equal(adapter(rand(1, 4, 16).float(), None, None), torch.zeros(1, 4, 16))


def test_nanochat_signatures_and_its_cache() -> None:
    """Real nanochat's cache has no slots for states."""
    adapter = AttentionAdapter("neg_deltanet", 16, 1)
    x = rand(2, 6, 16).float()
    cache = SimpleNamespace()
    parts = [
        adapter(x[:, :4], None, None, (-1, 0), cache),
        adapter(x[:, 4:5], None, cache),
        adapter(x[:, 5:], None, cache),
    ]
    torch.testing.assert_close(torch.cat(parts, 1), adapter(x, None, None, (-1, 0), None))
    with pytest.raises(ValueError, match="kv_cache"):
        adapter(x, None)


@pytest.mark.parametrize("name", available())
def test_adaptive_svd_finds_the_projections(name: str) -> None:
    """All of them, and nothing that is no projection."""
    from svdtrain.adaptive.targets import select_targets

    network = nn.ModuleDict({"attn": AttentionAdapter(name, 64, 0)})
    found = select_targets(network, "attn")
    assert {f"{key.removesuffix('.weight')}.weight" for key in found} == {
        key for key, _ in network.named_parameters() if key.endswith("_proj.weight")
    }
    assert len(found) >= 2


@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("pattern", ["M", "MA"])
def test_generation_from_prompts_of_any_length(pattern: str, prompt: int) -> None:
    """Longer than the context too (64 tokens): decoding is then what one pass over everything says."""
    network = model("monarch", pattern)
    tokens = torch.randint(50, (prompt,), generator=torch.Generator().manual_seed(prompt)).tolist()
    got = list(generate(network, tokens, 3, temperature=0.0))
    with torch.no_grad():
        for _ in range(3):
            tokens.append(int(network(torch.tensor([tokens]))[0, -1].argmax()))
    assert got == tokens[prompt:]


def test_flops_count_state_and_gate() -> None:
    adapter = AttentionAdapter("deltanet", 128, 0, conv_size=0)
    assert adapter.flops_per_token() == 3 * (6 * 2 * 64 * 64 + 2 * 2 * 128)


@pytest.mark.parametrize("name", available())
def test_groups_of_the_optimizer(name: str) -> None:
    """Projections to Muon; everything else of a mixer to AdamW without decay."""
    from svdtrain.config import OptimConfig
    from svdtrain.optim import build_param_groups

    network = model(name)
    adapters = {prefix: m for prefix, m in network.named_modules() if isinstance(m, AttentionAdapter)}
    apart = [f"{prefix}.{key}" for prefix, adapter in adapters.items() for key in non_matrix_parameters(adapter)]
    groups = build_param_groups(network, OptimConfig(), non_matrices=apart)
    kinds = {id(p): (group["kind"], group["weight_decay"]) for group in groups for p in group["params"]}
    for key, parameter in network.named_parameters():
        if ".attn_mixer." in key:
            kind, decay = kinds[id(parameter)]
            assert kind == ("muon" if key.endswith("_proj.weight") else "adamw"), key
            assert decay == 0 or kind == "muon", key
