"""CORE score of a finished model on nanochat's evaluation bundle.

python scripts/eval_core.py runs/d4-... --core-bundle ~/.cache/nanochat/eval_bundle --tokenizer FILE.json
python scripts/eval_core.py --nanochat-tag d12 --core-bundle ~/.cache/nanochat/eval_bundle --max-per-task 500
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochat_patch import weights
from svdtrain.data.errors import DataError
from svdtrain.data.tokenizer import Tokenizer
from svdtrain.evaluation import CoreBundle, CoreResult, evaluate_core
from svdtrain.model import hardware_dtype


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run directory of svdtrain")
    parser.add_argument("--nanochat-tag", help="a model of nanochat instead, such as d12")
    parser.add_argument("--core-bundle", required=True, help="directory with core.yaml, eval_meta_data.csv, eval_data/")
    parser.add_argument("--max-per-task", type=int, default=0, help="examples of each task; 0: all")
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--tokenizer", help="tokenizer file of the run; default: tokenizer.json in it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> tuple[weights.Weights, Tokenizer]:
    """Weights and tokenizer that the flags name."""
    if arguments.nanochat_tag:
        base = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
        directory = base / "base_checkpoints" / arguments.nanochat_tag
        return weights.read_nanochat(directory, arguments.step), weights.read_nanochat_tokenizer(base / "tokenizer")
    if not arguments.run:
        raise ValueError("name a run directory, or a model of nanochat with --nanochat-tag")
    run = Path(arguments.run)
    tokenizer = Tokenizer.load(arguments.tokenizer or run / "tokenizer.json")
    return weights.read_run(run, arguments.step, tokenizer), tokenizer


def show(result: CoreResult) -> None:
    """One line a task."""
    width = max(len(label) for label in result.accuracy)
    print(f"{'task':<{width}}  accuracy  centered")
    for label, accuracy in result.accuracy.items():
        print(f"{label:<{width}}  {accuracy:8.4f}  {result.centered[label]:8.4f}")
    print(f"{'CORE':<{width}}  {'':8}  {result.core:8.4f}")


def main() -> int:
    """Entry point."""
    arguments = parse()
    device = torch.device(arguments.device)
    dtypes = {"auto": hardware_dtype(device), "bf16": torch.bfloat16, "fp32": torch.float32}
    try:
        read, tokenizer = load(arguments)
        bundle = CoreBundle.read(Path(arguments.core_bundle).expanduser(), arguments.max_per_task)
    except (ValueError, DataError, FileNotFoundError) as error:
        print(f"eval_core: error: {error}", file=sys.stderr)
        return 2
    show(evaluate_core(read.model(dtypes[arguments.dtype]).to(device), tokenizer, bundle, device=device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
