"""The models of the experiments: embed, one or more mixers, norm, read out. No MLPs: the mixer has to do the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_blocks.layers.modules import Generator, Linear
from ssm_blocks.mixer import Mixer, State, build

LSTM = "ssm_blocks.experiments.models:LSTMMixer"


class SequenceModel(nn.Module):
    """tokens [B, T] -> logits [B, T, classes].

    mixer, options: as for `ssm_blocks.build`. With one layer, what is read out is the mixer's output alone; with more,
    layers are pre-norm residual blocks.
    """

    def __init__(
        self,
        vocabulary: int,
        num_classes: int,
        *,
        width: int,
        mixer: str,
        options: Mapping[str, Any] | None = None,
        layers: int = 1,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a model needs at least one layer, got {layers}")
        self.embedding = nn.Embedding(vocabulary, width)
        self.mixers = nn.ModuleList([build(mixer, width, **(options or {})) for _ in range(layers)])
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.embedding.weight)
        for name, parameter in self.named_parameters():
            if name.endswith(".first_state"):
                nn.init.normal_(parameter)  # a state of zeros gives transitions nothing to act on at first

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if len(self.mixers) == 1:
            x = self.mixers[0](x)
        else:
            for mixer in self.mixers:
                x = x + mixer(F.rms_norm(x, (x.size(-1),)))
        return self.head(F.rms_norm(x, (x.size(-1),)))


def sizes(model: SequenceModel) -> dict[str, int]:
    """Parameters of the model and numbers in the state of one sequence, short convolutions included."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    states = sum(mixer.state_numel() for mixer in model.mixers)  # type: ignore[operator]
    return {"parameters": parameters, "state_size": states}


class LSTMMixer(Mixer):
    """An LSTM: what a nonlinear recurrence can do that no parallel scan computes. The ceiling."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.o_proj = Linear(dim, dim)

    def forward(
        self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """See `Mixer.forward`. Raises ValueError for packed sequences, which it does not take."""
        if cu_seqlens is not None:
            raise ValueError("the LSTM takes no packed sequences")
        given = (
            None
            if state is None
            else (state["h"].transpose(0, 1).contiguous(), state["c"].transpose(0, 1).contiguous())
        )
        y, (h, c) = self.lstm(x, given)
        y = self.o_proj(y)
        return (y, {"h": h.transpose(0, 1), "c": c.transpose(0, 1)}) if return_state else y

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        y, state = self.forward(x.unsqueeze(1), state, return_state=True)  # type: ignore[misc]
        return y.squeeze(1), state

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See `Mixer.init_state`."""
        weight = self.o_proj.weight
        return {name: torch.zeros(batch, 1, self.dim, device=device or weight.device, dtype=dtype) for name in "hc"}

    def init_weights(self, generator: Generator = None) -> None:
        """See `Mixer.init_weights`; uniform in +-dim^-1/2."""
        for parameter in self.lstm.parameters():
            nn.init.uniform_(parameter, -(self.dim**-0.5), self.dim**-0.5, generator=generator)
        self.o_proj.init_weights(generator)
