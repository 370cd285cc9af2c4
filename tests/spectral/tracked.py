"""Small matrices that drift, and trackers for them."""

import torch

from svdtrain.spectral.settings import TrackerSettings
from svdtrain.spectral.tracking import SubspaceTracker
from tests.spectral.reference import gaussian
from tests.spectral.test_subspace import trained

torch.set_num_threads(1)
SIZE = 96
SHAPES = {"q": (SIZE, SIZE), "k": (SIZE, SIZE), "fc": (2 * SIZE, SIZE), "proj": (SIZE, 2 * SIZE)}


def make_weights() -> dict[str, torch.Tensor]:
    return {name: trained(10 * i, *shape).float() for i, (name, shape) in enumerate(SHAPES.items())}


def gradients(seed: int) -> dict[str, torch.Tensor]:
    return {name: gaussian(*shape, seed=seed * 10 + i).float() for i, (name, shape) in enumerate(SHAPES.items())}


def moved(weights: dict[str, torch.Tensor], seed: int, size: float = 0.002) -> dict[str, torch.Tensor]:
    return {name: W + size * W.norm() / (g := gradients(seed)[name]).norm() * g for name, W in weights.items()}


def tracker_for(weights: dict[str, torch.Tensor], k: int = 12, **settings) -> SubspaceTracker:
    return SubspaceTracker(weights, dict.fromkeys(weights, k), TrackerSettings(**settings))


def run(tracker: SubspaceTracker, weights: dict[str, torch.Tensor], steps: range) -> dict[str, torch.Tensor]:
    for step in steps:
        weights = moved(weights, step)
        tracker.step(step, weights, gradients(step + 100))
    return weights
