"""Weights and tokenizers from nanochat's form to ours and back. Nothing is unpickled that could run code.

nanochat   DIR/model_000500.pt + meta_000500.json           tokenizer/tokenizer.pkl + token_bytes.pt
ours       RUN/checkpoints/step_000500/model.safetensors    tokenizer.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdtrain.config import ModelConfig
from svdtrain.data.tokenizer import Tokenizer
from svdtrain.model import GPT, GPTConfig
from svdtrain.runlog import atomic_write_text

_SHAPE_NAMES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_PARTS_OF_2026 = ("resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda")


class ConversionError(ValueError):
    """These weights cannot be converted; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's weights under names that both programs share."""

    config: GPTConfig
    step: int
    tensors: dict[str, Tensor]

    def model(self, compute_dtype: torch.dtype = torch.float32) -> GPT:
        """Our GPT with these weights, on the CPU, in evaluation mode."""
        model = GPT(self.config, compute_dtype=compute_dtype)
        model.load_state_dict({name: value.to(model.state_dict()[name].dtype) for name, value in self.tensors.items()})
        return model.eval()


def read_nanochat(checkpoint_dir: Path, step: int | None = None) -> Weights:
    """A checkpoint of nanochat; the newest without `step`. Raises ConversionError."""
    steps = sorted(int(path.stem.removeprefix("model_")) for path in checkpoint_dir.glob("model_*.pt"))
    step = _choose(steps, step, checkpoint_dir)
    meta = json.loads((checkpoint_dir / f"meta_{step:06d}.json").read_text())
    tensors = torch.load(checkpoint_dir / f"model_{step:06d}.pt", map_location="cpu", weights_only=True)
    tensors = {name.removeprefix("_orig_mod."): value for name, value in tensors.items()}
    given = meta["model_config"]
    config = GPTConfig(
        **{name: given[name] for name in _SHAPE_NAMES},
        window_pattern=given.get("window_pattern", "L"),
        variant=_variant(tensors),
    )
    return _checked(Weights(config=config, step=step, tensors=tensors), checkpoint_dir)


def write_nanochat(weights: Weights, checkpoint_dir: Path) -> Path:
    """model_*.pt and meta_*.json as nanochat reads them for evaluation, chat and fine-tuning."""
    config = {name: getattr(weights.config, name) for name in _SHAPE_NAMES}
    if weights.config.variant == "2026":
        config["window_pattern"] = weights.config.window_pattern
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    path = checkpoint_dir / f"model_{weights.step:06d}.pt"
    torch.save(weights.tensors, path)
    meta = {"step": weights.step, "val_bpb": None, "model_config": config, "user_config": {}}
    atomic_write_text(path.with_name(f"meta_{weights.step:06d}.json"), json.dumps(meta, indent=2) + "\n")
    return path


def read_run(run_dir: Path, step: int | None = None, tokenizer: Tokenizer | None = None) -> Weights:
    """A checkpoint of one of our runs; the newest without `step`. Raises ConversionError."""
    checkpoints = run_dir / "checkpoints"
    steps = sorted(int(path.parent.name[5:]) for path in checkpoints.glob("step_*/model.safetensors"))
    step = _choose(steps, step, checkpoints)
    directory = checkpoints / f"step_{step:06d}"
    _verify(directory)
    tensors = load_file(directory / "model.safetensors")
    config = _config_of_run(json.loads((run_dir / "config.json").read_text()), tensors, tokenizer)
    return _checked(Weights(config=config, step=step, tensors=tensors), directory)


