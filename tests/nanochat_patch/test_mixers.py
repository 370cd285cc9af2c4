"""Mixers on the fake checkout, in both forms: where they are put, how they are stepped, cached, saved and refused."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_nanochat import losses, undone, weights, write_checkout

from nanochat_patch import mixers
from nanochat_patch.compat import UnsupportedNanochat, enter_checkout, find_mixer_surface, find_surface
from nanochat_patch.launch import prepare, run_script
from nanochat_patch.mixers import NanochatMixer, mixers_of
from nanochat_patch.options import Launch, MixerConfig, Options, parse
from nanochat_patch.session import Session
from svdtrain.config import SVDConfig
from svdtrain.runlog import read_records

ALL = MixerConfig(mixer="neg_deltanet")
WATCH = SVDConfig(svd_switching=False, svd_interval=2)
SWITCH = SVDConfig(svd_rule="original", svd_interval=2, svd_warmup=1, svd_min_rank=2)


@pytest.fixture(params=["2026", "2025"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkout(tmp_path / "nanochat", request.param)


@pytest.fixture
def entered(checkout: Path) -> Iterator[Path]:
    with undone():
        enter_checkout(checkout)
        yield checkout


def train(checkout: Path, out: Path, mixer: MixerConfig, svd: SVDConfig = WATCH, **flags: object) -> Session:
    out.mkdir(parents=True, exist_ok=True)
    theirs = (f"--out={out}", *(f"--{name}={value}" for name, value in flags.items()))
    launch = Launch(nanochat=str(checkout), run_dir=str(out / "run"))
    with undone():
        session = prepare(Options(launch=launch, svd=svd, mixer=mixer, base_train=theirs))
        run_script(session)
    return session


def gpt(config: MixerConfig) -> Any:
    """A model of the entered checkout."""
    surface = find_surface()
    mixers.install(find_mixer_surface(surface), config)
    torch.manual_seed(42)
    model = surface.gpt()
    model.init_weights()
    return model


def stirred(model: Any) -> Any:
    """Away from the zero output projections."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter += 0.05 * noise
    return model


def test_other_weights_are_those_of_a_plain_run(entered: Path) -> None:
    from nanochat.gpt import GPT  # type: ignore[import-not-found]

    torch.manual_seed(42)
    plain = GPT()
    plain.init_weights()
    after = torch.rand(3)
    model = gpt(MixerConfig(mixer="neg_deltanet", mixer_pattern="MA"))
    assert torch.equal(torch.rand(3), after)  # nor does anything that is drawn later change
    mixed, expected = model.state_dict(), plain.state_dict()
    own = {name for name in mixed if ".attn_mixer." in name}
    assert {int(name.split(".")[2]) for name in own} == {0}
    assert set(mixed) - own == {name for name in expected if not name.startswith("transformer.h.0.attn.")}
    assert all(torch.equal(mixed[name], expected[name]) for name in set(mixed) - own)
    assert not torch.equal(mixed["transformer.h.0.attn.attn_mixer.q_proj.weight"], mixed["transformer.wte.weight"])


def test_value_embeddings_of_mixers_are_left_out(tmp_path: Path) -> None:
    with undone():
        enter_checkout(write_checkout(tmp_path, "2026"))
        model = gpt(ALL)
        assert not list(model.value_embeds)
        x = torch.randn(1, 4, 24)
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_matrices_to_muon_and_the_rest_to_adamw(entered: Path) -> None:
    model = gpt(ALL)
    names = list(model.state_dict())
    result = getattr(model, "setup_optimizer", None) or model.setup_optimizers
    result = result()
    optimizers = result if isinstance(result, list) else [result]
    assert list(model.state_dict()) == names
    small = sum(p.numel() for m in mixers_of(model).values() for n, p in m.named_parameters() if "_proj" not in n)
    group = optimizers[0].param_groups[-1]
    assert [p.numel() for p in group["params"]] == [small]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.0)
    assert group["lr"] == group["initial_lr"] == pytest.approx(0.003 if len(optimizers) == 1 else 0.005)
    matrices = {id(p) for n, p in model.named_parameters() if "_proj" in n}
    muon = [g for g in optimizers[-1].param_groups if "momentum" in g]
    assert {id(p) for g in muon for p in g["params"]} == matrices


