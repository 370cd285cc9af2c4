"""005: linear attention whose state is hierarchically semi-separable (HSS), on fixed orthonormal nested bases.

S [d, d] is kept as a binary tree: its diagonal leaf blocks in full, and for each pair of siblings I, J at any level the
block S[I, J] as U_I C_IJ V_J^T with C of size r x r. In fixed bases a rank-1 update k v^T only adds (U_I^T k_I)
(V_J^T v_J)^T, so every node is one head of linear attention, all of them in one batched pass: no trees at run time and
no recompression. With r = leaf = d/16 the state is .18 of the dense one; rank 8 at d = 64 gives .344.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_blocks.layers.base import Call, Inputs, RecurrentMixer
from ssm_blocks.layers.modules import DecayGate, Generator, Linear, fill_normal, split_heads, wide
from ssm_blocks.mixer import State, register
from ssm_blocks.ops import fla
from ssm_blocks.ops.delta import chunk_linear_attention
from ssm_blocks.ops.orthogonal import orthonormal_columns
from ssm_blocks.ops.reference import linear_attention_reference

SIDES = 2  # bases of keys and queries, bases of values
SMALLEST_NODE = 16  # channels that a node needs for fla's kernel: the least that a tensor core multiplies


class NestedBases(nn.Module):
    """Orthonormal bases of all tree nodes: a leaf's own [m, r], a parent's from its children's by [2r, r].

    Columns are orthonormalised by QR at each use (a tree of QRs, as in TSQR), so the free parameters may be anything.
    """

    def __init__(self, num_heads: int, size: int, leaf: int, rank: int) -> None:
        super().__init__()
        self.num_levels = (size // leaf).bit_length() - 1
        self.num_leaves = 2**self.num_levels
        self.leaves = nn.Parameter(torch.empty(SIDES, num_heads, self.num_leaves, leaf, rank))
        shapes = [(SIDES, num_heads, 2**level, 2 * rank, rank) for level in range(1, self.num_levels)]
        self.transfers = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])

    def init_weights(self, generator: Generator = None) -> None:
        for parameter in self.parameters():
            fill_normal(parameter, 1.0, generator)

    def orthonormal(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """(leaf bases, transfers of levels 1, 2, ...), both sides in front."""
        return orthonormal_columns(self.leaves.to(dtype)), [orthonormal_columns(x.to(dtype)) for x in self.transfers]


def analyse(x: Tensor, leaves: Tensor, transfers: list[Tensor]) -> Tensor:
    """Coordinates of x [..., H, d] in every node's basis, root's children first: [..., H, nodes, r]."""
    pieces = x.unflatten(-1, leaves.shape[-3:-1])
    levels = [torch.einsum("hnmr,...hnm->...hnr", leaves, pieces)]
    for transfer in reversed(transfers):
        pairs = levels[0].unflatten(-2, (-1, 2)).flatten(-2)
        levels.insert(0, torch.einsum("hnsr,...hns->...hnr", transfer, pairs))
    return torch.cat(levels, -2)


def synthesise(coordinates: Tensor, leaves: Tensor, transfers: list[Tensor]) -> Tensor:
    """The transpose of `analyse`: sum over nodes of basis times coordinates, [..., H, nodes, r] -> [..., H, d]."""
    sizes = [2**level for level in range(1, len(transfers) + 2)]
    levels = list(coordinates.split(sizes, -2))
    passed = levels[0]
    for transfer, own in zip(transfers, levels[1:], strict=True):
        down = torch.einsum("hnsr,...hnr->...hns", transfer, passed)
        passed = own + down.unflatten(-1, (2, -1)).flatten(-3, -2)
    return torch.einsum("hnmr,...hnr->...hnm", leaves, passed).flatten(-2)


def swap_siblings(x: Tensor) -> Tensor:
    """Exchange nodes 2i and 2i + 1 in dim -2."""
    return x.unflatten(-2, (-1, 2)).flip(-2).flatten(-3, -2)


@register("segmented_hss")
class SegmentedHSS(RecurrentMixer):
    """rank: r of the off-diagonal blocks, default a 16th of the head; leaf_size: default the rank.

    num_heads: default one per 64 channels. A head must be leaf_size times a power of two, at least 2 leaves.
    """

    has_fla_kernel = True
    neutral: ClassVar = {"k": 0.0, "log_decay": 0.0}

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        rank: int | None = None,
        leaf_size: int | None = None,
        conv_size: int = 4,
        chunk: int = 32,
        backend: str = "auto",
    ) -> None:
        heads, width = split_heads(dim, num_heads)
        rank = max(1, width // 16) if rank is None else rank
        leaf = rank if leaf_size is None else leaf_size
        num_leaves = width // leaf if leaf > 0 and width % leaf == 0 else 0
        if not 1 <= rank <= leaf or num_leaves < 2 or num_leaves & (num_leaves - 1) or chunk < 1:
            raise ValueError(
                f"a head of {width} channels must be leaf_size times 2, 4, 8, ... with 1 <= rank <= leaf_size; got "
                f"rank {rank}, leaf_size {leaf}, chunk {chunk}"
            )
        if backend == "fla" and rank < SMALLEST_NODE:
            raise ValueError(
                f"fla's kernel takes nodes of at least {SMALLEST_NODE} channels, these have rank {rank}; use "
                f"backend='auto' or rank={SMALLEST_NODE}"
            )
        super().__init__(dim, features=3 * dim, read_heads=(heads, width), conv_size=conv_size, backend=backend)
        self.num_heads, self.head_dim, self.rank, self.leaf_size, self.chunk = heads, width, rank, leaf, chunk
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim) for _ in range(3))
        self.decay_gate = DecayGate(dim, heads)
        self.bases = NestedBases(heads, width, leaf, rank)
        self.init_weights()

    def _first_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        leaves, r, m = self.bases.num_leaves, self.rank, self.leaf_size
        shapes = {"nodes": (2 * leaves - 2, r, r), "leaves": (leaves, m, m)}
        return {
            name: torch.zeros(batch, self.num_heads, *shape, dtype=dtype, device=device)
            for name, shape in shapes.items()
        }

    def map_flops_per_token(self) -> int:
        """See `RecurrentMixer`; q and k go through one side's bases, v and o through the other's."""
        return super().map_flops_per_token() + 2 * 2 * sum(p.numel() for p in self.bases.parameters())

    def recurrence_flops_per_token(self) -> int:
        """Per entry of the state: one decay, a write and a read of 2 each."""
        leaves, r, m = self.bases.num_leaves, self.rank, self.leaf_size
        return 5 * self.num_heads * ((2 * leaves - 2) * r * r + leaves * m * m)

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    def _inputs(self, x: Tensor, features: Tensor) -> Inputs:
        q, k, v = features.to(wide(x.dtype)).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return {"q": q, "k": k, "v": v, "log_decay": self.decay_gate(x)}

    def _recur(self, inputs: Inputs, state: State, call: Call) -> tuple[Tensor, State]:
        q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
        leaves, transfers = self.bases.orthonormal(q.dtype)
        if call.form == "reference":
            return self._dense_reference(q, k, v, log_decay, state, leaves, transfers)
        keys, values = ((leaves[side], [t[side] for t in transfers]) for side in range(SIDES))
        qn, kn, vn = analyse(q, *keys), analyse(k, *keys), swap_siblings(analyse(v, *values))
        o, node_state = self._attend(qn, kn, vn, log_decay, state["nodes"], call)
        far = synthesise(swap_siblings(o), *values)
        q, k, v = (x.unflatten(-1, (-1, self.leaf_size)) for x in (q, k, v))
        near, leaf_state = self._attend(q, k, v, log_decay, state["leaves"], call)
        return far + near.flatten(-2), {"nodes": node_state, "leaves": leaf_state}

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Linear attention with every node a head: q, k, v [B, T, H, nodes, r], S [B, H, nodes, r, r]."""
        decay = log_decay.unsqueeze(-1).expand(q.shape[:-1]).flatten(2)
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        flat = S.flatten(1, 2)
        if call.form == "step":
            o, last = linear_attention_reference(q, k, v, decay, flat)
        elif q.size(-1) >= SMALLEST_NODE and fla.use_fla(self.backend, call.dtype, q.device, q.size(-1), decays=True):
            o, last = fla.linear_attention(q, k, v, decay, flat, call.dtype)
        else:
            o, last = chunk_linear_attention(q, k, v, decay, flat, self.chunk)
        return o.unflatten(2, S.shape[1:3]), last.view_as(S)

    # the definition: a dense state, projected at every token ----------------------------------------------------------

    def _dense_reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: State,
        leaves: Tensor,
        transfers: list[Tensor],
    ) -> tuple[Tensor, State]:
        U, V = (explicit_bases(leaves[side], [t[side] for t in transfers]) for side in range(SIDES))
        V = V.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)  # each node's sibling
        blocks = torch.einsum("hnir,bhnrs,hnjs->bhij", U, state["nodes"], V)
        S = blocks + torch.stack([torch.stack([torch.block_diag(*head) for head in row]) for row in state["leaves"]])
        mask = torch.block_diag(*torch.ones(leaves.size(2), self.leaf_size, self.leaf_size)).to(S)
        outputs = []
        for t in range(q.size(1)):
            outer = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            seen = torch.einsum("hnir,hnjr,bhjl,hnls,hnms->bhim", U, U, outer, V, V)
            S = log_decay[:, t].exp()[..., None, None] * S + seen + mask * outer
            outputs.append((S.mT @ q[:, t].unsqueeze(-1)).squeeze(-1))
        diagonal = S.unflatten(-1, (-1, self.leaf_size)).unflatten(2, (-1, self.leaf_size))
        last = {
            "nodes": torch.einsum("hnir,bhij,hnjs->bhnrs", U, S, V),
            "leaves": diagonal.diagonal(dim1=2, dim2=4).movedim(-1, 2),
        }
        return torch.stack(outputs, 1), last


def explicit_bases(leaves: Tensor, transfers: list[Tensor]) -> Tensor:
    """Every node's basis as columns over all d channels, zero outside the node: [H, nodes, d, r]."""
    size = leaves.size(1) * leaves.size(2)
    identity = torch.eye(size, dtype=leaves.dtype, device=leaves.device)
    rows = identity.unsqueeze(1).expand(-1, leaves.size(0), -1)  # analyse() of unit vectors, one per channel
    return analyse(rows, leaves, transfers).movedim(0, 2)
