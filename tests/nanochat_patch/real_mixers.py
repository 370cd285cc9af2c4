"""What the two programs that run inside a real checkout share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_patch import mixers
from nanochat_patch.compat import Surface, enter_checkout, find_mixer_surface, find_surface
from nanochat_patch.options import MixerConfig

VOCAB_SIZE = 256


def surface_here() -> Surface:
    """Of the checkout in the current directory."""
    enter_checkout(Path.cwd())
    return find_surface()


def install(surface: Surface, mixer: str, pattern: str = "M") -> MixerConfig:
    config = MixerConfig(mixer=mixer, mixer_pattern=pattern)
    mixers.install(find_mixer_surface(surface), config)
    return config


def build(**sizes: int) -> Any:
    """A small model, as the script builds its own."""
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    torch.manual_seed(42)
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=64, vocab_size=VOCAB_SIZE, n_head=2, n_kv_head=2, **sizes))
    model.to_empty(device="cpu")
    model.init_weights()
    return model


def optimizers_of(surface: Surface, model: Any) -> list[torch.optim.Optimizer]:
    result = getattr(model, surface.setup_name)()
    return result if isinstance(result, list) else [result]


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Away from the weights that are zero at first."""
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape))


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], rows: Tensor) -> None:
    """One of training, on rows of one token more than the model sees."""
    model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