@pytest.mark.parametrize("pattern", ["M", "MA", "AM"])
def test_a_cache_gives_what_one_pass_gives(entered: Path, pattern: str) -> None:
    """A prompt in one row, then three rows from there, as nanochat's engine does; and the cache used again."""
    from nanochat.engine import KVCache  # type: ignore[import-not-found]

    model = stirred(gpt(MixerConfig(mixer="neg_deltanet", mixer_pattern=pattern)))
    sizes = {"num_heads": 1, "head_dim": 24, "num_layers": 2}
    x = torch.randn(3, 9, 24, generator=torch.Generator().manual_seed(5))
    x[:, :5] = x[:1, :5]
    with torch.inference_mode():
        want = model(x)
        first = KVCache(batch_size=1, seq_len=5, **sizes)
        for _ in range(2):
            first.reset()
            torch.testing.assert_close(model(x[:1, :5], first), want[:1, :5])
            assert first.get_pos() == 5
        rows = KVCache(batch_size=3, seq_len=9, **sizes)
        rows.prefill(first)
        got = [model(x[:, t : t + 1], rows) for t in (5, 6)] + [model(x[:, 7:], rows)]
        torch.testing.assert_close(torch.cat(got, 1), want[:, 5:])
        assert (rows.get_pos(), first.get_pos()) == (9, 5)
        torch.testing.assert_close(model(x[:1, 5:6], first), want[:1, 5:6])  # the rows took nothing from it


def test_autocast_reaches_the_input_and_stops_there() -> None:
    """What runs under autocast is what runs in bfloat16 without it, with the state in float32."""
    mixer = NanochatMixer("gated_ssd_deltanet", 32, 0, is_last=False)
    x = torch.randn(2, 70, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mixer(x, None, None)
    want = mixer(x.bfloat16(), None, None)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    torch.testing.assert_close(got.float(), mixer(x, None, None), atol=0.03, rtol=0.05)


def test_it_compiles_in_one_graph() -> None:
    mixer = NanochatMixer("neg_deltanet", 16, 0, is_last=True)
    x = torch.randn(2, 8, 16)
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, None, None), mixer(x, None, None))


def test_flops(entered: Path) -> None:
    """6 per weight of a matrix, what the recurrence says of itself, and attention's share only where it is."""
    model = gpt(MixerConfig(mixer="deltanet", mixer_pattern="AM"))
    mixer = mixers_of(model)[1]
    form_2026 = hasattr(model, "num_matmul_params")
    counted = (
        0 if form_2026 else sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in mixer.parameters())
    )
    visible = 2 * 8 - 8  # the fake counts the whole length for both layers and its last window is the length
    expected = 6 * (counted + 4 * 24 * 24) + 12 * 24 * visible + 3 * mixer.attn_mixer.flops_per_token()
    assert model.estimate_flops() == expected


def test_training_with_mixers_and_switching(checkout: Path, tmp_path: Path) -> None:
    session = train(checkout, tmp_path / "run", ALL, SWITCH, num_iterations=12)
    assert session.svd is not None
    assert {name.rsplit(".", 1)[-1] for name in session.svd.targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any("low-rank" in str(change) for change in session.svd.changes)
    loss = losses(tmp_path / "run")
    assert loss[-1] < loss[0] - 1
    saved = weights(tmp_path / "run", 12)
    again = train(checkout, tmp_path / "again", ALL, SWITCH, num_iterations=12)
    assert again.svd is not None
    assert all(torch.equal(value, weights(tmp_path / "again", 12)[name]) for name, value in saved.items())
    assert "transformer.h.0.attn.attn_mixer.conv.weight" in saved
    sidecar = torch.load(tmp_path / "run" / "svd_000012.pt", weights_only=True)
    assert (sidecar["mixer"], sidecar["mixer_pattern"]) == ("neg_deltanet", "M")


def test_vectors_are_trained(checkout: Path, tmp_path: Path) -> None:
    train(checkout, tmp_path, ALL, num_iterations=0)
    train(checkout, tmp_path / "more", ALL, num_iterations=3)
    before, after = weights(tmp_path, 0), weights(tmp_path / "more", 3)
    for name in ("conv.weight", "norm.weight", "beta_gate.weight", "beta_gate.bias"):
        for layer in (0, 1):
            key = f"transformer.h.{layer}.attn.attn_mixer.{name}"
            assert not torch.equal(before[key], after[key]), key


def test_resumed_as_if_never_stopped(tmp_path: Path) -> None:
    checkout = write_checkout(tmp_path / "nanochat", "2026")
    train(checkout, tmp_path / "whole", ALL, SWITCH, num_iterations=10, save_every=5)
    train(checkout, tmp_path / "cut", ALL, SWITCH, num_iterations=5)
    train(checkout, tmp_path / "cut", ALL, SWITCH, num_iterations=10, resume_from_step=5)
    want, got = weights(tmp_path / "whole", 10), weights(tmp_path / "cut", 10)
    assert all(torch.equal(value, got[name]) for name, value in want.items())
    start = [r for r in read_records(tmp_path / "cut" / "run" / "metrics.jsonl") if r["kind"] == "resume"]
    assert [record["step"] for record in start] == [5]


@pytest.mark.parametrize(
    ("saved", "given", "keep_sidecar", "said"),
    [
        (ALL, MixerConfig(), True, "with --mixer neg_deltanet --mixer-pattern M"),
        (MixerConfig(), ALL, True, "without --mixer"),
        (ALL, MixerConfig(mixer="deltanet"), True, "with --mixer neg_deltanet --mixer-pattern M"),
        (ALL, MixerConfig(mixer="neg_deltanet", mixer_pattern="MA"), False, r"with a mixer in layers [0, 1] of 2"),
        (MixerConfig(), ALL, False, "without --mixer"),
    ],
)
def test_other_flags_than_the_checkpoint_s_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    saved: MixerConfig,
    given: MixerConfig,
    keep_sidecar: bool,
    said: str,
) -> None:
    checkout = write_checkout(tmp_path / "nanochat", "2026")
    train(checkout, tmp_path / "run", saved, num_iterations=2)
    if not keep_sidecar:
        (tmp_path / "run" / "svd_000002.pt").unlink()
    with pytest.raises(SystemExit):
        train(checkout, tmp_path / "run", given, num_iterations=4, resume_from_step=2)
    assert capsys.readouterr().err == (
        f"nanochat_patch: error: step 2 in {tmp_path / 'run'} was trained {said}: give the same flags\n"
    )


