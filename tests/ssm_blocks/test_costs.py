"""What mixers say they cost, against what PyTorch counts; where their poles start."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssm_blocks import available, build
from ssm_blocks.layers.modules import Gate, ShortConvolution
from svdtrain.model.attention import CausalSelfAttention
from svdtrain.model.gpt import GPT, GPTConfig
from tests.ssm_blocks.mixer_checks import rand

DIM, SEQUENCES = 128, 16


def counted(mixer: nn.Module) -> tuple[int, int]:
    """FLOPs of matrix products and convolutions a token: of linear maps, gates and taps; of everything in a step. Of
    several sequences at once, among which what concerns the parameters alone is shared."""
    x, state = torch.randn(SEQUENCES, DIM), mixer.init_state(SEQUENCES)  # type: ignore[operator]
    with torch.no_grad(), FlopCounterMode(display=False) as in_step:
        mixer.step(x, state)  # type: ignore[operator]
    with torch.no_grad(), FlopCounterMode(display=False) as by_module:
        mixer(x[:1].unsqueeze(1))
    maps = {name for name, child in mixer.named_modules() if isinstance(child, (nn.Linear, Gate, ShortConvolution))}
    found = by_module.get_flop_counts()
    own = sum(sum(found.get(f"{type(mixer).__name__}.{name}", {}).values()) for name in maps)
    return own, in_step.get_total_flops() // SEQUENCES


@pytest.mark.parametrize("name", available())
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    """Exactly for the maps; with the recurrence to 25 %, where elementwise and complex products are not counted."""
    mixer = build(name, DIM, num_heads=2)
    maps, total = counted(mixer)
    linear = 2 * sum(m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Linear))
    others = (m for m in mixer.modules() if isinstance(m, (Gate, ShortConvolution)))
    assert maps == linear + 2 * sum(m.weight.numel() for m in others if m.weight is not None)
    assert mixer.map_flops_per_token() >= maps - linear  # type: ignore[operator]
    assert 0.75 <= total / (linear + mixer.flops_per_token()) <= 1.0


def gpt(mixer: str) -> GPT:
    from ssm_blocks.adapter import mixer_factory

    config = GPTConfig(sequence_len=64, vocab_size=64, n_layer=4, n_head=2, n_kv_head=2, n_embd=DIM)
    factory = CausalSelfAttention if mixer == "attention" else mixer_factory(mixer, CausalSelfAttention)
    with torch.device("meta"):
        return GPT(config, mixer_factory=factory)


@pytest.mark.parametrize("name", ["monarch", "dplr_ltv", "oscillatory_dplr"])
def test_a_gpt_counts_its_mixers(name: str) -> None:
    model, mixer = gpt(name), build(name, DIM)
    linear = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Linear))
    outside = 4 * 8 * DIM**2 + 64 * DIM + 24  # MLPs, head, smear gate
    assert model.estimate_flops_per_token() == 6 * (4 * linear + outside) + 3 * 4 * mixer.flops_per_token()
    counts = model.parameter_counts()
    assert counts["transformer_matrices"] == 4 * (linear + 8 * DIM**2)
    assert counts["value_embeds"] == 0  # mixers read none
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    beside = sum(p.numel() for p in mixer.parameters()) - linear
    assert counts["scalars"] == 4 * beside + 4 + 4 + 24 + 2
    assert gpt("attention").parameter_counts()["value_embeds"] == 2 * 64 * DIM


def test_first_poles() -> None:
    """Time constants of about 20 tokens, angles between .05 and 2, in every parametrisation."""
    x = 1e-3 * rand(1, 4, 64).float()
    for name in ("diagonal", "diagonal_signed", "diagonal_complex"):
        mixer = build(name, 64)
        a = mixer._inputs(x, mixer._features(x))["a"].abs()  # type: ignore[operator]
        assert (a - 0.95).abs().max() < 1e-3, name
    for name in ("linoss_im", "linoss_imex", "linoss_damped"):
        angle = build(name, 64).coefficients(torch.float64)[0]  # type: ignore[operator]
        assert 0.05 <= angle.min().item() <= 0.08
        assert 1.5 <= angle.max().item() <= 2.0
    poles = build("oscillatory_dplr", 512, num_heads=8).poles(torch.float64)  # type: ignore[operator]
    zeta = -poles.real / poles.abs()
    assert math.isclose(zeta.median().item(), 0.03, rel_tol=0.2)
    radii = torch.sigmoid(build("dplr_plain", 512, num_heads=8).decay)
    assert math.isclose(radii.median().item(), 0.95, rel_tol=0.02)
