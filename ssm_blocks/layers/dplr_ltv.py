"""003, time-varying: S_t = G_t D_t (I - beta_t c_t c_t^T) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

G_t a signed permutation, D_t = diag(exp g_t) with g_t in (-5, 0) per channel, c_t a unit vector, beta in (0, 2): the
transition D + a b^T with a = -beta D c, b = c, and its norm is <= 1 by construction.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_blocks.layers.base import Call, Inputs, RecurrentMixer
from ssm_blocks.layers.dictionary import PermutationDictionary, identity_weights
from ssm_blocks.layers.modules import Gate, Linear, split_heads
from ssm_blocks.mixer import State, register
from ssm_blocks.ops import fla
from ssm_blocks.ops.permutation import into_frames, out_of_frame, permuted_dplr, prefix_products
from ssm_blocks.ops.reference import dplr_reference
from ssm_blocks.ops.routed import Routing, routed_dplr

STRONGEST_DECAY = 5.0  # fla's safe gate takes log decays in [-5, 0)
ROUTED_KEYS = 32  # the gradient of the choice costs K x K x V per token
LARGEST_CHUNK = 16  # 16 x 5 = 80: what float32 exponents bear


@register("dplr_ltv")
class TimeVaryingDPLR(RecurrentMixer):
    """num_heads: default one per 64 channels; key_dim: K per head, default at most 32.

    dictionary_size: permutations to choose from; chunk: at most 16.
    """

    has_fla_kernel = True
    neutral: ClassVar = {"k": 0.0, "a": 0.0, "log_decay": 0.0, "entry": 0}

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        key_dim: int | None = None,
        dictionary_size: int = 8,
        conv_size: int = 4,
        chunk: int = 16,
        backend: str = "auto",
    ) -> None:
        heads, width = split_heads(dim, num_heads)
        keys = min(width, ROUTED_KEYS) if key_dim is None else key_dim
        if keys < 1 or not 1 <= chunk <= LARGEST_CHUNK:
            raise ValueError(f"key_dim is at least 1 and chunk 1..{LARGEST_CHUNK}, got {keys} and {chunk}")
        self.num_heads, self.key_dim, self.value_dim, self.chunk = heads, keys, width, chunk
        self.sizes = (heads * keys, 2 * heads * keys, heads * width)
        super().__init__(dim, features=sum(self.sizes), read_heads=(heads, width), conv_size=conv_size, backend=backend)
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, size) for size in self.sizes)
        self.beta_gate = Gate(dim, heads)
        self.decay_gate = Gate(dim, heads * keys, bias=-6.0)
        self.dictionary = PermutationDictionary(dim, heads, dictionary_size, keys, signed=True)
        self.init_weights()

    def _first_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        return {"S": torch.zeros(batch, self.num_heads, self.key_dim, self.value_dim, dtype=dtype, device=device)}

    def recurrence_flops_per_token(self) -> int:
        """Per entry of S: b^T S, a w^T, k v^T and S^T q of 2 each, one decay."""
        return 9 * self.num_heads * self.key_dim * self.value_dim

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        raw = self.decay_gate(x).unflatten(-1, (self.num_heads, self.key_dim))
        log_decay = -STRONGEST_DECAY * torch.sigmoid(raw)
        q, k, v = features.to(raw.dtype).split(self.sizes, -1)
        k, c = F.normalize(k.unflatten(-1, (2, self.num_heads, self.key_dim)), dim=-1).unbind(2)
        beta = 2 * torch.sigmoid(self.beta_gate(x)).unsqueeze(-1)
        entry, weights = self.dictionary.choose(x)
        return {
            "q": F.normalize(q.unflatten(-1, (self.num_heads, self.key_dim)), dim=-1),
            "k": k,
            "v": v.unflatten(-1, (self.num_heads, self.value_dim)),
            "a": -beta * log_decay.exp() * c,
            "b": c,
            "log_decay": log_decay,
            "entry": entry,
            "weights": weights,
        }

    def _silenced(self, inputs: Inputs, mask: Tensor) -> Inputs:
        quiet = super()._silenced(inputs, mask)
        return {**quiet, "weights": identity_weights(quiet["weights"], mask)}

    def _recur(self, inputs: Inputs, state: State, call: Call) -> tuple[Tensor, State]:
        core = (inputs["q"], inputs["k"], inputs["v"], inputs["a"], inputs["b"], inputs["log_decay"])
        S, weights = state["S"], inputs["weights"]
        learning = torch.is_grad_enabled() and (weights.requires_grad or self.dictionary.scores.requires_grad)
        if call.form == "reference" or (call.form == "step" and learning):
            o, S = dplr_reference(*core, S, self.dictionary.matrices(weights))
            return o, {"S": S}
        index, sign = self.dictionary.gather(inputs["entry"])
        sign = sign.to(S.dtype)
        if call.form == "step":
            o, S = _one_step(core, index, sign, S)
        elif learning:
            routing = Routing(weights, self.dictionary.dense().to(S.dtype), index, sign)
            o, S = routed_dplr(core, routing, S, self.chunk)
        elif fla.use_fla(self.backend, call.dtype, S.device, max(self.key_dim, self.value_dim)):
            index, sign = prefix_products(index, sign)
            o, S = fla.dplr(*into_frames(core, index, sign), S, call.dtype)
            S = out_of_frame(index[:, -1], sign[:, -1], S)
        else:
            o, S = permuted_dplr(core, index, sign, S, self.chunk, bounded=True)
        return o, {"S": S}


def _one_step(core: tuple[Tensor, ...], index: Tensor, sign: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token, G_t by a gather: O(K V)."""
    q, k, v, a, b, log_decay = (x[:, 0].unsqueeze(-1) for x in core)
    S = log_decay.exp() * S + a @ (b.mT @ S)
    S = out_of_frame(index[:, 0], sign[:, 0], S) + k @ v.mT
    return (S.mT @ q).squeeze(-1).unsqueeze(1), S
