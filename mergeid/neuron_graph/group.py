"""Elements of the nested permutation group: draw, compose, invert, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Structure = tuple[tuple[int, int], tuple[int, ...], np.ndarray]
"""((blocks, members per block), indices of the parents, [blocks, parents] flat member positions)."""


class NoImage(Exception):
    """A block of `cell` has no image under the permutation of its parents."""

    def __init__(self, cell: int) -> None:
        super().__init__(cell)
        self.cell = cell


def block_images(structure: Structure, parent_perms: Sequence[np.ndarray], cell: int = 0) -> np.ndarray:
    """For every block the block that it takes its members from, given its parents' permutations."""
    (blocks, _), parents, block_parents = structure
    if not parents:
        return np.arange(blocks)
    sizes = [len(p) for p in parent_perms]
    code = np.ravel_multi_index(tuple(block_parents.T), sizes)
    image = np.ravel_multi_index(tuple(p[block_parents[:, k]] for k, p in enumerate(parent_perms)), sizes)
    here = np.arange(blocks)
    if np.prod(sizes) <= 8 * blocks:
        at = np.full(np.prod(sizes), -1)
        at[code] = here
        if np.array_equal(at[code], here):  # one block in each combination of parents
            found = at[image]
            if (found < 0).any():
                raise NoImage(cell)
            return found
    found = np.empty(blocks, np.int64)
    # blocks in the same parents go in order
    found[np.argsort(image, kind="stable")] = np.argsort(code, kind="stable")
    if not np.array_equal(code[found], image):
        raise NoImage(cell)
    return found


def block_ranks(block_parents: np.ndarray) -> np.ndarray:
    """For every block (row, [blocks, parents]) how many with the same parents stand before it: these go in order."""
    seen: dict[tuple[int, ...], int] = {}
    out = np.empty(len(block_parents), np.int64)
    for i, row in enumerate(map(tuple, block_parents.tolist())):
        out[i] = seen.get(row, 0)
        seen[row] = int(out[i]) + 1
    return out


def same_element(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Whether two elements permute the spaces of `a` alike."""
    return all(np.array_equal(a[k], b[k]) for k in a)


def random_permutations(structures: Sequence[Structure], permutation: Callable[[int], np.ndarray]) -> list[np.ndarray]:
    """A random group element: for every cell (parents first) an array ``perm`` over its flat members, where the
    member at position i is taken from position ``perm[i]``. Raises `NoImage`."""
    perms: list[np.ndarray] = []
    for i, structure in enumerate(structures):
        (blocks, size), parents, _ = structure
        images = block_images(structure, [perms[p] for p in parents], i)
        inner = np.zeros((blocks, size), np.int64)
        if size > 1:
            for b in range(blocks):
                inner[b] = permutation(size)
        perms.append((images[:, None] * size + inner).reshape(-1))
    return perms