def write_run(weights: Weights, run_dir: Path) -> Path:
    """A run directory with this one checkpoint: for evaluation and sampling. It holds no optimizer state to resume."""
    directory = run_dir / "checkpoints" / f"step_{weights.step:06d}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.safetensors"
    save_file({name: value.contiguous() for name, value in weights.tensors.items()}, path)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
    manifest = {"format": 1, "step": weights.step, "world_size": 1, "files": files}
    atomic_write_text(directory / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    atomic_write_text(run_dir / "config.json", json.dumps({"gpt": dataclasses.asdict(weights.config)}, indent=2) + "\n")
    return path


def read_nanochat_tokenizer(directory: Path) -> Tokenizer:
    """tokenizer.pkl as our Tokenizer. Only the plain numbers and texts of an encoding are read out of the pickle;
    anything else in it raises ConversionError."""
    try:
        with open(directory / "tokenizer.pkl", "rb") as file:
            state = _EncodingReader(file).load().state
        names = sorted(state["special_tokens"], key=state["special_tokens"].__getitem__)
        ranks = sorted(state["mergeable_ranks"], key=state["mergeable_ranks"].__getitem__)
        tokenizer = Tokenizer(ranks, pattern=state["pat_str"], special_tokens=tuple(names))
    except (pickle.UnpicklingError, AttributeError, EOFError, KeyError, TypeError) as error:
        raise ConversionError(f"{directory / 'tokenizer.pkl'} is no tokenizer of nanochat: {error}") from error
    if tokenizer.special_ids != state["special_tokens"]:
        raise ConversionError(f"{directory}: special tokens do not follow the others, which our tokenizer needs")
    return tokenizer


def write_nanochat_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.pkl and token_bytes.pt in NANOCHAT_BASE_DIR/tokenizer."""
    import tiktoken

    directory.mkdir(parents=True, exist_ok=True)
    encoding = tiktoken.Encoding(
        name="rustbpe",
        pat_str=tokenizer.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokenizer.ranks)},
        special_tokens=tokenizer.special_ids,
    )
    (directory / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    torch.save(tokenizer.token_bytes(), directory / "token_bytes.pt")


class _Encoding:
    """Stands in for tiktoken.Encoding while its pickle is read: keeps the state and builds nothing."""

    state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _EncodingReader(pickle.Unpickler):
    """An unpickler that knows no class but that of the encoding."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _choose(steps: list[int], step: int | None, where: Path) -> int:
    if not steps:
        raise ConversionError(f"no checkpoint in {where}")
    if step is not None and step not in steps:
        raise ConversionError(f"no checkpoint of step {step} in {where}; there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _variant(tensors: Mapping[str, Tensor]) -> Any:
    present = [name for name in _PARTS_OF_2026 if name in tensors]
    if present and len(present) < len(_PARTS_OF_2026):
        missing = sorted(set(_PARTS_OF_2026) - set(present))
        raise ConversionError(f"weights of a nanochat between the two known forms: {', '.join(missing)} missing")
    return "2026" if present else "2025"


def _checked(weights: Weights, where: Path) -> Weights:
    """The weights, if they fit the model exactly."""
    if any(".attn_mixer." in name for name in weights.tensors):
        raise ConversionError(f"{where} holds mixers in attention's place; only models of attention convert")
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in GPT(weights.config).state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.tensors.items()}
    if expected != found:
        name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise ConversionError(f"{where}: {name} should be {expected.get(name)}, it is {found.get(name)}")
    return weights


def _verify(directory: Path) -> None:
    """The model file against the manifest."""
    manifest = json.loads((directory / "manifest.json").read_text())
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    if manifest["files"]["model.safetensors"]["sha256"] != digest:
        raise ConversionError(f"{directory / 'model.safetensors'} is damaged (sha256 differs)")


def _config_of_run(saved: dict[str, Any], tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None) -> GPTConfig:
    if "gpt" in saved:
        return GPTConfig(**saved["gpt"])
    model = ModelConfig(**saved["model"])
    rows = tensors["transformer.wte.weight"].shape[0]
    vocab_size = tokenizer.vocab_size if tokenizer else (model.vocab_size or rows)
    config = GPTConfig.from_depth(
        model.depth,
        vocab_size=vocab_size,
        sequence_len=model.max_seq_len,
        variant=model.variant,
        window_pattern=model.window_pattern,
    )
    if config.padded_vocab_size != rows:
        raise ConversionError(f"the run's vocabulary is not {vocab_size} tokens: name its tokenizer with --tokenizer")
    return config
