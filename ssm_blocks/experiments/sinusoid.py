"""004: does an oscillatory layer produce damped oscillations from their parameters?

The mixer is linear and time-invariant with few fixed poles, so what it has to find is a basis of modes for a whole
band of frequencies, and the layer before it the coefficients in that basis.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_blocks.experiments.delay import per_seed
from ssm_blocks.experiments.experiment import Arm, Column, Criterion, Experiment, Row, criterion, values_of
from ssm_blocks.experiments.token_experiment import number
from ssm_blocks.experiments.training import Training, train
from ssm_blocks.layers.modules import fill_normal
from ssm_blocks.layers.poles import RADIUS_SPREAD, logit
from ssm_blocks.mixer import build
from ssm_blocks.tasks.oscillation import FREQUENCIES, INPUTS, Oscillations

MIXERS = ("oscillatory_dplr", "oscillatory_diagonal", "linoss_im", "linoss_imex", "linoss_damped")
SIZES = {128: {"width": 64, "state_size": 64}, 512: {"width": 128, "state_size": 128}}
BOUNDS = {128: (1e-3, 0.01), 512: (1e-2, 0.05)}  # of the error, and of the error as a share of the variance
FIRST_DAMPING = 0.01  # of the modes: what the task's oscillations have
POLES = ("log_frequency", "frequency", "damping", "P", "X", "K")
"""Learn slowly: after 512 tokens, a change of .001 in a frequency is half a radian."""
TOLD, UNTOLD = "T = {}: the impulse carries the parameters", "The ill-posed task: every impulse is the same"


class SinusoidModel(nn.Module):
    """x [B, T, 5] -> y [B, T]: a gated map of the first token, one mixer, a linear readout. No norms: size matters.

    The map sees the frequency through cosines and sines, as resolution over T tokens needs. Later tokens are zero, so
    all that goes on then is the mixer's state.
    """

    angles: Tensor

    def __init__(self, length: int, *, mixer: str, width: int, state_size: int) -> None:
        super().__init__()
        fastest = (FREQUENCIES[1] - FREQUENCIES[0]) / 2 * length
        self.register_buffer("angles", torch.linspace(0, fastest, max(2, length // 4)))
        self.width = width
        self.hidden = nn.Linear(2 * len(self.angles) + 1, 4 * width)
        self.shape = nn.Linear(4 * width, 2 * width)
        self.direct = nn.Linear(2 * len(self.angles) + 1, 2 * width)
        self.size = nn.Linear(2, 2 * width)
        self.mixer = build(mixer, width, num_heads=1, state_size=state_size, conv_size=0)
        self.head = nn.Linear(width, 1, bias=False)
        damping = getattr(self.mixer, "damping", None)
        if damping is not None:
            fill_normal(damping, RADIUS_SPREAD, mean=logit(FIRST_DAMPING))

    def forward(self, x: Tensor) -> Tensor:
        impulse, frequency, damping, size = x[:, :1].split([1, 1, 1, INPUTS - 3], -1)
        angle = frequency * self.angles
        features = torch.cat([angle.cos(), angle.sin(), damping], -1)
        product = (self.direct(features) + self.shape(F.silu(self.hidden(features)))) * self.size(size)
        u = impulse * (product[..., : self.width] + product[..., self.width :])
        return self.head(self.mixer(F.pad(u, (0, 0, 0, x.size(1) - 1)))).squeeze(-1)


class Sinusoid(Experiment):
    """Scored by the mean squared error on new oscillations, and by its ratio to the target's variance."""

    name = "sinusoid"
    proposal = "004"
    question = "Does Oscillatory-DPLR produce oscillations it is told the parameters of, and does it take the coupling?"
    training = Training(steps=2000, batch=64, lr=5e-3, clip=1.0, solved_loss=1e-5)
    columns = (
        Column(title="MSE", value=lambda row: row["mse"], format=".2e"),
        Column(title="MSE / variance", value=lambda row: row["ratio"], format=".4f"),
        Column(title="variance", value=lambda row: row["variance"], format=".4f"),
        number("state", "state_size"),
        number("parameters", "parameters"),
        number("steps", "steps"),
        number("training seconds", "train_s"),
    )

    reasons: ClassVar = {
        f"T={length}: MSE without the coupling / with it": "no gain. A matrix with coupling is a diagonal one in the "
        "basis of its eigenvectors (numerically too: the kernels agree to rounding), so the coupling adds nothing "
        "that a layer can map, and ties poles together where a bank of independent oscillations asks for none of it."
        for length in SIZES
    }

    def arms(self) -> list[Arm]:
        told = [_arm(mixer, length, True, TOLD.format(length)) for length in SIZES for mixer in MIXERS]
        return told + [_arm(MIXERS[0], length, False, UNTOLD) for length in SIZES]

    def settings(self, quick: bool) -> dict[str, Any]:
        """Quick: a few steps at T = 16."""
        if quick:
            short = Training(steps=4, batch=4, warmup=2, cooldown=1, check_every=2)
            return {"training": asdict(short), "test_sequences": 8, "length": 16}
        return {"training": asdict(self.training), "test_sequences": 2048}

    def run(self, arm: Arm, seed: int, settings: dict[str, Any], device: torch.device) -> Row:
        length = settings.get("length", arm.config["length"])
        task = Oscillations(arm.config["told"])
        torch.manual_seed(seed)
        model = SinusoidModel(length, **arm.config["model"]).to(device)
        training = Training(**{**settings["training"], "lengths": (length,)})

        def batch_at(step: int, length: int) -> tuple[Tensor, Tensor]:
            return task.batch(seed, step, size=training.batch, length=length, device=device)

        report = train(model, batch_at, training, F.mse_loss, POLES)
        return {
            "steps": report.steps,
            "train_s": report.seconds,
            "ended": report.ended,
            "parameters": sum(p.numel() for p in model.parameters()),
            "state_size": model.mixer.state_numel(),
            **errors(model, task, settings["test_sequences"], length, seed, device),
        }

    def judge(self, rows: list[Row]) -> list[Criterion]:
        found = []
        for length, (error, share) in BOUNDS.items():
            arm = f"{MIXERS[0]}_{length}"
            found.append(criterion(f"T={length}: MSE", values_of(rows, arm, _of("mse")), below=error, format=".2e"))
            ratios = values_of(rows, arm, _of("ratio"))
            found.append(criterion(f"T={length}: MSE / variance", ratios, below=share, format=".4f"))
        for length in SIZES:
            name = f"T={length}: MSE without the coupling / with it"
            found.append(criterion(name, _gain(rows, length), above=1.0, format=".2f"))
        for length in SIZES:
            missing = values_of(rows, f"untold_{length}", lambda row: abs(row["ratio"] - 1))
            found.append(
                criterion(f"ill-posed, T={length}: MSE / variance, distance from 1", missing, below=0.02, format=".4f")
            )
        return found


