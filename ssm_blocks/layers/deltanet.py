"""001 and 002: the DeltaNet family. A fast weight S [K, V] per head that is corrected where it predicts wrongly.

S' = G_t exp(g_t) S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, repeated for n_h keys per token;  o_t = S_t^T q_t.

With unit keys and beta in (0, 2) the transition has norm <= 1; beta above 1 gives it a negative eigenvalue. G_t is a
signed permutation. As first proposed, P - beta k k^T, the norm reaches 2.78: the permutation has to come first.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_blocks.layers.base import Call, Inputs, RecurrentMixer
from ssm_blocks.layers.dictionary import PermutationDictionary, identity_weights
from ssm_blocks.layers.modules import DecayGate, Gate, Generator, Linear, split_heads
from ssm_blocks.mixer import State, register
from ssm_blocks.ops import fla
from ssm_blocks.ops.delta import chunk_delta_rule
from ssm_blocks.ops.inverse import INVERSES
from ssm_blocks.ops.permutation import out_of_frame, permuted_delta_rule
from ssm_blocks.ops.reference import delta_rule_reference
from ssm_blocks.ops.routed import Routing, routed_delta_rule

Core = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, beta
ROUTED_KEYS = 32  # the gradient of the choice costs K x K x V per token


@register("deltanet")
class DeltaNet(RecurrentMixer):
    """beta in (0, 1): eigenvalues in [0, 1] (arXiv:2406.06484).

    num_heads: default one per 64 channels. key_dim: K per head, default the head's width, at most 32 with a
    dictionary. num_householder: delta steps per token. dictionary_size: permutations to choose from, 0 for none.
    conv_size: tokens of the short convolution, 0 for none (then no SiLU either). learned_state: train S_0.
    chunk, inverse: see `ops.delta`. Subclasses set `negative` (beta in (0, 2), signs in the dictionary) and `gated`
    (a decay per token).
    """

    negative = False
    dictionary_size = 0
    gated = False
    num_householder = 1
    most_keys = 1 << 30
    default_inverse = "solve"
    has_fla_kernel = True
    neutral: ClassVar = {"beta": 0.0, "log_decay": 0.0, "entry": 0}

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        key_dim: int | None = None,
        num_householder: int | None = None,
        dictionary_size: int | None = None,
        conv_size: int = 4,
        learned_state: bool = False,
        chunk: int = 64,
        inverse: str | None = None,
        backend: str = "auto",
    ) -> None:
        heads, width = split_heads(dim, num_heads)
        keys = min(width, self.most_keys) if key_dim is None else key_dim
        steps = self.num_householder if num_householder is None else num_householder
        inverse = self.default_inverse if inverse is None else inverse
        if min(keys, steps, chunk) < 1 or inverse not in INVERSES:
            raise ValueError(
                f"key_dim, num_householder and chunk are at least 1 and inverse one of {sorted(INVERSES)}; got {keys}, "
                f"{steps}, {chunk}, {inverse!r}"
            )
        sizes = (heads * keys, steps * heads * keys, steps * heads * width)
        super().__init__(dim, features=sum(sizes), read_heads=(heads, width), conv_size=conv_size, backend=backend)
        self.num_heads, self.key_dim, self.value_dim, self.num_householder = heads, keys, width, steps
        self.chunk, self.inverse, self.sizes = chunk, inverse, sizes
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, size) for size in sizes)
        self.beta_gate = Gate(dim, steps * heads)
        self.decay_gate = DecayGate(dim, heads) if self.gated else None
        size = self.dictionary_size if dictionary_size is None else dictionary_size
        self.dictionary = PermutationDictionary(dim, heads, size, keys, self.negative) if size else None
        if self.dictionary is not None and self.gated:
            raise ValueError("a gated DeltaNet has no permutations; use cs_deltanet or cs_neg_deltanet without gate")
        self.first_state = nn.Parameter(torch.empty(heads, keys, width)) if learned_state else None
        self.init_weights()

    def init_weights(self, generator: Generator = None) -> None:
        super().init_weights(generator)
        if self.first_state is not None:
            nn.init.zeros_(self.first_state)

    def _first_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        shape = (batch, self.num_heads, self.key_dim, self.value_dim)
        if self.first_state is not None:
            return {"S": self.first_state.to(device, dtype).expand(shape)}
        return {"S": torch.zeros(shape, dtype=dtype, device=device)}

    def recurrence_flops_per_token(self) -> int:
        """Per entry of S: n_h predictions and writes of 2 each, one reading of 2, one decay; permutations move only."""
        per_entry = 4 * self.num_householder + 2 + (self.decay_gate is not None)
        return per_entry * self.num_heads * self.key_dim * self.value_dim

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        gate = self.beta_gate(x)
        q, k, v = features.to(gate.dtype).split(self.sizes, -1)
        steps, heads = self.num_householder, self.num_heads
        inputs = {
            "q": F.normalize(q.unflatten(-1, (heads, self.key_dim)), dim=-1),
            "k": F.normalize(k.unflatten(-1, (steps, heads, self.key_dim)), dim=-1),
            "v": v.unflatten(-1, (steps, heads, self.value_dim)),
            "beta": (1 + self.negative) * torch.sigmoid(gate).unflatten(-1, (steps, heads)),
        }
        if self.decay_gate is not None:
            inputs["log_decay"] = self.decay_gate(x)
        if self.dictionary is not None:
            inputs["entry"], inputs["weights"] = self.dictionary.choose(x)
        return inputs

    def _silenced(self, inputs: Inputs, mask: Tensor) -> Inputs:
        quiet = super()._silenced(inputs, mask)
        if "weights" in quiet:
            quiet["weights"] = identity_weights(quiet["weights"], mask)
        return quiet

    def _recur(self, inputs: Inputs, state: State, call: Call) -> tuple[Tensor, State]:
        x = _one_step_per_row(inputs, self.num_householder)
        core: Core = (x["q"], x["k"], x["v"], x["beta"])
        if self.dictionary is not None:
            o, S = self._permuted(core, x["entry"], x["weights"], state["S"], call)
        elif call.form != "parallel":
            o, S = delta_rule_reference(*core, x.get("log_decay"), state["S"])
        elif self._uses_fla(call, state["S"], decays="log_decay" in x):
            o, S = fla.delta_rule(*core, x.get("log_decay"), state["S"], call.dtype)
        else:
            o, S = chunk_delta_rule(*core, x.get("log_decay"), state["S"], self.chunk, self.inverse)
        return o[:, self.num_householder - 1 :: self.num_householder], {"S": S}

    def _permuted(self, core: Core, entry: Tensor, weights: Tensor, S: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """With G_t: dense matrices where the definition or a gradient asks for them, else gathers."""
        assert self.dictionary is not None
        learning = torch.is_grad_enabled() and (weights.requires_grad or self.dictionary.scores.requires_grad)
        if call.form == "reference" or (call.form == "step" and learning):
            return delta_rule_reference(*core, None, S, self.dictionary.matrices(weights))
        index, sign = self.dictionary.gather(entry)
        sign = sign.to(S.dtype)
        if call.form == "step":
            return delta_rule_reference(*core, None, out_of_frame(index[:, 0], sign[:, 0], S))
        if learning:
            dictionary = self.dictionary.dense().to(S.dtype)
            return routed_delta_rule(*core, Routing(weights, dictionary, index, sign), S, self.chunk, self.inverse)  # type: ignore[call-arg]
        if self._uses_fla(call, S):
            kernel = partial(fla.delta_rule, dtype=call.dtype)
        else:
            kernel = partial(chunk_delta_rule, chunk=self.chunk, inverse=self.inverse)
        return permuted_delta_rule(*core, index, sign, S, kernel)

    def _uses_fla(self, call: Call, S: Tensor, decays: bool = False) -> bool:
        return fla.use_fla(self.backend, call.dtype, S.device, max(self.key_dim, self.value_dim), decays)


def _one_step_per_row(inputs: Inputs, steps: int) -> Inputs:
    """n_h delta steps per token as n_h rows in time: permutation and decay in the first, the reading after the last."""
    rows = {name: inputs[name].flatten(1, 2) for name in ("k", "v", "beta")}
    rows["q"] = inputs["q"].repeat_interleave(steps, 1)
    for name in ("log_decay", "entry", "weights"):
        if name in inputs:
            first = inputs[name].unsqueeze(2)
            rest = torch.zeros_like(first).expand(-1, -1, steps - 1, *first.shape[3:]).clone()
            if name == "weights":
                rest[..., 0] = 1  # the identity
            rows[name] = torch.cat([first, rest], 2).flatten(1, 2)
    return rows


@register("neg_deltanet")
class NegativeDeltaNet(DeltaNet):
    """beta in (0, 2): eigenvalues in [-1, 1] (arXiv:2411.12537)."""

    negative = True


@register("cs_deltanet")
class ColumnSparseDeltaNet(DeltaNet):
    """With a permutation per token, chosen from a learned dictionary."""

    dictionary_size, most_keys = 8, ROUTED_KEYS


@register("cs_neg_deltanet")
class ColumnSparseNegativeDeltaNet(DeltaNet):
    """With a signed permutation per token and eigenvalues in [-1, 1]."""

    negative, dictionary_size, most_keys = True, 8, ROUTED_KEYS


@register("deltaproduct")
class DeltaProduct(DeltaNet):
    """n_h = 2 delta steps per token: products of reflections, so also rotations (arXiv:2502.10297)."""

    negative, num_householder = True, 2


@register("ssd_deltanet")
class SSDDeltaNet(DeltaNet):
    """The same function as `deltanet`, all chunks in one batched pass; chunk systems by 2 x 2 block inverse."""

    default_inverse = "block"


@register("gated_ssd_deltanet")
class GatedSSDDeltaNet(SSDDeltaNet):
    """With a decay per token and head (arXiv:2412.06464)."""

    gated = True
