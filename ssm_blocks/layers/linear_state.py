"""Shared by the mixers whose state is a vector per head: u -> h_t = A_t h_{t-1} + B u_t -> y = Re(C h) + D u."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_blocks.layers.base import Call, Inputs, RecurrentMixer
from ssm_blocks.layers.modules import Generator, Linear, complex_of, fill_normal, split_heads, wide
from ssm_blocks.mixer import State, register  # noqa: F401  (re-exported for the layers)


def as_complex(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter [..., 2] as complex numbers, of the precision of `dtype`."""
    return torch.view_as_complex(parameter.to(dtype))


class LinearStateMixer(RecurrentMixer):
    """num_heads: default one per 64 channels; state_size: n per head. learned_state: train h_0.

    A subclass implements `_states`: all states [B, T, H, n] from the inputs, h_0 and the form.
    """

    is_complex = False
    normed = True
    adamw_names = frozenset({"skip", "first_state"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None,
        state_size: int,
        conv_size: int,
        learned_state: bool,
        backend: str,
        extra_features: int = 0,
    ) -> None:
        heads, width = split_heads(dim, num_heads)
        if state_size < 1:
            raise ValueError(f"state_size is at least 1 per head, got {state_size}")
        super().__init__(
            dim,
            features=heads * width + extra_features,
            read_heads=(heads, width),
            conv_size=conv_size,
            backend=backend,
        )
        if not self.normed:
            self.norm = nn.Identity()
        self.num_heads, self.head_dim, self.state_size = heads, width, state_size
        parts = (2,) if self.is_complex else ()
        self.v_proj = Linear(dim, heads * width)
        self.B = nn.Parameter(torch.empty(heads, state_size, width, *parts))
        self.C = nn.Parameter(torch.empty(heads, width, state_size, *parts))
        self.skip = nn.Parameter(torch.empty(heads, width))
        self.first_state = nn.Parameter(torch.empty(heads, state_size, *parts)) if learned_state else None

    def init_weights(self, generator: Generator = None) -> None:
        super().init_weights(generator)
        fill_normal(self.B, self.head_dim**-0.5, generator)
        fill_normal(self.C, self.state_size**-0.5, generator)
        nn.init.ones_(self.skip)
        if self.first_state is not None:
            fill_normal(self.first_state, self.state_size**-0.5, generator)

    def map_flops_per_token(self) -> int:
        """See `RecurrentMixer`; B u and Re(C h) cost 2 per real number of B and C, whether complex or not."""
        return super().map_flops_per_token() + 2 * (self.B.numel() + self.C.numel() + self.skip.numel())

    def _number(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        return as_complex(parameter, dtype) if self.is_complex else parameter.to(dtype)

    def _first_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        shape = (batch, self.num_heads, self.state_size)
        if self.first_state is not None:
            return {"h": self._number(self.first_state.to(device), dtype).expand(shape)}
        return {"h": torch.zeros(shape, dtype=complex_of(dtype) if self.is_complex else dtype, device=device)}

    def _features(self, x: Tensor) -> Tensor:
        return self.v_proj(x)

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        u = features[..., : self.num_heads * self.head_dim].to(wide(x.dtype))
        return {"u": u.unflatten(-1, (self.num_heads, self.head_dim))}

    def _drive(self, u: Tensor, B: Tensor) -> Tensor:
        """B u_t: u [B, T, H, p], B [H, n, p] -> [B, T, H, n]."""
        return torch.einsum("hnp,bthp->bthn", B, u.to(B.dtype))

    def _states(self, inputs: Inputs, h: Tensor, call: Call) -> Tensor:
        """All states [B, T, H, n]."""
        raise NotImplementedError

    def _read(self, states: Tensor, u: Tensor) -> Tensor:
        """y [B, T, H, p]."""
        y = torch.einsum("hpn,bthn->bthp", self._number(self.C, u.dtype), states)
        return (y.real if y.is_complex() else y) + self.skip.to(u.dtype) * u

    def _recur(self, inputs: Inputs, state: State, call: Call) -> tuple[Tensor, State]:
        states = self._states(inputs, state["h"], call)
        return self._read(states, inputs["u"]), {"h": call.last(states)}