@torch.no_grad()
def errors(
    model: nn.Module, task: Oscillations, count: int, length: int, seed: int, device: torch.device
) -> dict[str, float]:
    """Mean squared error over `count` new sequences, the targets' variance, and the ratio."""
    size = min(count, max(1, 65_536 // length))
    sums, seen = torch.zeros(3, dtype=torch.float64, device=device), 0
    while seen < count:
        x, y = task.batch(seed, seen, size=size, length=length, split="test", device=device)
        means = [(model(x) - y).square().mean(), y.square().mean(), y.mean()]
        sums += torch.stack(means).double() * size
        seen += size
    error, square, mean = (sums / seen).tolist()
    variance = square - mean**2
    return {"mse": error, "variance": variance, "ratio": error / variance}


def _arm(mixer: str, length: int, told: bool, group: str) -> Arm:
    model = {"mixer": mixer, **SIZES[length]}
    name = f"{mixer}_{length}" if told else f"untold_{length}"
    return Arm(name=name, group=group, config={"length": length, "told": told, "model": model})


def _gain(rows: list[Row], length: int) -> list[float]:
    with_it, without = (f"{mixer}_{length}" for mixer in MIXERS[:2])
    return per_seed(rows, without, with_it, lambda a, b: a["mse"] / b["mse"])


def _of(key: str) -> Any:
    return lambda row: row.get(key)


EXPERIMENT = Sinusoid()
