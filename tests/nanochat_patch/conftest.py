"""One thread, the helpers importable, and real checkouts ready to run."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from real_nanochat import (
    SWITCHED_STEPS,
    SWITCHING,
    TAG,
    VOCAB_SIZE,
    Nanochat,
    documents,
    make_bundle,
    real_checkout,
    write_shards,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=["2026", "2025"])
def nanochat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Nanochat:
    """A real checkout with text and a tokenizer trained by its own script."""
    path, base = real_checkout(request.param), tmp_path_factory.mktemp("base")
    texts = documents(240)
    write_shards(base / "base_data", texts[:200], texts[200:])
    checkout = Nanochat(request.param, path, base)
    names = ("vocab-size", "max-chars") if request.param == "2026" else ("vocab_size", "max_chars")
    checkout.alone("tok_train", f"--{names[0]}={VOCAB_SIZE}", f"--{names[1]}=200000")
    return checkout


@pytest.fixture(scope="session")
def bundle(nanochat: Nanochat) -> Path:
    """An evaluation bundle for CORE where this checkout looks for it."""
    return make_bundle(nanochat.base / "eval_bundle", documents(240)[200:])


@pytest.fixture(scope="session")
def switched(nanochat: Nanochat, tmp_path_factory: pytest.TempPathFactory) -> tuple[Nanochat, Path]:
    """A run of SWITCHED_STEPS in which matrices switch, saved under TAG; and its run directory."""
    run_dir = tmp_path_factory.mktemp("runs") / "switched"
    nanochat.train_patched(run_dir, SWITCHING, num_iterations=SWITCHED_STEPS, eval_every=SWITCHED_STEPS, model_tag=TAG)
    return nanochat, run_dir


@pytest.fixture
def same_batches(tmp_path: Path, nanochat: Nanochat) -> Nanochat:
    """nanochat resumes its data near where it was, not there: only text whose every batch is equal lets losses be
    compared. One long document, of which every row is the beginning."""
    if nanochat.year == "2025":
        pytest.skip("this nanochat saves, but its base_train cannot resume")
    base = tmp_path / "base"
    write_shards(base / "base_data", documents(1) * 200, documents(240)[200:])
    (base / "tokenizer").symlink_to(nanochat.base / "tokenizer")
    return Nanochat(nanochat.year, real_checkout(nanochat.year), base)
