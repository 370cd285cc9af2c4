"""LinOSS: forced harmonic oscillators x'' = -a x (- g x') + F, beside Oscillatory-DPLR (arXiv:2410.03943).

State (z, x) = (velocity, sqrt(a) times position) in energy coordinates, with s = dt sqrt(a):
    IM      z' = z - s x' + F,        x' = x + s z'      dissipative, norm (1 + s^2)^-1/2
    IMEX    z' = z - s x + F,         x' = x + s z'      symplectic, spectral radius 1 for s < 2
    damped  z' = z - s x - g z' + F,  x' = x + s z'      spectral radius < 1 for g > 0, s < 2
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_blocks.layers.base import Call, Inputs
from ssm_blocks.layers.linear_state import LinearStateMixer
from ssm_blocks.layers.modules import Generator, bounded_exp, squash
from ssm_blocks.layers.poles import fill_dampings, fill_log_angles, fill_squashed_angles
from ssm_blocks.mixer import State, register
from ssm_blocks.ops.lti import lti_states

LARGEST_ANGLE = 1.99  # at 2 the explicit map has a double eigenvalue -1 and grows linearly


class LinOSS(LinearStateMixer):
    """state_size: oscillators per head (two numbers each). Options as in `LinearStateMixer`."""

    normed = False
    implicit = damped = False
    adamw_names = frozenset({"skip", "frequency", "damping"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        state_size: int = 64,
        conv_size: int = 4,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            num_heads=num_heads,
            state_size=state_size,
            conv_size=conv_size,
            learned_state=False,
            backend=backend,
        )
        self.frequency = nn.Parameter(torch.empty(self.num_heads, state_size))
        self.damping = nn.Parameter(torch.empty(self.num_heads, state_size)) if self.damped else None
        self.init_weights()

    def init_weights(self, generator: Generator = None) -> None:
        """Angles and damping as in `poles`."""
        super().init_weights(generator)
        if self.implicit:
            fill_log_angles(self.frequency, generator)
        else:
            fill_squashed_angles(self.frequency, LARGEST_ANGLE, generator)
        if self.damping is not None:
            fill_dampings(self.damping, generator)

    def _first_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        return {"h": torch.zeros(batch, self.num_heads, self.state_size, 2, dtype=dtype, device=device)}

    def recurrence_flops_per_token(self) -> int:
        """Per oscillator: z = S (z - s x + F), x = x + s z."""
        return 6 * self.num_heads * self.state_size

    def coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(s, S) [H, n]: the angle s, positive, below 2 where explicit; S = 1 / (1 + what is implicit)."""
        raw = self.frequency.to(dtype)
        s = bounded_exp(raw) if self.implicit else squash(raw, 0.0, LARGEST_ANGLE)
        if self.implicit:
            return s, 1 / (1 + s * s)
        if self.damping is not None:
            return s, 1 / (1 + nn.functional.softplus(self.damping.to(dtype)))
        return s, torch.ones_like(s)

    def transition(self, dtype: torch.dtype) -> Tensor:
        """The constant 2 x 2 maps of (z, x), [H, n, 2, 2]."""
        s, S = self.coefficients(dtype)
        lower = S if self.implicit else 1 - s * s * S
        return torch.stack([torch.stack([S, -s * S], -1), torch.stack([s * S, lower], -1)], -2)

    def _states(self, inputs: Inputs, h: Tensor, call: Call) -> Tensor:
        force = self._drive(inputs["u"], self.B.to(h.dtype))
        s, S = self.coefficients(h.dtype)
        if call.form != "parallel":
            return _integrate(force, h, s, S)
        kick = torch.stack([S * force, s * S * force], -1)
        flat = lti_states(self.transition(h.dtype).flatten(0, 1), kick.flatten(2, 3), h.flatten(1, 2))
        return flat.unflatten(2, (self.num_heads, self.state_size))

    def _read(self, states: Tensor, u: Tensor) -> Tensor:
        return super()._read(states[..., 1], u)


def _integrate(force: Tensor, h: Tensor, s: Tensor, S: Tensor) -> Tensor:
    """The equations of motion, one token after the other; states [B, T, H, n, 2]."""
    z, x = h.unbind(-1)
    states = []
    for t in range(force.size(1)):
        z = S * (z - s * x + force[:, t])  # implicit: x' = x + s z' put into z' = z - s x' + F and solved for z'
        x = x + s * z
        states.append(torch.stack([z, x], -1))
    return torch.stack(states, 1)


@register("linoss_im")
class LinOSSImplicit(LinOSS):
    """Implicit: forgets."""

    implicit = True


@register("linoss_imex")
class LinOSSImplicitExplicit(LinOSS):
    """Implicit-explicit: conserves energy."""


@register("linoss_damped")
class DampedLinOSS(LinOSS):
    """With learned damping (arXiv:2505.12171)."""

    damped = True
