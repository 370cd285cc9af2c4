"""Against the real nanochat: its programs load what a switched run saved, weights go both ways, CORE agrees."""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from real_nanochat import SWITCHED_STEPS, TAG, VOCAB_SIZE, Nanochat

from nanochat_patch import weights
from svdtrain.data.corpus import open_corpus
from svdtrain.evaluation import CoreBundle, evaluate_core
from svdtrain.model import GPT, GPTConfig

pytestmark = pytest.mark.slow

LOGITS = """
import sys, torch
from nanochat.checkpoint_manager import load_model
answers = {}
for tag in sys.argv[3:]:
    model, tokenizer, _ = load_model("base", torch.device("cpu"), phase="eval", model_tag=tag)
    with torch.no_grad():
        answers[tag] = model(torch.load(sys.argv[1], weights_only=True))
torch.save(answers, sys.argv[2])
"""


def our_model(nanochat: Nanochat) -> GPT:
    """Weights large enough to show everywhere."""
    variant = "2026" if nanochat.year == "2026" else "2025"
    config = GPTConfig.from_depth(2, vocab_size=VOCAB_SIZE, sequence_len=64, variant=variant)
    model = GPT(config)
    torch.manual_seed(3)
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def test_same_logits_both_ways(switched: tuple[Nanochat, Path], tmp_path: Path) -> None:
    nanochat, _ = switched
    ours = our_model(nanochat)
    there = weights.Weights(config=ours.config, step=7, tensors=ours.state_dict())
    weights.write_nanochat(there, nanochat.checkpoint("ours"))
    tokens = torch.randint(0, VOCAB_SIZE, (2, 60), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp_path / "tokens.pt")
    nanochat.run("-c", LOGITS, tmp_path / "tokens.pt", tmp_path / "logits.pt", TAG, "ours")
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        assert theirs["ours"].std() > 0.1
        torch.testing.assert_close(ours(tokens), theirs["ours"], atol=1e-5, rtol=1e-5)
        read = weights.read_nanochat(nanochat.checkpoint(TAG))
        assert read.step == SWITCHED_STEPS
        torch.testing.assert_close(read.model()(tokens), theirs[TAG], atol=1e-5, rtol=1e-5)
        weights.write_run(read, tmp_path / "run")
        again = weights.read_run(tmp_path / "run")
        assert again.config == read.config
        torch.testing.assert_close(again.model()(tokens), theirs[TAG], atol=1e-5, rtol=1e-5)


def test_tokenizer_and_text_are_read(nanochat: Nanochat, tmp_path: Path) -> None:
    tokenizer = weights.read_nanochat_tokenizer(nanochat.base / "tokenizer")
    text = pq.read_table(nanochat.base / "base_data" / "shard_00000.parquet").column("text")[3].as_py()
    weights.write_nanochat_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "text").write_text(text)
    script = (
        "import sys, json; from nanochat.tokenizer import RustBPETokenizer as T\n"
        "text = open(sys.argv[3]).read()\n"
        "print(json.dumps([T.from_directory(d).encode(text, prepend='<|bos|>') for d in sys.argv[1:3]]))"
    )
    printed = nanochat.run("-c", script, nanochat.base / "tokenizer", tmp_path / "tokenizer", tmp_path / "text")
    theirs, rewritten = json.loads(printed.splitlines()[-1])
    assert [tokenizer.bos_id, *tokenizer.encode(text)] == theirs == rewritten
    corpus = open_corpus(str(nanochat.base / "base_data"))
    assert list(corpus.documents("train"))[3] == text
    assert len(list(corpus.documents("val"))) == 40


def test_core_is_the_same_as_nanochats_own(switched: tuple[Nanochat, Path], bundle: Path) -> None:
    nanochat, _ = switched
    flags = [f"--model-tag={TAG}", "--eval=core,bpb,sample", "--split-tokens=256", "--device-batch-size=2"]
    nanochat.alone("base_eval", *(flags if nanochat.year == "2026" else []), "--max-per-task=25")
    with open(nanochat.base / "base_eval" / f"base_model_{SWITCHED_STEPS:06d}.csv") as file:
        rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in csv.reader(file)}
    tokenizer = weights.read_nanochat_tokenizer(nanochat.base / "tokenizer")
    model = weights.read_nanochat(nanochat.checkpoint(TAG)).model()
    result = evaluate_core(model, tokenizer, CoreBundle.read(bundle, 25), device=torch.device("cpu"))
    assert 0 < result.accuracy["chosen"] < 1
    assert 0 < result.accuracy["schema"] < 1
    for label in ("chosen", "schema", "said"):
        assert rows[label] == [f"{result.accuracy[label]:.6f}", f"{result.centered[label]:.6f}"]
    assert rows["CORE"][-1] == f"{result.core:.6f}"


def test_its_chat_answers(switched: tuple[Nanochat, Path]) -> None:
    nanochat, _ = switched
    printed = nanochat.alone("chat_cli", "-i", "base", "-g", TAG, "-p", "The", "--device-type", "cpu")
    assert len(printed.split("Assistant:")[-1].strip()) > 20
