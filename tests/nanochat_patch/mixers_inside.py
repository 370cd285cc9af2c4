"""`python mixers_inside.py MIXER PATTERN` in a real checkout: fails where mixers are not in it as they should be."""

import sys
from typing import Any

import torch
from real_mixers import VOCAB_SIZE, build, install, optimizers_of, step, stir, surface_here

from nanochat_patch.compat import Surface
from nanochat_patch.options import MixerConfig

SIZES = {"n_layer": 3, "n_embd": 128}
MATRICES = tuple(f"{name}.weight" for name in ("_proj", "c_q", "c_k", "c_v", "c_fc", "ve_gate"))


class Tokenizer:
    """No special token ever comes."""

    def encode_special(self, name: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


def check_weights(model: Any, plain: dict[str, torch.Tensor], config: MixerConfig) -> None:
    """The mixers' own are where attention was; the others are a plain run's."""
    attention = tuple(f"transformer.h.{layer}.attn." for layer in config.layers(3))
    unused = tuple(f"value_embeds.{layer}." for layer in config.layers(3))
    mixed = model.state_dict()
    own = {name for name in mixed if ".attn_mixer." in name}
    assert {name.split("attn_mixer")[0] for name in own} == set(attention)
    assert set(mixed) - own == {name for name in plain if not name.startswith(attention + unused)}
    assert all(torch.equal(mixed[name], plain[name]) for name in set(mixed) - own)


def check_counts(model: Any) -> None:
    projections = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    assert model.estimate_flops() > 6 * projections
    if hasattr(model, "num_scaling_params"):
        counts = model.num_scaling_params()
        assert counts.pop("total") == sum(counts.values())


def check_optimizer(model: Any, surface: Surface) -> None:
    """Matrices are Muon's, the mixers' other parameters are one vector of AdamW, and all of them move."""
    optimizers = optimizers_of(surface, model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    named = {name: p for name, p in model.named_parameters() if ".h." in name}
    matrices = {id(p) for name, p in named.items() if name.endswith(MATRICES)}
    assert {id(p) for group in groups if "momentum" in group for p in group["params"]} == matrices
    small = [p for p in named.values() if id(p) not in matrices]
    in_model = {id(p) for p in model.parameters()}
    (vector,) = (p for group in groups for p in group["params"] if id(p) not in in_model)
    assert vector.numel() == sum(p.numel() for p in small)
    before = [p.detach().clone() for p in small]
    rows = torch.randint(VOCAB_SIZE, (2, 33), generator=torch.Generator().manual_seed(0))
    for _ in range(4):  # in 2025 the head starts at zero: the third step is the first that a whole block feels
        step(model, optimizers, rows)
    assert not any(torch.equal(a, b) for a, b in zip(before, small, strict=True))


def check_engine(model: Any) -> None:
    """Its engine, which reads a prompt once and goes on in three rows, against its generation without a cache."""
    from nanochat.engine import Engine  # type: ignore[import-not-found]

    engine = Engine(model.eval(), Tokenizer())
    for prompt in ([7], [1, 2, 3, 4, 5]):
        rows, _ = engine.generate_batch(prompt, num_samples=3, max_tokens=12, temperature=0)
        assert rows[0] == rows[1] == rows[2]
        assert len(set(rows[0])) > 3
        some = rows[0][: max(len(prompt), 2)]  # 2026 without a cache wants two tokens
        assert some + list(model.generate(some, len(rows[0]) - len(some), temperature=0)) == rows[0]


def main() -> None:
    surface = surface_here()
    plain = build(**SIZES).state_dict()
    config = install(surface, *sys.argv[1:])
    model = build(**SIZES)
    check_weights(model, plain, config)
    check_counts(model)
    check_optimizer(model, surface)
    stir(model)
    check_engine(model)
    print("as it should be")


if __name__ == "__main__":
    main()
