"""What every mixer here has in common: checks, packing, the three forms, and the way from x to y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssm_blocks.layers.modules import Gate, Generator, HeadNorm, Linear, ShortConvolution, wide
from ssm_blocks.layers.packing import Packing
from ssm_blocks.mixer import Mixer, State

BACKENDS = ("auto", "torch", "fla", "triton", "reference")
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """How one pass is to be made. form: parallel, reference (token by token, by definition) or step (one token)."""

    form: str
    dtype: torch.dtype  # of the activations
    packing: Packing | None = None
    fresh: bool = False  # no state was given: where the first one is zero, its part can be left out
    keeps_state: bool = True  # the last state is wanted

    @property
    def lengths(self) -> Tensor | None:
        """Tokens per sequence, [N], where they differ."""
        return None if self.packing is None else self.packing.lengths

    def last(self, states: Tensor) -> Tensor:
        """State after each sequence's last token, from all states [B, T, ...]."""
        if self.packing is None:
            return states[:, -1]
        return states[torch.arange(states.size(0), device=states.device), self.packing.lengths - 1]


class RecurrentMixer(Mixer):
    """x -> projections -> short convolution -> recurrence -> norm -> output projection.

    A subclass says how wide the convolved features are and how many channels it reads out, and implements
    `_inputs`, `_recur` and `_state_shapes`. backend: auto (fla's kernels on CUDA in bf16 or fp16 where they exist, or
    our own in Triton, else torch), torch, fla, triton, or reference: the definition, token by token.
    """

    has_fla_kernel: ClassVar[bool] = False
    has_triton_kernel: ClassVar[bool] = False
    neutral: ClassVar[dict[str, float]] = {}
    """Inputs of the recurrence that switch a token off when they have this value: used behind a sequence's end."""

    def __init__(
        self,
        dim: int,
        *,
        features: int,
        read_heads: tuple[int, int],
        conv_size: int,
        backend: str,
    ) -> None:
        super().__init__(dim)
        if backend not in BACKENDS:
            raise ValueError(f"backend is one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend == "fla" and not self.has_fla_kernel:
            raise ValueError(f"fla has no kernel for {type(self).__name__}; use backend='auto' or 'torch'")
        if backend == "triton" and not self.has_triton_kernel:
            raise ValueError(f"there is no Triton kernel for {type(self).__name__}; use backend='auto' or 'torch'")
        self.backend = backend
        self.conv = ShortConvolution(features, conv_size)
        self.norm = HeadNorm(read_heads[1])
        self.o_proj = Linear(read_heads[0] * read_heads[1], dim)

    # what a subclass provides ---------------------------------------------------------------------------------------

    def _features(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> what goes through the short convolution, [B, T, features]."""
        raise NotImplementedError

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        """Everything the recurrence needs per token, in at least float32, time in dim 1."""
        raise NotImplementedError

    def _recur(self, inputs: Inputs, state: State, call: Call) -> tuple[Tensor, State]:
        """Outputs [B, T, heads, head width] and the state after the last token."""
        raise NotImplementedError

    def _first_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        """State before the first token, without the convolution's."""
        raise NotImplementedError

    def recurrence_flops_per_token(self) -> int:
        """Forward FLOPs per token of the recurrence as `step` computes it; parallel forms may do more.

        By default a write and a read of every number in the state.
        """
        return 6 * self.state_numel()

    # what they share ------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """See `Mixer.forward`. Raises ValueError for input, boundaries or a state that do not fit."""
        self._check_input(x, 3)
        if _is_autocast(x.device.type):  # it would take states, solves and gates to bf16 as well
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(_autocast_would(x), state, cu_seqlens, return_state)
        packing = None if cu_seqlens is None else Packing.from_cu_seqlens(cu_seqlens, x)
        if packing is not None:
            x = packing.pad(x)
        form = "reference" if self.backend == "reference" else "parallel"
        call = Call(form, x.dtype, packing, fresh=state is None, keeps_state=return_state)
        y, state = self._run(x, self._checked_state(state, x), call)
        if packing is not None:
            y = packing.unpad(y)
        return (y, state) if return_state else y

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        self._check_input(x, 2)
        if _is_autocast(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.step(_autocast_would(x), state)
        y, state = self._run(x.unsqueeze(1), self._checked_state(state, x), Call("step", x.dtype))
        return y.squeeze(1), state

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See `Mixer.init_state`; by default on the weights' device. Raises ValueError for no batch, or integers."""
        dtype = torch.float32 if dtype is None else dtype
        if batch < 1 or not dtype.is_floating_point:
            raise ValueError(f"a state has at least one sequence, for activations of a real type; got {batch}, {dtype}")
        where = self.o_proj.weight.device if device is None else torch.device(device)
        kind = wide(dtype)
        history = torch.zeros(batch, self.conv.history, self.conv.channels, device=where, dtype=kind)
        return {**self._first_state(batch, kind, where), "conv": history}

    def init_weights(self, generator: Generator = None) -> None:
        """See `Mixer.init_weights`: every submodule draws its own."""
        for child in self.modules():
            init: Callable | None = getattr(child, "init_weights", None)
            if child is not self and init is not None and not isinstance(child, nn.ModuleList):
                init(generator)

    def map_flops_per_token(self) -> int:
        """Forward FLOPs per token of the maps that are no `nn.Linear`: 2 per real weight of gates and taps."""
        maps = [child for child in self.modules() if isinstance(child, (Gate, ShortConvolution))]
        return sum(2 * child.weight.numel() for child in maps if child.weight is not None)

    def flops_per_token(self) -> int:
        """See `Mixer.flops_per_token`."""
        return self.map_flops_per_token() + self.recurrence_flops_per_token()

    def _run(self, x: Tensor, state: State, call: Call) -> tuple[Tensor, State]:
        features, history = self.conv(self._features(x), state["conv"], call.lengths)
        inputs = self._inputs(x, features)
        if call.packing is not None:
            inputs = self._silenced(inputs, call.packing.mask)
        o, new_state = self._recur(inputs, state, call)
        return self.o_proj(self.norm(o).flatten(2).to(x.dtype)), {**new_state, "conv": history}

    def _silenced(self, inputs: Inputs, mask: Tensor) -> Inputs:
        """Inputs with the tokens behind each sequence's end switched off."""
        quiet = dict(inputs)
        for name, value in self.neutral.items():
            if name in quiet:
                x = quiet[name]
                quiet[name] = torch.where(mask.view(mask.shape + (1,) * (x.ndim - 2)), x, torch.full_like(x, value))
        return quiet

    def _check_input(self, x: Tensor, ndim: int) -> None:
        where = self.o_proj.weight.device
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.device != where:
            got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected x as a tensor of floating type on {where}, where the weights are; got {got}")
        if x.ndim != ndim or x.size(-1) != self.dim or 0 in x.shape:
            shape = "[B, T, D]" if ndim == 3 else "[B, D]"
            raise ValueError(f"expected x {shape} with D = {self.dim} and nothing empty, got {list(x.shape)}")

    def _checked_state(self, state: State | None, x: Tensor) -> State:
        """The given state if it fits x, or the first one."""
        first = self.init_state(x.size(0), x.device, x.dtype)
        if state is None:
            return first
        if not isinstance(state, dict) or state.keys() != first.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"the state of {type(self).__name__} is a dict that holds {sorted(first)}, got {got}")
        for name, want in first.items():
            got = state[name]
            if not isinstance(got, Tensor):
                raise ValueError(f"state {name!r} must be a tensor, got {type(got).__name__}")
            if got.shape != want.shape or got.device != want.device or got.dtype != want.dtype:
                raise ValueError(
                    f"state {name!r} must be {want.dtype} {list(want.shape)} on {want.device}, got {got.dtype} "
                    f"{list(got.shape)} on {got.device}; make it with init_state(batch, device, dtype)"
                )
        return state


def _is_autocast(device: str) -> bool:
    """Also for devices that have none, as meta."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast_would(x: Tensor) -> Tensor:
    """x in the type that autocast takes products in; float64 stays, as it does there."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