def test_fp8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkout = write_checkout(tmp_path / "nanochat", "2026")
    script = checkout / "scripts" / "base_train.py"
    script.write_text(script.read_text().replace('["h"][0].attn.c_q', '["h"][0].attn.attn_mixer.q_proj'))
    with pytest.raises(SystemExit):
        train(checkout, tmp_path / "run", ALL, fp8=1)
    assert capsys.readouterr().err == (
        "nanochat_patch: error: nobody has validated mixers in 8 bits: train them without --fp8\n"
    )


@pytest.mark.parametrize(
    ("form", "file", "old", "new", "named"),
    [
        ("2026", "engine", "class KVCache", "class Cache", "KVCache"),
        ("2026", "engine", "def prefill", "def fill", "prefill"),
        ("2026", "engine", "def advance", "def move", "advance"),
        ("2025", "engine", "self.pos, ", "self.place, ", "pos"),
        ("2026", "gpt", "def init_weights", "def draw_weights", "init_weights"),
        ("2026", "gpt", "class Linear(nn.Linear)", "class Matrix(nn.Linear)", "Linear"),
        ("2026", "common", "class DummyWandb", "import torch\nCOMPUTE_DTYPE = torch.float16\nclass DummyWandb", "16"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, form: str, file: str, old: str, new: str, named: str) -> None:
    path = write_checkout(tmp_path, form) / "nanochat" / f"{file}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with undone():
        enter_checkout(tmp_path)
        with pytest.raises(UnsupportedNanochat, match=named):
            find_mixer_surface(find_surface())


def test_an_unknown_attention_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkout(tmp_path, "2025") / "nanochat" / "gpt.py"
    path.write_text(path.read_text().replace("def attend(self, x, cos_sin", "def attend(self, x, mask"))
    with undone():
        enter_checkout(tmp_path)
        with pytest.raises(SystemExit):
            gpt(ALL)
    assert "Attention.forward takes (x, mask, kv_cache); known are" in capsys.readouterr().err


def test_flags() -> None:
    parsed = parse(["--nanochat", "x", "--mixer", "neg_deltanet", "--mixer-pattern", "MMA", "--", "--depth=4"])
    assert parsed.mixer.layers(4) == [0, 1, 3]
    assert parse(["--nanochat", "x"]).mixer.layers(4) == []
    for wrong, said in (
        (["--mixer", "mamba"], "available: "),
        (["--mixer", "deltanet", "--mixer-pattern", "MX"], "letters M"),
        (["--mixer-pattern", "MA"], "name one with --mixer"),
    ):
        with pytest.raises(ValueError, match=said):
            parse(["--nanochat", "x", *wrong])


def test_without_a_mixer_nothing_is_wrapped(checkout: Path, tmp_path: Path) -> None:
    with undone():
        prepare(Options(launch=Launch(nanochat=str(checkout), run_dir=str(tmp_path / "run")), svd=WATCH))
        gpt_class = sys.modules["nanochat.gpt"].GPT
        assert gpt_class.init_weights.__code__.co_filename != mixers.__file__
        assert "nanochat.engine" not in sys.modules
