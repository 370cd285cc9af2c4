"""CIFAR-10 as sequences of 1,024 RGB pixels (Krizhevsky 2009), from parquet files, `datasets` or torchvision."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PIXELS, CHANNELS, CLASSES = 32 * 32, 3, 10
SOURCE = "SSM_CIFAR10"  # environment: where the images are; `--data` sets it


class Images(NamedTuple):
    """pixels uint8 [N, 1024, 3], row by row; labels int64 [N]."""

    pixels: Tensor
    labels: Tensor


def cifar10(split: str, source: str | None = None) -> Images:
    """The images of `split`, train or test, in the order of the files.

    source: a directory with train*.parquet and test*.parquet (columns `img`, encoded, and `label`), `datasets`, or
    `torchvision:DIR`; default: the environment's SSM_CIFAR10. Decoded images are kept in the cache directory
    ($SVDTRAIN_CACHE or ~/.cache/svdtrain). Raises ValueError where there are none.
    """
    source = os.environ.get(SOURCE, "") if source is None else source
    _check_given(source)
    if source == "datasets":
        from datasets import load_dataset

        return _decoded((row["img"], row["label"]) for row in load_dataset("uoft-cs/cifar10", split=split))  # type: ignore[index]
    if source.startswith("torchvision"):
        from torchvision.datasets import CIFAR10  # type: ignore[import-not-found]

        found = CIFAR10(source.partition(":")[2] or "data", train=split == "train", download=True)
        return Images(torch.from_numpy(found.data).view(-1, PIXELS, CHANNELS), torch.tensor(found.targets))
    return _from_parquet(_files(source, split))


def check_source(source: str) -> None:
    """Whether there are images where `cifar10` will look, before anything slow. Raises ValueError if not."""
    _check_given(source)
    package = source.partition(":")[0]
    if package in ("datasets", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--data {source}: the package {package} is not installed")
        return
    for split in ("train", "test"):
        _files(source, split)


def _check_given(source: str) -> None:
    if not source:
        raise ValueError("sCIFAR needs its images: --data DIR (parquet), --data datasets or --data torchvision:DIR")


def _files(source: str, split: str) -> list[Path]:
    found = sorted(Path(source).glob(f"{split}*.parquet"))
    if not found:
        raise ValueError(f"--data {source}: no {split}*.parquet there; expected columns img and label")
    return found


def made_up(split: str, count: int) -> Images:
    """Noise around a colour per class: what a quick run uses in place of the images."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.arange(count) % CLASSES
    colours = torch.randint(60, 200, (CLASSES, 1, CHANNELS), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(-50, 50, (count, PIXELS, CHANNELS), generator=generator)
    return Images((colours[labels] + noise).to(torch.uint8), labels)


def _from_parquet(files: list[Path]) -> Images:
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    cached = cache_directory() / f"cifar10-{hashlib.sha256(repr(state).encode()).hexdigest()[:12]}.pt"
    if cached.exists():
        return Images(*torch.load(cached, weights_only=True))
    images = _decoded(_rows(files))
    save_atomically(list(images), cached)
    return images


def _rows(files: list[Path]) -> Iterable[tuple[Any, int]]:
    import pyarrow.parquet as parquet

    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(1000, columns=["img", "label"]):
            for row in batch.to_pylist():
                yield row["img"]["bytes"] if isinstance(row["img"], dict) else row["img"], row["label"]


def _decoded(rows: Iterable[tuple[Any, int]]) -> Images:
    """rows: (encoded bytes or a PIL image, label)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("decoding the images needs Pillow: pip install pillow") from error
    pixels, labels = [], []
    for image, label in rows:
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        pixels.append(torch.frombuffer(bytearray(opened.convert("RGB").tobytes()), dtype=torch.uint8))
        labels.append(label)
    return Images(torch.stack(pixels).view(-1, PIXELS, CHANNELS), torch.tensor(labels))


def cache_directory() -> Path:
    """Where decoded images and shared first phases are kept."""
    return Path(os.environ.get("SVDTRAIN_CACHE") or Path.home() / ".cache" / "svdtrain")


def save_atomically(value: Any, path: Path) -> None:
    """torch.save to `path` so that a reader finds all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(value, file)
    os.replace(file.name, path)
