"""The network: parameter names and shapes, first weights, and the whole forward pass against a naive reference."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from svdtrain.model import GPT, GPTConfig


def tiny(variant: str = "2026", **changes: object) -> GPTConfig:
    settings = {"sequence_len": 160, "vocab_size": 70, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    return GPTConfig(**{**settings, "variant": variant, **changes})  # type: ignore[arg-type]


def random_model(config: GPTConfig, dtype: torch.dtype = torch.float64, **options: object) -> GPT:
    """A model in which every parameter is non-zero and matters."""
    model = GPT(config, dtype, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for name, parameter in model.named_parameters():
        std = 0.3 if "lambda" in name else parameter.shape[-1] ** -0.5
        noise = torch.empty_like(parameter, dtype=torch.float32).normal_(0, std, generator=generator)
        parameter.data.add_(noise)
    return model


BLOCK = {
    "attn.c_q.weight": (32, 32),
    "attn.c_k.weight": (16, 32),
    "attn.c_v.weight": (16, 32),
    "attn.c_proj.weight": (32, 32),
    "mlp.c_fc.weight": (128, 32),
    "mlp.c_proj.weight": (32, 128),
}
BLOCKS = {f"transformer.h.{layer}.{name}": shape for layer in range(3) for name, shape in BLOCK.items()}
NAMES = {
    "2025": {"transformer.wte.weight": (70, 32), "lm_head.weight": (70, 32), **BLOCKS},
    "2026": {
        "transformer.wte.weight": (128, 32),
        "lm_head.weight": (128, 32),
        **BLOCKS,
        "transformer.h.0.attn.ve_gate.weight": (2, 12),
        "transformer.h.2.attn.ve_gate.weight": (2, 12),
        "value_embeds.0.weight": (128, 16),
        "value_embeds.2.weight": (128, 16),
        "resid_lambdas": (3,),
        "x0_lambdas": (3,),
        "smear_gate.weight": (1, 24),
        "smear_lambda": (1,),
        "backout_lambda": (1,),
    },
}


@pytest.mark.parametrize("variant", ["2026", "2025"])
def test_names_and_shapes_are_nanochats(variant: str) -> None:
    state = GPT(tiny(variant)).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == NAMES[variant]


# ---------------------------------------------------------------- a naive forward pass, position by position


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()


def rotate(x: Tensor, position: int, base: float, rounded: bool) -> Tensor:
    """x [H, D]: pair (i, i + D/2) turned by -position * base^(-2i/D)."""
    half = x.size(-1) // 2
    y = x.clone()
    for i in range(half):
        frequency = 1.0 / (torch.tensor(base, dtype=torch.float32) ** torch.tensor(i / half, dtype=torch.float32))
        angle = torch.tensor(float(position)) * frequency
        cos, sin = angle.cos(), angle.sin()
        if rounded:
            cos, sin = cos.bfloat16(), sin.bfloat16()
        y[:, i] = x[:, i] * cos + x[:, half + i] * sin
        y[:, half + i] = x[:, half + i] * cos - x[:, i] * sin
    return y


def naive_attention(x: Tensor, block: dict[str, Tensor], config: GPTConfig, window: int, ve: Tensor | None) -> Tensor:
    """x [T, D] normed; ve [T, kv_dim] or None."""
    length, dim = x.size(0), config.head_dim
    new = config.variant == "2026"
    base, group = (100000.0 if new else 10000.0), config.n_head // config.n_kv_head
    q = (x @ block["attn.c_q.weight"].T).view(length, config.n_head, dim)
    k = (x @ block["attn.c_k.weight"].T).view(length, config.n_kv_head, dim)
    v = (x @ block["attn.c_v.weight"].T).view(length, config.n_kv_head, dim)
    if ve is not None:
        gate = 3 / (1 + torch.exp(-(x[:, :12] @ block["attn.ve_gate.weight"].T)))
        v = v + gate[:, :, None] * ve.view(length, config.n_kv_head, dim)
    gain = 1.2 if new else 1.0
    q = torch.stack([gain * unit(rotate(q[t], t, base, not new)) for t in range(length)])
    k = torch.stack([gain * unit(rotate(k[t], t, base, not new)) for t in range(length)])
    y = torch.zeros(length, config.n_head, dim, dtype=x.dtype)
    for t in range(length):
        first = max(0, t - window)
        for head in range(config.n_head):
            keys, values = k[first : t + 1, head // group], v[first : t + 1, head // group]
            y[t, head] = (keys @ q[t, head] / math.sqrt(dim)).softmax(0) @ values
    return y.reshape(length, -1) @ block["attn.c_proj.weight"].T


def naive_logits(weights: dict[str, Tensor], config: GPTConfig, tokens: list[int], windows: list[int]) -> Tensor:
    """Logits [T, vocab] in float64, written down from the description of the network."""
    w = {name: value.double() for name, value in weights.items()}
    new = config.variant == "2026"
    x = unit(w["transformer.wte.weight"][tokens])
    if new:
        gate = w["smear_lambda"] * torch.sigmoid(x[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat([x[:1], x[1:] + gate * x[:-1]])
    first, middle = x, x
    for layer in range(config.n_layer):
        block = {n.split(".", 3)[3]: v for n, v in w.items() if n.startswith(f"transformer.h.{layer}.")}
        if new:
            x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * first
        ve = w[f"value_embeds.{layer}.weight"][tokens] if new and layer != 1 else None
        x = x + naive_attention(unit(x), block, config, windows[layer], ve)
        x = x + (unit(x) @ block["mlp.c_fc.weight"].T).clamp_min(0) ** 2 @ block["mlp.c_proj.weight"].T
        if layer == 1:
            middle = x
    if new:
        x = x - w["backout_lambda"] * middle
    logits = unit(x) @ w["lm_head.weight"].T
    return 15 * torch.tanh(logits[:, : config.vocab_size] / 15)


@pytest.mark.parametrize("variant", ["2026", "2025"])
def test_forward_equals_the_naive_reference(variant: str) -> None:
    config = tiny(variant)
    model = random_model(config)
    tokens = torch.randint(0, config.vocab_size, (1, 150), generator=torch.Generator().manual_seed(1))
    windows = [128, 128, 160] if variant == "2026" else [1000] * 3
    expected = naive_logits(model.state_dict(), config, tokens[0].tolist(), windows)
    logits = model(tokens)
    assert logits.std() > 0.5
    torch.testing.assert_close(logits[0], expected, atol=1e-6, rtol=1e-6)  # angles are computed in fp32


def test_window_changes_the_result() -> None:
    """Guards the reference test: 150 positions reach beyond the window of 128."""
    config = tiny()
    model = random_model(config)
    full = GPT(dataclasses.replace(config, window_pattern="L"), torch.float64)
    full.load_state_dict(model.state_dict())
    tokens = torch.randint(0, config.vocab_size, (1, 150), generator=torch.Generator().manual_seed(1))
    difference = (model(tokens) - full(tokens)).abs().amax(-1)[0]
    assert difference[:129].max() < 1e-12
    assert difference[129:].max() > 1e-3


@pytest.mark.parametrize("variant", ["2026", "2025"])
def test_every_parameter_has_a_gradient_and_none_is_from_the_future(variant: str) -> None:
    config = tiny(variant)
    model = random_model(config)
    tokens = torch.randint(0, config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    model(tokens, torch.roll(tokens, -1, 1)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % config.vocab_size
    difference = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert difference[:12].max() == 0
    assert difference[12:].min() > 0


# ---------------------------------------------------------------- construction, types, counts


def test_meta_device_then_load_without_init() -> None:
    source = random_model(tiny(), torch.float32)
    with torch.device("meta"):
        model = GPT(tiny())
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(model(tokens), source(tokens), atol=0, rtol=0)


def test_generator_decides_the_weights() -> None:
    states = []
    for seed in (0, 0, 1):
        model = GPT(tiny())
        model.init_weights(torch.Generator().manual_seed(seed))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["transformer.wte.weight"], states[2]["transformer.wte.weight"])


@pytest.mark.parametrize("variant", ["2026", "2025"])
def test_first_weights_have_the_documented_scale(variant: str) -> None:
    model = GPT(tiny(variant, n_embd=128, vocab_size=4096))
    model.init_weights(torch.Generator().manual_seed(0))
    w = model.state_dict()
    std = {name: float(value.float().std()) for name, value in w.items() if value.numel() > 1}
    assert std["transformer.h.0.attn.c_proj.weight"] == 0
    assert std["transformer.h.1.mlp.c_proj.weight"] == 0
    assert std["transformer.h.0.attn.c_q.weight"] == pytest.approx(128**-0.5, rel=0.03)
    if variant == "2026":
        assert std["transformer.wte.weight"] == pytest.approx(0.8, rel=0.02)
        assert std["lm_head.weight"] == pytest.approx(0.001, rel=0.02)
        assert std["transformer.h.2.mlp.c_fc.weight"] == pytest.approx(0.4 * 128**-0.5, rel=0.03)
        assert std["value_embeds.2.weight"] == pytest.approx(128**-0.5, rel=0.03)
        assert w["resid_lambdas"].tolist() == pytest.approx([1.15, 1.10, 1.05])
        assert w["x0_lambdas"].tolist() == pytest.approx([0.20, 0.125, 0.05])
        assert (w["smear_lambda"].item(), w["backout_lambda"].item()) == (0, pytest.approx(0.2))
        gate = w["transformer.h.0.attn.ve_gate.weight"]
        assert 0 <= gate.min() < gate.max() <= 0.02
    else:
        assert std["transformer.wte.weight"] == pytest.approx(1.0, rel=0.02)
        assert std["lm_head.weight"] == 0
        assert std["transformer.h.0.attn.c_k.weight"] == pytest.approx((64 / 128) ** 0.5 * 128**-0.5, rel=0.05)
        assert std["transformer.h.0.mlp.c_fc.weight"] == pytest.approx(128**-0.5, rel=0.03)


def test_bf16_keeps_fp32_masters_and_bf16_embeddings() -> None:
    model = random_model(tiny(), torch.bfloat16)
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    low = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert low == {"transformer.wte.weight", "value_embeds.0.weight", "value_embeds.2.weight"}
    exact = GPT(tiny(), torch.float64)
    exact.load_state_dict(model.state_dict())
    tokens = torch.arange(60)[None] % 70
    logits = model(tokens)
    assert logits.dtype == torch.float32
    error = (logits - exact(tokens)).square().mean().sqrt() / exact(tokens).square().mean().sqrt()
    assert error < 0.05


def test_sequence_longer_than_the_tables_is_refused() -> None:
    model = random_model(tiny(sequence_len=2), torch.float32)
    model(torch.zeros(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="20 positions"):
        model(torch.zeros(1, 21, dtype=torch.long))


@pytest.mark.parametrize(
    ("depth", "width", "heads"), [(1, 128, 1), (4, 256, 2), (5, 384, 3), (12, 768, 6), (20, 1280, 10)]
)
def test_one_dial(depth: int, width: int, heads: int) -> None:
    config = GPTConfig.from_depth(depth, vocab_size=4096, sequence_len=512)
    assert (config.n_embd, config.n_head, config.n_kv_head, config.head_dim) == (width, heads, heads, 128)


def test_windows_are_tiled_and_the_last_layer_is_long() -> None:
    config = tiny(sequence_len=2048, n_layer=5, window_pattern="SSSL")
    assert config.window_sizes == [(512, 0), (512, 0), (512, 0), (2048, 0), (2048, 0)]
    assert tiny(sequence_len=640, n_layer=2).window_sizes == [(256, 0), (640, 0)]
    assert tiny("2025", n_layer=2).window_sizes == [(-1, 0)] * 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_head": 3}, "does not split"),
        ({"n_kv_head": 3}, "share"),
        ({"window_pattern": "SX"}, "letters S and L"),
        ({"variant": "2024"}, "variant"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny(**changes)  # type: ignore[arg-type]


def test_counts_and_flops_at_depth_12() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(12, vocab_size=32768, sequence_len=2048))
    counts = model.parameter_counts()
    assert counts["wte"] == counts["lm_head"] == 32768 * 768
    assert counts["value_embeds"] == 6 * 32768 * 768
    assert counts["transformer_matrices"] == 12 * 12 * 768**2 + 6 * 6 * 12
    assert counts["scalars"] == 12 + 12 + 24 + 2
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    visible = 9 * 512 + 3 * 2048
    products = counts["transformer_matrices"] + counts["lm_head"] + 24
    assert model.estimate_flops_per_token() == 6 * products + 12 * 768 * visible


class RunningMean(nn.Module):
    """A stand-in mixer: mean of all inputs so far."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(config.n_embd))

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.gain)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.size(1) + 1)[:, None] * self.gain.to(x.dtype)


@pytest.mark.parametrize("variant", ["2026", "2025"])
def test_another_mixer_fits_the_slot(variant: str) -> None:
    model = GPT(tiny(variant), mixer_factory=RunningMean)
    model.init_weights(torch.Generator().manual_seed(0))
    assert model.blocks[0].attn.gain.sum() == 32
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()


def test_unknown_attention_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        GPT(tiny(), attention_backend="fast")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside the compiler itself
def test_compiled_model_equals_eager_without_graph_breaks() -> None:
    model = random_model(tiny(n_layer=2), torch.float32)
    tokens = torch.arange(150)[None] % 70
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    losses = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(tokens, torch.roll(tokens, -1, 1))
        loss.backward()
        losses.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0], atol=2e-5, rtol=1e-4)
