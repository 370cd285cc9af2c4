"""Which parameters are watched."""

import pytest
from adaptive_toy import make_toy
from torch import nn

from svdtrain.adaptive.targets import select_targets, short_name

ATTN = ["h.0.attn.c_q", "h.0.attn.c_v", "h.0.attn.c_proj"]
MLP = ["h.0.mlp.c_fc", "h.0.mlp.c_proj"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("attn", ATTN), ("mlp", MLP), ("all", ATTN + MLP), (r"c_(q|v)\.weight$", ATTN[:2]), ("head", ["head"])],
)
def test_families_and_patterns(pattern: str, expected: list[str]) -> None:
    found = select_targets(make_toy(depth=1), pattern)
    assert list(found) == expected
    assert all(p.ndim == 2 for p in found.values())


def test_common_names_of_other_models() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.ModuleDict({k: nn.Linear(16, 16) for k in ("q_proj", "k_proj", "v_proj", "o_proj")})
            self.mlp = nn.ModuleDict({k: nn.Linear(16, 16) for k in ("gate_proj", "up_proj", "down_proj")})
            self.attn_norm = nn.LayerNorm(16)

    model = nn.ModuleDict({"layers": nn.ModuleList([Layer()])})
    assert len(select_targets(model, "attn")) == 4
    assert len(select_targets(model, "mlp")) == 3


def test_nothing_matched_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'nope' matches no 2-D parameter.*named like: h\.0\.attn\.c_q\.weight, "):
        select_targets(make_toy(), "nope")
    with pytest.raises(ValueError, match="not attn, mlp, all or a regular expression"):
        select_targets(make_toy(), "c_(q")
    with pytest.raises(ValueError, match="at least 16"):
        select_targets(nn.ModuleDict({"attn": nn.ModuleDict({"c_q": nn.Linear(15, 64)})}), "attn")


def test_shared_parameter_is_refused_only_when_it_is_a_target() -> None:
    model = make_toy()
    model.head.weight = model.h[0].attn.c_q.weight
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_q\.weight and head\.weight share one parameter"):
        select_targets(model, "attn")
    assert "h.0.mlp.c_fc" in select_targets(model, "mlp")


def test_frozen_target_is_left_out_with_a_warning() -> None:
    model = make_toy()
    model.h[0].attn.c_q.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"not watched: h\.0\.attn\.c_q\.weight$"):
        found = select_targets(model, "attn")
    assert "h.0.attn.c_q" not in found
    assert len(found) == 5
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all 6 parameters that svd_targets='attn' matches are frozen"):
        select_targets(model, "attn")


def test_names_lose_the_wrappers() -> None:
    assert short_name("module._orig_mod.transformer.h.0.attn.c_q.weight") == "h.0.attn.c_q"
    assert short_name("h.0._orig_mod.attn.c_q.weight") == "h.0.attn.c_q"
    assert short_name("transformer.h.0.module.c_q") == "h.0.module.c_q"


def test_a_module_that_is_held_twice_under_one_wrapper_is_not_shared() -> None:
    """Lightning Fabric keeps the module beside what runs forward."""
    wrapper = nn.Module()
    wrapper._forward_module = wrapper._original_module = make_toy()
    assert select_targets(wrapper, "attn").keys() == select_targets(make_toy(), "attn").keys()
