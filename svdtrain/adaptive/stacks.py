"""The maps of `moments` for many matrices at once: equal ones are stacked, mapped in few launches and taken apart."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from svdtrain.adaptive.moments import PerMatrix, State, UnknownState, state_from_factors, state_to_factors

_MAX_STACK_ELEMENTS = 1 << 26  # as many as are decomposed at once: float64 working copies stay under 512 MiB each

Factors = tuple[Tensor, Tensor]
"""B [m, r] and A [r, n]."""
Pair = tuple[State, State]
"""The optimizer state of B and of A."""


def states_to_factors(states: Sequence[Mapping[str, Any] | None], new: Sequence[Factors]) -> list[Pair | UnknownState]:
    """`state_to_factors` of each state of W and its factors, in order; the error itself for a state that has no known
    map. A state may be None or empty, which gives a pair of empty ones."""
    known = [i for i, state in enumerate(states) if state]
    mapped = _map(
        [(states[i],) for i in known], [[new[i] for i in known]], lambda parts, B, A: state_to_factors(parts[0], B, A)
    )
    results: list[Pair | UnknownState] = [({}, {}) for _ in states]
    for i, outcome in zip(known, mapped, strict=True):
        results[i] = outcome
    return results


def states_from_factors(pairs: Sequence[Pair], old: Sequence[Factors]) -> list[State | UnknownState]:
    """`state_from_factors` of each pair of states and the factors they belong to, in order; as above."""
    outcomes = _map(pairs, [old], lambda parts, B, A: (state_from_factors(parts[0], parts[1], B, A),))
    return [outcome if isinstance(outcome, UnknownState) else outcome[0] for outcome in outcomes]


def states_between_factors(
    pairs: Sequence[Pair], old: Sequence[Factors], new: Sequence[Factors]
) -> list[Pair | UnknownState]:
    """Each pair of states carried from old factors to new ones, whose rank may differ, through the state of W."""

    def through_W(parts: Sequence[State], B_old: Tensor, A_old: Tensor, B: Tensor, A: Tensor) -> Pair:
        return state_to_factors(state_from_factors(parts[0], parts[1], B_old, A_old), B, A)

    return _map(pairs, [old, new], through_W)


def runs_of_equals(keys: Sequence[Hashable], sizes: Sequence[int]) -> list[list[int]]:
    """Indices of equal keys, in order of first appearance, cut so that each run's sizes (in elements) sum to what may
    be worked on at once; what is larger by itself is a run of one. The same on every rank for the same arguments."""
    runs: list[list[int]] = []
    current: dict[Hashable, tuple[list[int], int]] = {}  # the run being filled and its size
    for index, (key, size) in enumerate(zip(keys, sizes, strict=True)):
        run, filled = current.get(key, ([], 0))
        if not run or filled + size > _MAX_STACK_ELEMENTS:
            run, filled = [], 0
            runs.append(run)
        run.append(index)
        current[key] = run, filled + size
    return runs


def _map(items: Sequence[tuple], factors: Sequence[Sequence[Factors]], function: Callable[..., tuple]) -> list[Any]:
    """`function(stacked states, B, A, ...)` for each run of equal items, taken apart again. `factors`: one list over
    the items for each pair of B and A that the function wants."""
    results: list[Any] = [None] * len(items)
    flat = [[t.detach() for pair in pairs for t in pair] for pairs in zip(*factors, strict=True)]
    for indices in _alike(items, flat):
        parts = [_stack([items[i][part] for i in indices]) for part in range(len(items[indices[0]]))]
        tensors = [torch.stack(column) for column in zip(*(flat[i] for i in indices), strict=True)]
        try:
            mapped = [_unstack(state, len(indices)) for state in function(parts, *tensors)]
        except UnknownState as error:
            mapped = [[error] * len(indices)]
        for position, index in enumerate(indices):
            outcome = tuple(states[position] for states in mapped)
            results[index] = outcome[0] if isinstance(outcome[0], UnknownState) else outcome
    return results


def _alike(items: Sequence[tuple], tensors: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """Indices of items whose states and factors have the same keys, shapes, types and devices, cut so that a working
    copy fits in memory."""
    keys = []
    for states, factors in zip(items, tensors, strict=True):
        kinds = tuple(tuple((key, _kind(value)) for key, value in state.items()) for state in states)
        keys.append((kinds, tuple(map(_kind, factors))))
    return runs_of_equals(keys, [B.shape[0] * A.shape[1] for B, A, *_ in tensors])


def _kind(value: Any) -> tuple | None:
    """What must agree for values to be stacked; None for those that are kept one by one."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) and value.ndim > 0 else None


def _stack(states: Sequence[Mapping[str, Any]]) -> State:
    stacked = {}
    for key in states[0]:
        values = [state[key] for state in states]
        stacked[key] = PerMatrix(values) if _kind(values[0]) is None else torch.stack(values)
    return stacked


def _unstack(state: State, num: int) -> list[State]:
    """One state for each matrix. Copies: a row of a stack would keep the whole stack in memory, and in checkpoints."""
    columns = {
        key: value if isinstance(value, PerMatrix) else [row.clone() for row in value.unbind()]
        for key, value in state.items()
    }
    return [{key: column[position] for key, column in columns.items()} for position in range(num)]
