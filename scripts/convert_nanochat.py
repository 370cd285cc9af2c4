"""Convert checkpoints and tokenizers between svdtrain and nanochat.

    python scripts/convert_nanochat.py to-nanochat runs/d4-... --tag d4 [--tokenizer FILE.json] [--step 500]
    python scripts/convert_nanochat.py from-nanochat d4 --out runs/from-nanochat [--step 500]

nanochat's files lie in NANOCHAT_BASE_DIR (default ~/.cache/nanochat). The parquet shards there need no conversion:
`svdtrain --data ~/.cache/nanochat/base_data_climbmix`; the last shard is validation in both programs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochat_patch import weights
from svdtrain.data.errors import DataError
from svdtrain.data.tokenizer import Tokenizer
from svdtrain.runlog import RunDirectory


def base_dir() -> Path:
    """Where nanochat keeps its files."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()


def to_nanochat(arguments: argparse.Namespace) -> None:
    """Our run -> base_checkpoints/<tag>, and its tokenizer, of which nanochat has one for all its models."""
    run = Path(arguments.run)
    own = RunDirectory(run, writable=False).tokenizer_path
    given = arguments.tokenizer or (own if own.exists() else None)
    tokenizer = Tokenizer.load(given) if given else None
    read = weights.read_run(run, arguments.step, tokenizer)
    directory, checkpoints = base_dir() / "tokenizer", base_dir() / "base_checkpoints" / arguments.tag
    if any(checkpoints.glob("model_*.pt")):
        raise weights.ConversionError(f"{checkpoints} holds a model already; choose another --tag")
    if tokenizer is not None and not arguments.replace_tokenizer and not _may_write(tokenizer, directory):
        raise weights.ConversionError(f"{directory} is another tokenizer; add --replace-tokenizer to write over it")
    print(weights.write_nanochat(read, checkpoints))
    if tokenizer is None:
        print("no --tokenizer: nanochat will use the one that is in its base directory", file=sys.stderr)
        return
    weights.write_nanochat_tokenizer(tokenizer, directory)
    print(directory)


def _may_write(tokenizer: Tokenizer, directory: Path) -> bool:
    """Whether there is none yet, or the same one."""
    if not (directory / "tokenizer.pkl").exists():
        return not directory.exists()
    return weights.read_nanochat_tokenizer(directory).fingerprint() == tokenizer.fingerprint()


def from_nanochat(arguments: argparse.Namespace) -> None:
    """base_checkpoints/<tag> -> a run directory, with the tokenizer as tokenizer.json."""
    read = weights.read_nanochat(base_dir() / "base_checkpoints" / arguments.tag, arguments.step)
    out = Path(arguments.out)
    if (out / "config.json").exists():
        raise weights.ConversionError(f"{out} holds a run already; choose another --out")
    print(weights.write_run(read, out))
    if (base_dir() / "tokenizer" / "tokenizer.pkl").exists():
        path = RunDirectory(out, writable=False).tokenizer_path
        weights.read_nanochat_tokenizer(base_dir() / "tokenizer").save(path)
        print(path)


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    there = commands.add_parser("to-nanochat")
    there.add_argument("run", help="run directory of svdtrain")
    there.add_argument("--tag", required=True, help="model tag in nanochat, such as d4")
    there.add_argument("--tokenizer", help="our tokenizer file; default: the run's own")
    there.add_argument("--replace-tokenizer", action="store_true", help="write over the tokenizer in nanochat's base")
    there.add_argument("--step", type=int, help="default: the newest")
    there.set_defaults(function=to_nanochat)
    back = commands.add_parser("from-nanochat")
    back.add_argument("tag", help="model tag in nanochat, such as d4")
    back.add_argument("--out", required=True, help="run directory to write")
    back.add_argument("--step", type=int, help="default: the newest")
    back.set_defaults(function=from_nanochat)
    return parser.parse_args()


def main() -> int:
    """Entry point."""
    arguments = parse()
    try:
        arguments.function(arguments)
    except (weights.ConversionError, DataError, FileNotFoundError) as error:
        print(f"convert_nanochat: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
