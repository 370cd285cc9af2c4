"""Word problems of finite groups: read elements, say their running product. State tracking in its purest form."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from ssm_blocks.tasks.task import check_sizes, generator_for, keep_split, num_candidates

Permutation = tuple[int, ...]


def closure(generators: list[Permutation]) -> list[Permutation]:
    """All elements of the group that the permutations generate, the identity first."""
    identity = tuple(range(len(generators[0])))
    found, frontier = {identity: None}, [identity]
    while frontier:
        frontier = [compose(g, element) for element in frontier for g in generators]
        frontier = [element for element in dict.fromkeys(frontier) if element not in found]
        found.update(dict.fromkeys(frontier))
    return list(found)


def compose(second: Permutation, first: Permutation) -> Permutation:
    """The permutation that applies `first`, then `second`; p sends i to p[i]."""
    return tuple(second[i] for i in first)


class WordProblem:
    """Tokens are the given elements of a group, drawn uniformly; the target at t is g_t ... g_1, as its number.

    elements: the whole group; letters: those that occur as tokens, default all.
    """

    def __init__(self, elements: list[Permutation], letters: list[Permutation] | None = None) -> None:
        numbers = {element: i for i, element in enumerate(elements)}
        letters = elements if letters is None else letters
        self.vocabulary, self.num_classes = len(letters), len(elements)
        self.letters = torch.tensor([numbers[letter] for letter in letters])
        self.table = torch.tensor([[numbers[compose(a, b)] for b in elements] for a in elements])
        self._on_device: dict[str, tuple[Tensor, Tensor]] = {}

    def batch(
        self, seed: int, step: int, *, size: int, length: int, split: str = "train", device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """See `Task.batch`. Raises ValueError where there are too few sequences of this length."""
        check_sizes(self.vocabulary, size, length)
        generator = generator_for(seed, step, split, device)
        shape = (num_candidates(size), length)
        tokens = torch.randint(self.vocabulary, shape, generator=generator, device=device)
        tokens = tokens[keep_split(tokens, split, size)]
        return tokens, self.running_products(tokens)

    def running_products(self, tokens: Tensor) -> Tensor:
        """Numbers of g_t ... g_1 for tokens [B, T], by doubling: log2 T look-ups."""
        letters, table = self._tensors(tokens.device)
        products, shift = letters[tokens], 1
        while shift < tokens.size(1):
            joined = table[products[:, shift:], products[:, :-shift]]
            products = torch.cat([products[:, :shift], joined], 1)
            shift *= 2
        return products

    def chance(self, length: int) -> float:
        """Probability of the likeliest product of `length` letters (exact: a random walk on the group)."""
        walk = torch.zeros(self.num_classes, dtype=torch.float64)
        walk[0] = 1  # the identity; every start gives the same shape
        step = torch.zeros(self.num_classes, self.num_classes, dtype=torch.float64)
        for letter in self.letters.tolist():
            step[self.table[letter], torch.arange(self.num_classes)] += 1 / self.vocabulary
        return float((torch.linalg.matrix_power(step, length) @ walk).max())

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if str(device) not in self._on_device:
            self._on_device[str(device)] = self.letters.to(device), self.table.to(device)
        return self._on_device[str(device)]


@lru_cache(maxsize=8)
def group_task(name: str) -> WordProblem:
    """d4 (8 letters), s5 (all 120 elements), s5_transpositions (10 letters), parity. Raises ValueError for others."""
    if name == "d4":  # the square's quarter turn and a reflection
        return WordProblem(closure([(1, 2, 3, 0), (0, 3, 2, 1)]))
    if name == "parity":
        return WordProblem([(0, 1), (1, 0)])
    if name == "s5":
        return WordProblem(list(itertools.permutations(range(5))))
    if name == "s5_transpositions":
        return WordProblem(list(itertools.permutations(range(5))), _transpositions(5))
    raise ValueError(f"unknown group task {name!r}: d4, parity, s5 or s5_transpositions")


def _transpositions(n: int) -> list[Permutation]:
    pairs = itertools.combinations(range(n), 2)
    return [tuple({i: j, j: i}.get(m, m) for m in range(n)) for i, j in pairs]
