"""Sequence mixers in the GPT, from the command line: train, switch, sample, resume."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import ssm_blocks.mixer
from svdtrain.build import build_model
from svdtrain.config import ModelConfig, RunConfig
from svdtrain.model import generate
from tests.main_job import records, tiny_settings, tiny_trainer, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("mixer", ["neg_deltanet", "diagonal"])
def test_a_mixer_trains_and_its_projections_are_watched(tmp_path, corpus, mixer: str) -> None:
    settings = tiny_settings(corpus, model={"mixer": mixer}, train={"num_iterations": 20})
    trainer = tiny_trainer(tmp_path / "run", settings)
    trainer.fit()
    bpb = [r["val/bpb"] for r in records(tmp_path / "run", "eval")]
    assert bpb[-1] < 0.97 * bpb[0]
    assert records(tmp_path / "run", "sample")[-1]["text"]
    watched = {key.split("/")[1] for record in records(tmp_path / "run", "svd") for key in record if "/" in key}
    assert any("attn_mixer" in name for name in watched)


def model_with(mixer: str, pattern: str = "M") -> torch.nn.Module:
    config = RunConfig(model=ModelConfig(depth=2, max_seq_len=32, mixer=mixer, mixer_pattern=pattern))
    return build_model(config, vocab_size=97, device=torch.device("cpu"))


def test_a_pattern_mixes_attention_in() -> None:
    kinds = [type(block.attn).__name__ for block in model_with("diagonal", "MA").blocks]
    assert kinds == ["AttentionAdapter", "CausalSelfAttention"]


@pytest.mark.parametrize("pattern", ["M", "MA", "AM"])
def test_generation_by_steps_equals_generation_by_whole_sequences(pattern: str) -> None:
    model = model_with("neg_deltanet", pattern).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero output projections would hide the mixers
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    prompt = [5, 9, 11]
    stepped = list(generate(model, prompt, 12, temperature=0.0))
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert stepped == ids[3:]


def test_a_mixer_of_ones_own_by_module_and_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ssm_blocks.mixer, "_registry", dict(ssm_blocks.mixer._registry))  # other tests list the names
    (tmp_path / "mixers_of_this_test.py").write_text(
        "import torch\n"
        "from ssm_blocks import Mixer, register\n"
        "@register('running_mean_of_mine')\n"
        "class RunningMean(Mixer):\n"
        "    def forward(self, x, state=None, cu_seqlens=None, return_state=False):\n"
        "        count = torch.arange(1, x.size(1) + 1).view(1, -1, 1)\n"
        "        return x.cumsum(1) / count\n"
        "    def init_weights(self, generator=None):\n"
        "        pass\n"
        "    def state_numel(self):\n"
        "        return self.dim\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = model_with("mixers_of_this_test:running_mean_of_mine")
    assert "mixers_of_this_test" in sys.modules
    assert model(torch.randint(0, 97, (1, 8))).shape == (1, 8, 97)
    assert model.estimate_flops_per_token() > 0


@pytest.mark.parametrize(
    ("mixer", "words"), [("mambo", "available: "), ("no_such_module:thing", "cannot import no_such_module")]
)
def test_unknown_mixers_are_named(mixer: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_with(mixer)


def test_poles_and_gates_go_to_adamw_without_decay(tmp_path, corpus) -> None:
    settings = tiny_settings(corpus, model={"mixer": "oscillatory_dplr"}, train={"num_iterations": 1})
    trainer = tiny_trainer(tmp_path / "run", settings)
    trainer.fit()
    muon = [p for g in trainer.state.optimizer.param_groups if g["kind"] == "muon" for p in g["params"]]
    names = {id(p): name for name, p in trainer.state.model.named_parameters()}
    from ssm_blocks.mixer import non_matrix_parameters

    listed = {id(p) for block in trainer.state.model.blocks for p in non_matrix_parameters(block.attn).values()}
    assert listed
    assert not [names.get(id(p)) for p in muon if id(p) in listed]
    others = [g for g in trainer.state.optimizer.param_groups if any(id(p) in listed for p in g["params"])]
    assert all(g["kind"] == "adamw" and g["weight_decay"] == 0 for g in others)
