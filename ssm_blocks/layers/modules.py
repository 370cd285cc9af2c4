"""The parts all mixers share: linear maps, gates, the short convolution, and how weights are drawn."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Generator = torch.Generator | None
LARGEST_EXPONENT = 20.0


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x) within [e^-20, e^20]: a wild parameter must not turn into infinity."""
    return x.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()


def squash(x: Tensor, low: float, high: float) -> Tensor:
    """A sigmoid between low and high, both included where it saturates."""
    return low + (high - low) * torch.sigmoid(x)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that states, gates and triangular solves have: float32, or float64 when the input is."""
    return torch.promote_types(dtype, torch.float32)


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex type of a real one's precision; `dtype.to_complex` would break a compiled graph."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


@torch.no_grad()
def fill_uniform(weight: Tensor, low: float, high: float, generator: Generator = None) -> None:
    """Uniform in place; drawn in float32 so that a seed gives the same numbers in every type."""
    weight.copy_(torch.empty_like(weight, dtype=torch.float32).uniform_(low, high, generator=generator))


@torch.no_grad()
def fill_normal(weight: Tensor, std: float, generator: Generator = None, mean: float = 0.0) -> None:
    """Normal in place."""
    weight.copy_(torch.empty_like(weight, dtype=torch.float32).normal_(mean, std, generator=generator))


class Linear(nn.Linear):
    """Bias-free; the weight keeps its own type and is cast to the input's type where it is used."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))

    def init_weights(self, generator: Generator = None) -> None:
        bound = (3 / self.in_features) ** 0.5  # uniform on +-bound has standard deviation in_features^-1/2
        fill_uniform(self.weight, -bound, bound, generator)


class Gate(nn.Module):
    """Affine map for what steers the recurrence; computed in at least float32, trained by AdamW without decay.

    The weight is drawn small (standard deviation `gain` / sqrt(in)), so that the bias decides at first.
    """

    adamw_names = frozenset({"weight", "bias"})

    def __init__(self, in_features: int, out_features: int, bias: float = 0.0, gain: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.first_bias, self.gain = bias, gain

    def forward(self, input: Tensor) -> Tensor:
        dtype = wide(input.dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

    def init_weights(self, generator: Generator = None) -> None:
        fill_normal(self.weight, self.gain / self.weight.size(1) ** 0.5, generator)
        nn.init.constant_(self.bias, self.first_bias)


class DecayGate(Gate):
    """Log decay -exp(A) softplus(W x + b) <= 0 per output, in Mamba-2's form (arXiv:2405.21060)."""

    adamw_names = frozenset({"weight", "bias", "log_rate"})

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.log_rate = nn.Parameter(torch.empty(out_features))

    def forward(self, input: Tensor) -> Tensor:
        raw = super().forward(input)
        return -bounded_exp(self.log_rate.to(raw.dtype)) * F.softplus(raw)

    def init_weights(self, generator: Generator = None) -> None:
        """Rates uniform in [1, 16], steps log-uniform in [.001, .1]."""
        super().init_weights(generator)
        fill_uniform(self.log_rate, 1.0, 16.0, generator)
        fill_uniform(self.bias, math.log(1e-3), math.log(1e-1), generator)
        with torch.no_grad():
            self.log_rate.log_()
            self.bias.copy_(torch.log(torch.expm1(self.bias.exp())))  # inverse of softplus


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over `size` tokens, then SiLU; its state is the last size - 1 inputs.

    size 0 leaves the input as it is (and keeps an empty state).
    """

    adamw_names = frozenset({"weight"})

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"conv_size is 0 (none) or the number of tokens, got {size}")
        self.size, self.channels = size, channels
        self.weight = nn.Parameter(torch.empty(channels, size)) if size else None

    @property
    def history(self) -> int:
        """Tokens in the state."""
        return max(self.size - 1, 0)

    def forward(self, x: Tensor, state: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, C], state [B, history, C] -> (y [B, T, C], inputs of the last `history` tokens)."""
        if self.weight is None:
            return x, state
        extended = torch.cat([state.to(x.dtype), x], 1)
        taps = self.weight.to(x.dtype).unsqueeze(1)
        y = F.conv1d(extended.mT, taps, groups=self.channels).mT
        return F.silu(y), self._last(extended, lengths).to(state.dtype)

    def _last(self, extended: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            return extended[:, extended.size(1) - self.history :]
        place = lengths.unsqueeze(1) + torch.arange(self.history, device=extended.device)
        return extended.gather(1, place.unsqueeze(-1).expand(-1, -1, self.channels))

    def init_weights(self, generator: Generator = None) -> None:
        if self.weight is not None:
            fill_uniform(self.weight, -(self.size**-0.5), self.size**-0.5, generator)


class HeadNorm(nn.Module):
    """Root-mean-square norm of each head's output, with a gain, in at least float32."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)

    def init_weights(self, generator: Generator = None) -> None:
        nn.init.ones_(self.weight)


def split_heads(dim: int, num_heads: int | None) -> tuple[int, int]:
    """(heads, width of a head); by default heads of 64. Raises ValueError where the width does not split."""
    counts = (dim,) if num_heads is None else (dim, num_heads)
    if not all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts):
        raise ValueError(f"width and num_heads are whole numbers of at least 1, got {dim!r} and {num_heads!r}")
    heads = max(1, dim // 64) if num_heads is None else num_heads
    if dim % heads:
        raise ValueError(f"width {dim} does not split into {heads} heads; give num_heads that divides it")
    return heads, dim // heads
