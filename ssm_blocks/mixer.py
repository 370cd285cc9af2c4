"""What a sequence mixer is, and how one is found by name. Importing this file imports no layer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""Everything a mixer remembers between tokens; every tensor has the batch first and none depends on the length."""

_LAYERS = "ssm_blocks.layers."
_BUILT_IN = {
    "deltanet": "deltanet",
    "neg_deltanet": "deltanet",
    "cs_deltanet": "deltanet",
    "cs_neg_deltanet": "deltanet",
    "deltaproduct": "deltanet",
    "ssd_deltanet": "deltanet",
    "gated_ssd_deltanet": "deltanet",
    "dplr_lti": "dplr_lti",
    "dplr_similarity": "dplr_lti",
    "dplr_plain": "dplr_lti",
    "dplr_ltv": "dplr_ltv",
    "oscillatory_dplr": "oscillatory",
    "oscillatory_diagonal": "oscillatory",
    "adaptive_dplr": "oscillatory",
    "linoss_im": "linoss",
    "linoss_imex": "linoss",
    "linoss_damped": "linoss",
    "segmented_hss": "hss",
    "monarch": "monarch",
    "monarch_cayley": "monarch",
    "monarch_signed_cayley": "monarch",
    "diagonal": "diagonal",
    "diagonal_signed": "diagonal",
    "diagonal_complex": "diagonal",
}  # name -> module under ssm_blocks.layers that registers it when imported
_registry: dict[str, type[Mixer]] = {}
MixerClass = TypeVar("MixerClass", bound="type[Mixer]")


class Mixer(nn.Module):
    """A causal map of sequences with a state of constant size.

    Subclasses take `dim` (the width D) and keyword options, and implement the methods below. `adamw_names` lists the
    module's own parameters (by local name) that are no matrices in spirit although they may be 2-D: poles, gates,
    convolution taps. Every submodule may carry such a list.
    """

    adamw_names: frozenset[str] = frozenset()

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"a mixer needs a width of at least 1, got {dim}")
        self.dim = dim

    def forward(
        self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """x [B, T, D] -> y [B, T, D], or (y, state after the last token) with `return_state`.

        cu_seqlens [N + 1]: x is [1, T, D] and holds N sequences end to end; the state then has batch N.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x [B, D] -> (y [B, D], next state)."""
        raise NotImplementedError

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token, for activations of type `dtype`; itself never below float32."""
        raise NotImplementedError

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter and buffer anew, as is needed after `to_empty`."""
        raise NotImplementedError

    def state_numel(self) -> int:
        """Numbers that one sequence's state holds."""
        return sum(value.numel() * (2 if value.is_complex() else 1) for value in self.init_state(1).values())

    def flops_per_token(self) -> int:
        """Forward FLOPs per token beside the weights of `nn.Linear`; by default a write and a read of the state."""
        return 6 * self.state_numel()


def register(name: str) -> Callable[[MixerClass], MixerClass]:
    """Class decorator: make a Mixer available under `name`. Raises ValueError if the name is taken or unfit."""

    def add(cls: MixerClass) -> MixerClass:
        if not (isinstance(cls, type) and issubclass(cls, Mixer)):
            raise ValueError(f"only subclasses of ssm_blocks.Mixer can be registered, got {cls!r}")
        known = _registry.get(name)
        built_in = _BUILT_IN.get(name)
        same_class = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        if (known is not None and not same_class) or (built_in and cls.__module__ != _LAYERS + built_in):
            raise ValueError(f"the mixer name {name!r} is taken; choose another")
        _registry[name] = cls
        return cls

    return add


def available() -> list[str]:
    """All names `build` knows, sorted."""
    return sorted({*_BUILT_IN, *_registry})


def mixer_class(name: str) -> type[Mixer]:
    """The class behind a name; its file is imported on first use. Raises ValueError that lists the names.

    `package.module:NAME` imports the module and takes its class NAME, or the class it registers as NAME: a custom
    mixer needs no more than that.
    """
    if ":" in name:
        return _imported(*name.rsplit(":", 1))
    if name not in _registry and name in _BUILT_IN:
        importlib.import_module(_LAYERS + _BUILT_IN[name])
    if name not in _registry:
        raise ValueError(f"unknown mixer {name!r}; available: {', '.join(available())}")
    return _registry[name]


def _imported(module: str, name: str) -> type[Mixer]:
    path = f"{module}:{name}"
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise ValueError(f"mixer {path}: cannot import {module} ({error})") from error
    if found is None and name in _registry:
        return _registry[name]
    if not (isinstance(found, type) and issubclass(found, Mixer)):
        raise ValueError(
            f"mixer {path}: {module} neither has nor registers a subclass of ssm_blocks.Mixer of that name"
        )
    return found


def build(name: str, dim: int, **options: object) -> Mixer:
    """A mixer of width `dim` by name (or `package.module:NAME`); options go to its class.

    Raises ValueError for unknown names, and for options the class does not take.
    """
    cls = mixer_class(name)
    try:
        inspect.signature(cls).bind(dim, **options)
    except TypeError as error:
        raise ValueError(f"mixer {name!r}: {error}; it takes {inspect.signature(cls)}") from error
    return cls(dim, **options)  # type: ignore[arg-type]


def non_matrix_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that belong to AdamW without weight decay and never to Muon, by full name.

    These are all that are not 2-D, and those a submodule lists in `adamw_names`. Read off the names, because
    attributes of parameters do not survive `to_empty`.
    """
    found = {}
    for prefix, child in module.named_modules():
        listed = getattr(child, "adamw_names", frozenset())
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim != 2 or name in listed:
                found[f"{prefix}.{name}" if prefix else name] = parameter
    return found
