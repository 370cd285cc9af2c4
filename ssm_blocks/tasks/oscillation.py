"""Damped oscillations to be produced from their parameters, and the ill-posed form of the task, which hides them.

y_t = A exp(-zeta w t) cos(w sqrt(1 - zeta^2) t + phase), t = 0, 1, ... (dt = 1). The input is an impulse at t = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssm_blocks.tasks.task import generator_for

FREQUENCIES = (0.1, 0.7)  # rad per token
DAMPINGS = (0.002, 0.02)
AMPLITUDES = (0.5, 1.5)
INPUTS = 5  # the impulse, frequency, damping, A cos(phase), A sin(phase)


class Oscillations:
    """told: the impulse carries the parameters; else it is the same for every sequence, and no model can do better
    than predict 0, the mean over phases.
    """

    def __init__(self, told: bool = True) -> None:
        self.told = told

    def batch(
        self, seed: int, step: int, *, size: int, length: int, split: str = "train", device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """(x [size, length, 5], zero after t = 0; y [size, length]), the same for the same arguments.

        Parameters are real numbers drawn anew for every sequence, so the splits share none.
        """
        draws = torch.rand(4, size, generator=generator_for(seed, step, split, device), device=device)
        w = _between(FREQUENCIES, draws[0])
        zeta = _between((math.log(DAMPINGS[0]), math.log(DAMPINGS[1])), draws[1]).exp()
        phase, amplitude = 2 * math.pi * draws[2], _between(AMPLITUDES, draws[3])
        x = torch.zeros(size, length, INPUTS, device=device)
        x[:, 0, 0] = 1
        if self.told:
            shape = [2 * draws[0] - 1, 2 * draws[1] - 1, amplitude * phase.cos(), amplitude * phase.sin()]
            x[:, 0, 1:] = torch.stack(shape, -1)
        return x, oscillation(w, zeta, phase, amplitude, length)


def oscillation(w: Tensor, zeta: Tensor, phase: Tensor, amplitude: Tensor, length: int) -> Tensor:
    """y [B, length] for parameters [B]."""
    w, zeta, phase, amplitude = (x.unsqueeze(-1) for x in (w, zeta, phase, amplitude))
    t = torch.arange(length, device=w.device)
    return amplitude * (-zeta * w * t).exp() * (w * (1 - zeta**2).sqrt() * t + phase).cos()


def _between(bounds: tuple[float, float], share: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * share
