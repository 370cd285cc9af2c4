"""`svdtrain` from the command line to the last table: it learns, switches, samples, and fails in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from svdtrain.cli import main
from svdtrain.data.tokenizer import Tokenizer
from tests.evaluation.test_core import write_bundle
from tests.main_job import records, tiny_settings, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def arguments(tmp_path: Path, corpus: Path, *flags: str, **overrides: dict) -> list[str]:
    config = tmp_path / "settings.json"
    config.write_text(json.dumps(tiny_settings(corpus, **overrides)))
    return ["--config", str(config), "--run-dir", str(tmp_path / "run"), *flags]


def test_it_learns_switches_samples_and_says_so(tmp_path, corpus, capsys) -> None:
    assert main(arguments(tmp_path, corpus, "--eval-every", "20")) == 0
    run, output = tmp_path / "run", capsys.readouterr().out
    bpb = [r["val/bpb"] for r in records(run, "eval")]
    assert len(bpb) == 3  # steps 0, 20, 40
    assert bpb[-1] < 0.85 * bpb[0]
    assert [r["step"] for r in records(run, "train")] == list(range(1, 41))
    switches = records(run, "switch")
    assert any(s["change"] == "to_lowrank" for s in switches)
    first = next(s for s in switches if s["change"] == "to_lowrank")
    assert f"{first['layer']} -> low-rank r={first['r_new']}: {first['reason']}" in output
    shares = [v for r in records(run, "svd") for k, v in r.items() if k.endswith("/principal_alignment")]
    assert shares
    assert all(0 <= share <= 1 for share in shares)
    assert records(run, "sample")[-1]["text"]
    assert records(run, "end")[-1]["reason"] == "finished"
    for words in ("val bpb", "switches", "sample", "run directory", "next"):
        assert words in output
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", "tokenizer.json", "checkpoints"}
    assert Tokenizer.load(run / "tokenizer.json").vocab_size > 256
    assert (tmp_path / "latest").resolve() == run


def test_the_checkpoint_is_plain_merged_weights(tmp_path, corpus) -> None:
    from safetensors.torch import load_file

    from svdtrain.model import GPT, GPTConfig

    assert main(arguments(tmp_path, corpus)) == 0
    weights = load_file(tmp_path / "run" / "checkpoints" / "step_000040" / "model.safetensors")
    vocab_size = json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vocab_size"]
    model = GPT(GPTConfig.from_depth(2, vocab_size=vocab_size, sequence_len=64))
    model.load_state_dict(weights)  # same names, nothing more and nothing less


@pytest.mark.parametrize(
    "svd", [{"svd_adapter": "shadow"}, {"svd_protect": "core"}, {"svd_adapter": "shadow", "svd_match_rms": True}]
)
def test_low_rank_matrices_are_trained_and_counted_in_every_way(tmp_path, corpus, capsys, svd) -> None:
    """Shadow, whose B and A the optimizer does not have, ended the run at its first switch."""
    flags = arguments(tmp_path, corpus, svd={"svd_on_alarm": "none", **svd}, train={"num_iterations": 11})
    assert main(flags) == 0
    run = tmp_path / "run"
    last = {key: value for key, value in records(run, "svd")[-1].items() if key.endswith("/mode")}
    assert any(s["change"] == "to_lowrank" for s in records(run, "switch"))
    assert sum(last.values()) > 0
    assert f"{int(sum(last.values()))} matrices low-rank now" in capsys.readouterr().out


def test_shadow_clips_what_it_steps(tmp_path, corpus, monkeypatch) -> None:
    """B and A get their gradients from that of W as it was clipped: an update as small as the clipped gradient."""
    from svdtrain.adaptive import Shadow

    norms, step = [], Shadow.after_step

    def noted(self) -> None:
        for factors in self._lowrank.values():
            norms.append(float(factors.B.grad.norm() / (factors.A.detach().norm() * factors.W.grad.norm())))
        step(self)

    monkeypatch.setattr(Shadow, "after_step", noted)
    svd = {"svd_adapter": "shadow", "svd_on_alarm": "none"}
    flags = arguments(tmp_path, corpus, svd=svd, optim={"clip_grad_norm": 1e-3}, train={"num_iterations": 11})
    assert main(flags) == 0
    assert norms
    assert max(norms) <= 1  # ||G A^T|| <= ||G|| ||A||, of the same G


def test_svd_off_and_watch_only_never_switch_and_give_equal_losses(tmp_path, corpus) -> None:
    losses = []
    for name, svd in (("off", {"svd_preset": "off"}), ("watch", {"svd_switching": False})):
        (tmp_path / name).mkdir()
        assert main(arguments(tmp_path / name, corpus, svd=svd)) == 0
        run = tmp_path / name / "run"
        assert not records(run, "switch")
        losses.append([r["train/loss"] for r in records(run, "train")])
    assert losses[0] == losses[1]  # watching changes nothing, to the last bit


def test_debug_level_prints_counts_and_split_error(tmp_path, corpus, capsys) -> None:
    assert main(arguments(tmp_path, corpus, "--log-level", "debug", svd={"svd_rule": "original"})) == 0
    output = " ".join(capsys.readouterr().out.split())
    for words in ("trainable", "frozen", "total", "split error"):
        assert words in output


def test_two_runs_are_identical(tmp_path, corpus) -> None:
    losses = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert main(arguments(tmp_path / name, corpus)) == 0
        losses.append([r["train/loss"] for r in records(tmp_path / name / "run", "train")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cuda:7"], "--device"),
        (["--device", "tpu"], "--device"),
        (["--data", "/nowhere/text"], "/nowhere/text"),
        (["--total-batch-size", "300"], "--total-batch-size"),
        (["--svd-targets", "no_such_matrix"], "no_such_matrix"),
        (["--svd-targets", "["], "["),
        (["--core-bundle", "/nowhere/bundle"], "/nowhere/bundle"),
    ],
)
def test_what_the_user_must_change_is_one_line_and_exit_code_2(tmp_path, corpus, capsys, flags, words) -> None:
    assert main(arguments(tmp_path, corpus, *flags)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_core_is_scored_in_the_loop_and_at_the_end(tmp_path, corpus) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    assert main(arguments(tmp_path, corpus, "--core-bundle", str(bundle), "--core-every", "20")) == 0
    scored = [(r["step"], r["core_metric"]) for r in records(tmp_path / "run", "eval") if "core_metric" in r]
    assert [step for step, _ in scored] == [20, 40]
    assert all(math.isfinite(score) for _, score in scored)


def test_nan_loss_is_vetoed_recorded_and_stops_after_three(tmp_path, corpus, capsys, monkeypatch) -> None:
    from svdtrain.model import GPT

    forward, calls = GPT.forward, []

    def broken(self, idx, targets=None, **kwargs):
        loss = forward(self, idx, targets, **kwargs)
        if targets is not None and self.training:
            calls.append(1)
            if len(calls) > 20:  # two micro-batches a step: from step 11 on
                return loss * math.nan
        return loss

    monkeypatch.setattr(GPT, "forward", broken)
    assert main(arguments(tmp_path, corpus, "--save-every", "10")) == 1
    run = tmp_path / "run"
    alerts = [r for r in records(run, "alert") if r["rule"] == "non_finite"]
    assert [r["level"] for r in alerts] == ["CRITICAL"] * 3
    assert len(records(run, "train")) == 10  # no untaken step is logged as a taken one
    assert "non-finite" in records(run, "end")[-1]["reason"]
    assert "last good checkpoint: " in capsys.readouterr().out.replace("\n", "")
    assert (run / "checkpoints" / "latest").read_text() == "step_000010\n"


def test_full_disk_while_saving_loses_nothing(tmp_path, corpus, capsys, monkeypatch) -> None:
    from svdtrain.trainer import checkpoint

    real, calls = checkpoint._write_torch, []

    def full(value, path) -> None:
        calls.append(path)
        if "step_000020" in str(path):
            raise OSError(28, "No space left on device")
        real(value, path)

    monkeypatch.setattr(checkpoint, "_write_torch", full)
    assert main(arguments(tmp_path, corpus, "--save-every", "10")) == 0  # the run goes on, later saves succeed
    run = tmp_path / "run"
    assert [r["rule"] for r in records(run, "alert")].count("checkpoint_failed") == 1
    assert (run / "checkpoints" / "latest").read_text() == "step_000040\n"


def test_prepare_only_fills_the_cache_and_makes_no_run(tmp_path, corpus, capsys) -> None:
    cache = {"cache_dir": str(tmp_path / "cache")}
    assert main([*arguments(tmp_path, corpus, data={"data": str(corpus), **cache}), "--prepare-only"]) == 0
    assert f"training tokens in {tmp_path / 'cache'}" in capsys.readouterr().out.replace("\n", "")
    assert list((tmp_path / "cache" / "tokens").glob("*/train_00000.bin"))
    assert not (tmp_path / "run").exists()


def test_resume_goes_on_and_refuses_other_settings(tmp_path, corpus, capsys) -> None:
    flags = arguments(tmp_path, corpus, "--save-every", "20")
    assert main([*flags, "--num-iterations", "20"]) == 0
    assert main([*flags, "--num-iterations", "40"]) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main([*flags, "--num-iterations", "40", "--resume", "auto", "--seed", "7"]) == 2
    assert "--seed" in capsys.readouterr().err
    assert main([*flags, "--num-iterations", "40", "--resume", "auto"]) == 0
    assert "goes on with other settings: --num-iterations 20 -> 40\n" in capsys.readouterr().out
    steps = [r["step"] for r in records(tmp_path / "run", "train")]
    assert steps == list(range(1, 41))
    assert records(tmp_path / "run", "resume")[0]["step"] == 20
