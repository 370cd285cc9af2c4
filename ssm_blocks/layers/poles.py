"""Where the poles of a layer start: its first radii and angles per token, and the parameters that give them.

A radius near 1 remembers long; 1 / (1 - radius) tokens is the time constant. Angles are drawn log-uniformly, so that
every octave of periods gets as many poles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssm_blocks.layers.modules import Generator, fill_normal, fill_uniform

ANGLES = (0.05, 2.0)  # rad per token: periods of 3 to 126 tokens
RADIUS = 0.95  # of a decay that the input moves
RADIUS_SPREAD = 0.5  # standard deviation of a drawn radius, in the parameter of the sigmoid
DAMPING = 0.03  # zeta of an oscillator: the decay per radian


def logit(share: float) -> float:
    """The number whose sigmoid is `share`."""
    return math.log(share / (1 - share))


def fill_log_angles(weight: Tensor, generator: Generator = None) -> None:
    """For angle = exp(weight)."""
    fill_uniform(weight, *(math.log(angle) for angle in ANGLES), generator)


@torch.no_grad()
def fill_squashed_angles(weight: Tensor, largest: float, generator: Generator = None) -> None:
    """For angle = largest * sigmoid(weight), with `largest` not below the angles drawn or they end just under it."""
    fill_log_angles(weight, generator)
    share = (weight.exp() / largest).clamp(max=0.99)
    weight.copy_(torch.logit(share))


def fill_dampings(weight: Tensor, generator: Generator = None) -> None:
    """For zeta = sigmoid(weight)."""
    fill_normal(weight, RADIUS_SPREAD, generator, mean=logit(DAMPING))


def fill_radii(weight: Tensor, generator: Generator = None) -> None:
    """For radius = sigmoid(weight)."""
    fill_normal(weight, RADIUS_SPREAD, generator, mean=logit(RADIUS))
