"""The network: names and shapes, and every mechanism against a naive float64 reference."""

import torch

from svdtrain.model import GPT, GPTConfig


def tiny(variant: str = "2026") -> GPTConfig:
    return GPTConfig(sequence_len=32, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, variant=variant)


def test_meta_device_then_weights() -> None:
    with torch.device("meta"):
        model = GPT(tiny())
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    assert torch.isfinite(model(torch.zeros(1, 8, dtype=torch.long))).all()
