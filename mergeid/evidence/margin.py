"""How far the identity is from any other assignment: swap costs, and the exact margin over all permutations.

With realization costs C, a permutation π costs Δ_π = Σ_i C_{iπ(i)} − Σ_i C_ii more than the identity (arXiv
2606.04754). Every permutation is a product of disjoint cycles, and Δ_π the sum of their lengths in the graph with edge
lengths C_ij − C_ii. So the identity is optimal exactly where no cycle is negative, and then min_{π≠id} Δ_π is the
shortest cycle. Swap costs T_ij alone do not tell: all may be positive while a longer cycle is negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra
from torch import Tensor

from mergeid.errors import MergeidError

ROWS = 1 << 23
"""Entries of the cost matrix that are worked on at once."""


@dataclass(frozen=True)
class Margin:
    """min_{π≠id} Δ_π, exactly.

    Attributes:
        value: the minimum; +∞ where no other permutation is realizable, at most 0 where the identity is not optimal.
        cycle: the neurons that the cheapest permutation moves, each to take over the next one's function; for an
            identity that is not optimal all neurons that π* moves.
        identity_optimal: whether the identity is a minimiser. Only the unique one if `value` is above 0.
        least_swap: min_ij T_ij, the cheapest transposition.
    """

    value: float
    cycle: tuple[int, ...]
    identity_optimal: bool
    least_swap: float

    @property
    def identifiable(self) -> bool:
        """Whether the identity is the unique minimiser: the structure identifies the neurons."""
        return self.identity_optimal and self.value > 0


def swap_costs(cost: Tensor) -> Tensor:
    """T_ij = C_ij + C_ji − C_ii − C_jj, float64 [m, m]; raises `MergeidError` as `margin` does."""
    diagonal = _diagonal(cost)
    return cost + cost.T - diagonal[:, None] - diagonal[None]


def least_swap(cost: Tensor) -> tuple[float, int, int]:
    """(min T_ij over i ≠ j, i, j) without a second matrix; (+∞, 0, 0) for a single neuron."""
    diagonal = _diagonal(cost)
    best, at = inf, (0, 0)
    for rows in torch.arange(len(cost)).split(max(ROWS // len(cost), 1)):
        block = cost[rows] + cost[:, rows].T - diagonal[rows, None] - diagonal[None]
        block[torch.arange(len(rows)), rows] = torch.inf
        flat = int(block.argmin())
        value = float(block.reshape(-1)[flat])
        if value < best:
            best, at = value, (int(rows[flat // len(cost)]), flat % len(cost))
    return best, *at


def sensitivity(cost: Tensor, permutation: np.ndarray) -> float:
    """Δ_π, with neuron i taking over the function of neuron ``permutation[i]``."""
    rows = torch.arange(len(cost))
    return float((cost[rows, torch.from_numpy(np.asarray(permutation))] - _diagonal(cost)).sum())


def _diagonal(cost: Tensor) -> Tensor:
    diagonal = cost.diagonal()
    bad = torch.nonzero(~torch.isfinite(diagonal)).reshape(-1)
    if len(bad):
        raise MergeidError(
            f"neuron {int(bad[0])} does not lie in its own function class, so the fixed part is not the one that it "
            "was trained with; give the right base checkpoint, adapter or mask"
        )
    return diagonal


def margin(cost: Tensor, swaps: Tensor | None = None) -> Margin:
    """The exact margin of realization costs C, float64 [m, m].

    Potentials p with C_ij − C_ii + p_i − p_j ≥ 0 (Bellman-Ford) prove the identity optimal. Cycles keep their lengths
    under them, and with the cheapest swap as a bound few edges can lie on a shorter cycle; among these Dijkstra's
    algorithm finds it. Rounding counts as 0 up to 1e-12 of the largest finite cost.

    Args:
        swaps: `swap_costs` of them, with +∞ on the diagonal, where they are there already.

    Raises `MergeidError` where an own cost C_ii is not finite."""
    diagonal = _diagonal(cost)
    if swaps is None:
        value, i, j = least_swap(cost)
    else:
        i, j = divmod(int(swaps.argmin()), len(cost))
        value = float(swaps[i, j])
    rounding = 1e-12 * _largest(cost)
    if value < -rounding:
        return _not_optimal(cost, value)
    potential = _potentials(cost, diagonal, rounding)
    if potential is None:
        return _not_optimal(cost, value)
    if value == inf or value > rounding:
        found = _short_cycle(cost, diagonal, potential, value)
        if found is not None:
            length, cycle = found
            return Margin(0.0 if length <= rounding else length, cycle, True, value)
    if value == inf:
        return Margin(inf, (), True, inf)
    return Margin(value if value > rounding else 0.0, (i, j), True, value)


def _largest(cost: Tensor) -> float:
    """The largest finite entry, in absolute value."""
    found = 0.0
    for block in cost.split(max(ROWS // len(cost), 1)):
        size = block.abs()
        found = max(found, float(size.masked_fill_(torch.isinf(size), 0.0).max()))
    return found


def _not_optimal(cost: Tensor, swap: float) -> Margin:
    permutation = best_permutation(cost)
    moved = np.flatnonzero(permutation != np.arange(len(permutation)))
    return Margin(sensitivity(cost, permutation), tuple(moved.tolist()), False, swap)


def best_permutation(cost: Tensor) -> np.ndarray:
    """π* that minimises Σ_i C_{iπ(i)}, among the realizable ones."""
    answer: np.ndarray = linear_sum_assignment(cost.numpy())[1]
    return answer


def _potentials(cost: Tensor, diagonal: Tensor, rounding: float) -> Tensor | None:
    """Shortest distances p_j = min_i (p_i + C_ij − C_ii) from a source at distance 0 of all; None where a cycle is
    negative."""
    n = len(cost)
    p = torch.zeros(n, dtype=torch.float64)
    parent = torch.arange(n)
    for _ in range(n):
        best, origin = p.clone(), parent.clone()
        for rows in torch.arange(n).split(max(ROWS // n, 1)):
            least, at = ((p - diagonal)[rows, None] + cost[rows]).min(0)
            better = least < best - rounding
            best = torch.where(better, least, best)
            origin = torch.where(better, rows[at], origin)
        if torch.equal(best, p):
            return p
        p, parent = best, origin
        if _has_cycle(parent):
            return None
    return None


def _has_cycle(parent: Tensor) -> bool:
    """Whether following parents leads into a cycle (other than a node that is its own parent)."""
    at = parent
    for _ in range(max(len(parent) - 1, 1).bit_length()):
        at = at[at]
    return bool((parent[at] != at).any())


def _short_cycle(
    cost: Tensor, diagonal: Tensor, potential: Tensor, bound: float
) -> tuple[float, tuple[int, ...]] | None:
    """The shortest cycle of three neurons or more that is shorter than `bound`; None where there is none."""
    edges = _edges(cost, diagonal, potential, bound)
    if edges is None:
        return None
    n = len(cost)
    best, cycle = bound, None
    _, component = connected_components(edges, directed=True, connection="strong")
    for c in np.flatnonzero(np.bincount(component) > 2):
        nodes = np.flatnonzero(component == c)
        inside = edges[nodes][:, nodes].tocsr()
        back = inside.tocsc()
        for k in range(len(nodes)):
            into = back.indices[back.indptr[k] : back.indptr[k + 1]]
            if not len(into):
                continue
            distance, before = dijkstra(inside, indices=k, limit=best, return_predecessors=True)
            lengths = distance[into] + back.data[back.indptr[k] : back.indptr[k + 1]]
            at = int(lengths.argmin())
            if lengths[at] < best:
                best = float(lengths[at])
                path = [int(into[at])]
                while path[-1] != k:
                    path.append(int(before[path[-1]]))
                cycle = tuple(int(nodes[x]) for x in reversed(path))
    if cycle is None:
        return None
    permutation = np.arange(n)
    permutation[list(cycle)] = np.roll(cycle, -1)
    return max(sensitivity(cost, permutation), 0.0), cycle


def _edges(cost: Tensor, diagonal: Tensor, potential: Tensor, bound: float) -> csr_array | None:
    """Edges of the reduced graph that can lie on a cycle of at least three edges shorter than `bound`."""
    n = len(cost)
    chunks = torch.arange(n).split(max(ROWS // n, 1))

    def reduced(rows: Tensor) -> Tensor:
        block = cost[rows] + (potential - diagonal)[rows, None] - potential[None]
        block.clamp_(min=0)
        block[torch.arange(len(rows)), rows] = torch.inf
        return block

    out, into = torch.full((n,), torch.inf, dtype=torch.float64), torch.full((n,), torch.inf, dtype=torch.float64)
    for rows in chunks:
        block = reduced(rows)
        out[rows] = block.min(1).values
        into = torch.minimum(into, block.min(0).values)
    # three edges or more, out of as many neurons
    if float(out.topk(min(3, n), largest=False).values.sum()) >= bound:
        return None
    heads, tails, lengths = [], [], []
    for rows in chunks:
        block = reduced(rows)
        # such a cycle has an edge into i and another one out of j besides
        at, to = torch.nonzero(block + into[rows, None] + out[None] < bound, as_tuple=True)
        heads.append(rows[at].numpy())
        tails.append(to.numpy())
        lengths.append(block[at, to].numpy())
    row, column = np.concatenate(heads), np.concatenate(tails)
    if not len(row):
        return None
    # a stored zero would be no edge to some of SciPy's routines
    data = np.maximum(np.concatenate(lengths), 1e-300)
    return csr_array((data, (row, column)), shape=(n, n))
