"""018: does it pay to share a budget of ranks among the layers by what their couplings do?

Four phases: train at one rank everywhere; score each layer's coupling; share the budget and truncate; train on. Arms
with the same start share their first phase, which is trained once and kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_blocks.experiments.experiment import Arm, Column, Criterion, Experiment, Row, criterion, rows_of, values_of
from ssm_blocks.experiments.token_experiment import number
from ssm_blocks.experiments.training import make_optimizer
from ssm_blocks.layers.adaptive_rank import (
    allocate_ranks,
    frobenius_score,
    logdet_score,
    reset_optimizer_state,
    truncate_layer,
)
from ssm_blocks.layers.oscillatory import OscillatoryDPLR
from ssm_blocks.mixer import build
from ssm_blocks.tasks.cifar import (
    CHANNELS,
    CLASSES,
    SOURCE,
    Images,
    cache_directory,
    check_source,
    cifar10,
    made_up,
    save_atomically,
)

LAYERS, STATE, WIDTH, LARGEST_RANK, BUDGET = 4, 32, 64, 8, 16
FULL = {
    "half_steps": 2000,
    "batch": 64,
    "lr": 4e-3,
    "warmup": 100,
    "weight_decay": 0.01,
    "dropout": 0.1,
    "made_up": 0,
}
RATIO = "max/min importance after phase 1"
OVER_FIXED = "adaptive(16) - fixed r=4, accuracy"
OVER_RANDOM = "adaptive(16) - random(16), accuracy"
QUICK = {**FULL, "half_steps": 2, "batch": 2, "warmup": 1, "made_up": 20}


class Block(nn.Module):
    """x + GLU(dropout(GELU(mixer(norm x))))."""

    def __init__(self, rank: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixer = build("adaptive_dplr", WIDTH, num_heads=1, state_size=STATE, rank=rank, conv_size=0)
        self.out = nn.Linear(WIDTH, 2 * WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.glu(self.out(self.dropout(F.gelu(self.mixer(self.norm(x))))), -1)


class PixelModel(nn.Module):
    """Pixels uint8 [B, 1024, 3] -> logits [B, 10]: four blocks, the mean over all tokens."""

    def __init__(self, rank: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.blocks = nn.ModuleList([Block(rank, dropout) for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed((pixels.float() / 255 - 0.5) / 0.25)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))

    @property
    def mixers(self) -> list[OscillatoryDPLR]:
        return [block.mixer for block in self.blocks]  # type: ignore[misc]


class Run(NamedTuple):
    """What is trained, and what with."""

    model: PixelModel
    optimizer: torch.optim.Optimizer
    images: Images
    settings: dict[str, Any]
    seed: int


class SequentialCIFAR(Experiment):
    """Real images, RGB, pixel by pixel; grayscale would be another benchmark."""

    name = "scifar"
    proposal = "018"
    question = "Do ranks shared by importance beat equal and random ranks, and what do they lose against full rank?"
    columns = (
        Column(title="test accuracy", value=lambda row: row["accuracy"], format=".4f", chance=lambda row: 1 / CLASSES),
        Column(title="after phase 1", value=lambda row: row["accuracy_half"], format=".4f"),
        Column(title="right after truncation", value=lambda row: row.get("accuracy_cut"), format=".4f"),
        Column(title="ranks of the layers, by seed", value=lambda row: " ".join(map(str, row["ranks"]))),
        Column(title="max/min log-det score", value=lambda row: ratio(row["logdet"]), format=".2f"),
        Column(title="the same before training", value=lambda row: at_the_start(row["seed"], _rank(row)), format=".2f"),
        Column(title="max/min Frobenius score", value=lambda row: ratio(row["frobenius"]), format=".2f"),
        number("parameters", "parameters"),
        number("training seconds", "train_s"),
    )

    reasons: ClassVar = {
        RATIO: "no layer's coupling stands out. Training makes all four larger and none much more so than the others: "
        "the ratio is what the random first weights have (the column beside it).",
        OVER_FIXED: "scores this even share the budget evenly, so the adaptive arm is fixed_4 with a detour over rank "
        "8. Nor is there anything to share out: fixed_8, the most that any share could keep, is no better than fixed_4 "
        "itself, and the seeds of one arm differ by more than the arms.",
        OVER_RANDOM: "as above, the ranks make no difference: shares as uneven as the random ones cost nothing.",
    }
    notes = (
        "Scores are taken at the end of phase 1, truncation follows, and phase 2 trains on at the ranks of the table.",
        f"{2 * FULL['half_steps']:,} steps of {FULL['batch']} images are few passes over 50,000: what ranks do to each "
        "other is asked here, not how far the layer gets. Published for a 200,000-parameter S4D, trained to the end: "
        "about .88 (arXiv:2206.11893).",
    )

    def arms(self) -> list[Arm]:
        return [
            Arm(name="fixed_8", config={"rank": LARGEST_RANK, "then": "keep"}),
            Arm(name="fixed_4", config={"rank": BUDGET // LAYERS, "then": "keep"}),
            Arm(name="adaptive_16", config={"rank": LARGEST_RANK, "then": "importance", "budget": BUDGET}),
            Arm(name="random_16", config={"rank": LARGEST_RANK, "then": "random", "budget": BUDGET}),
        ]

    def settings(self, quick: bool) -> dict[str, Any]:
        """Quick: two steps a phase on made-up images."""
        return QUICK if quick else FULL

    def check(self, settings: dict[str, Any]) -> None:
        if not settings["made_up"]:
            check_source(os.environ.get(SOURCE, ""))

    def run(self, arm: Arm, seed: int, settings: dict[str, Any], device: torch.device) -> Row:
        train, test = (load(split, settings, device) for split in ("train", "test"))
        torch.manual_seed(seed)
        model = PixelModel(arm.config["rank"], settings["dropout"]).to(device)
        run = Run(model, make_optimizer(model, settings["lr"], settings["weight_decay"]), train, settings, seed)
        first_s = first_phase(run, arm.config["rank"])
        row: Row = {"accuracy_half": accuracy(model, test), **scores(model)}
        if arm.config["then"] != "keep":
            cut(run, arm.config, row["logdet"])
            row["accuracy_cut"] = accuracy(model, test)
        second_s = train_steps(run, settings["half_steps"], 2 * settings["half_steps"])
        return {
            **row,
            "accuracy": accuracy(model, test),
            "ranks": [mixer.rank for mixer in model.mixers],
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_s": first_s + second_s,
        }

    def judge(self, rows: list[Row]) -> list[Criterion]:
        ratios = values_of(rows, "adaptive_16", lambda row: ratio(row["logdet"]))
        return [
            criterion(RATIO, ratios, above=2.0, format=".2f"),
            criterion("adaptive(16) / fixed r=8, accuracy", _paired(rows, "fixed_8", divide=True), above=0.95),
            criterion(OVER_FIXED, _paired(rows, "fixed_4"), above=0.01),
            criterion(OVER_RANDOM, _paired(rows, "random_16"), above=0.0),
        ]


# the phases -----------------------------------------------------------------------------------------------------------


def first_phase(run: Run, rank: int) -> float:
    """Train the first half, or take it over from a run that has; seconds that the training took."""
    if run.settings["made_up"]:
        return train_steps(run, 0, run.settings["half_steps"])
    path = cache_directory() / "scifar" / f"{_key(run, rank)}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            seconds = train_steps(run, 0, run.settings["half_steps"])
            kept = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "seconds": seconds}
            save_atomically(kept, path)
            return seconds
    kept = torch.load(path, weights_only=True, map_location=next(run.model.parameters()).device)
    run.model.load_state_dict(kept["model"])
    run.optimizer.load_state_dict(kept["optimizer"])
    return kept["seconds"]


def _key(run: Run, rank: int) -> str:
    """Changes with everything that the first phase depends on, this package's sources included."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    device = next(run.model.parameters()).device.type
    digest.update(json.dumps([run.settings, run.seed, rank, device, torch.__version__], sort_keys=True).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; another process that wants it waits."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def train_steps(run: Run, first: int, last: int) -> float:
    """Steps first..last of a schedule over both halves; returns the seconds they took."""
    model, settings = run.model, run.settings
    device = next(model.parameters()).device
    began, total = time.perf_counter(), 2 * settings["half_steps"]
    model.train()
    for step in range(first, last):
        rise = min(1.0, (step + 1) / settings["warmup"])
        lr = settings["lr"] * rise * 0.5 * (1 + math.cos(math.pi * step / total))
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        generator = torch.Generator(device).manual_seed(run.seed * 1_000_003 + step)
        chosen = torch.randint(len(run.images.labels), (settings["batch"],), generator=generator, device=device)
        loss = F.cross_entropy(model(run.images.pixels[chosen]), run.images.labels[chosen])
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def scores(model: PixelModel) -> dict[str, list[float]]:
    """Importance of each layer's coupling: by the exact log-determinant, and by the exact Frobenius norm."""
    return {
        "logdet": [logdet_score(mixer) for mixer in model.mixers],
        "frobenius": [frobenius_score(mixer) for mixer in model.mixers],
    }


def cut(run: Run, config: dict[str, Any], importance: list[float]) -> None:
    """Share the budget by importance, or at random, and truncate; only what is replaced loses its optimizer state."""
    if config["then"] == "random":
        draw = random.Random(run.seed)
        importance = [draw.random() for _ in importance]
    for mixer, rank in zip(run.model.mixers, allocate_ranks(importance, config["budget"], LARGEST_RANK), strict=True):
        reset_optimizer_state(run.optimizer, truncate_layer(mixer, rank))


@torch.no_grad()
def accuracy(model: PixelModel, images: Images, batch: int = 250) -> float:
    """Share of images whose class comes out on top."""
    model.eval()
    parts = zip(images.pixels.split(batch), images.labels.split(batch), strict=True)
    right = sum((model(pixels).argmax(-1) == labels).sum() for pixels, labels in parts)
    return float(right) / len(images.labels)


def load(split: str, settings: dict[str, Any], device: torch.device) -> Images:
    """Images on the device; made-up ones for a quick run."""
    images = made_up(split, settings["made_up"]) if settings["made_up"] else cifar10(split)
    return Images(*(x.to(device) for x in images))


# judging --------------------------------------------------------------------------------------------------------------


def ratio(importance: list[float]) -> float:
    """Largest over smallest."""
    return max(importance) / max(min(importance), 1e-12)


@lru_cache
def at_the_start(seed: int, rank: int) -> float:
    """`ratio` of the log-det scores of the weights that a run starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ratio(scores(PixelModel(rank, 0.0))["logdet"])


def _rank(row: Row) -> int:
    return row["config"]["rank"]


def _paired(rows: list[Row], other: str, *, divide: bool = False) -> list[float]:
    """Accuracy of adaptive_16 against another arm's of the same seed."""
    others = {row["seed"]: row["accuracy"] for row in rows_of(rows, other)}
    pairs = [(r["accuracy"], others[r["seed"]]) for r in rows_of(rows, "adaptive_16") if r["seed"] in others]
    return [a / b if divide else a - b for a, b in pairs]


EXPERIMENT = SequentialCIFAR()
