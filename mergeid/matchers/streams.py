"""B's residual stream brought onto A's: signs of its neurons, or an orthogonal map of all of them.

They are read off those weights whose other axes stand still, such as embeddings and heads, since there row by row is
known. An orthogonal map (Procrustes; Schönemann 1966) has many parameters and fits anything where rows are few: it
counts only if rows that it was not fitted on say so too. Gains of norms stand in the way of orthogonal maps: B's are
folded into what reads them, and A's taken out again, so that B has A's gains afterwards (Ashkboos et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergeid.neuron_graph.neuron_graph import NeuronGraph
from mergeid.neuron_graph.scaled import Column, Stream
from mergeid.neuron_graph.turned import FULL, STREAM, Turn, Turnable, TurnedAxis, nearest

ALIKE = 0.7
"""Cosine of a neuron of B and one of A, up to the sign, from which on they are one neuron."""
REACHED = 0.8
"""Cosine that an orthogonal map must reach on rows that it was not fitted on."""
CLEAR = 0.5
"""Share of the distance that may be left, of what a permutation with signs leaves."""
ROWS = 8
"""Rows that say anything of signs."""
UNSEEN = 4
"""One row in so many judges."""
STEEP = 1e4
"""Ratio of a norm's gains beyond which they cannot be taken out."""

States = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Carried:
    """What brings B's stream onto A's.

    Attributes:
        turn: None where the stream lies well.
        refused: why an orthogonal map that would do was not taken.
    """

    turn: Turn | None = None
    refused: str = ""


def anchored(graph: NeuronGraph, space: str) -> set[tuple[str, int]]:
    """(tensor, axis) of the matrices on which nothing moves but this space."""
    return {
        (axis.tensor, axis.axis)
        for axis in graph.by_id[space].axes
        if len(graph.tensors[axis.tensor]) > 1
        and len(axis.members) == graph.by_id[space].size
        and axis.positions.shape[1] == 1
        and {axis.axis} == {other.axis for _, other in graph.on_tensor[axis.tensor]}
    }


def may_differ(graph: NeuronGraph, space: str, states: States) -> bool:
    """Whether any neuron of B looks like one of A's with another sign, before anything is known of gains."""
    for name, axis in anchored(graph, space):
        on = next(a for a in graph.by_id[space].axes if a.tensor == name and a.axis == axis)
        x, y = (_columns(s[name], axis, on.positions[:, 0]) for s in states)
        if len(x) >= ROWS and bool((_cosines(x, y) < -ALIKE).any()):
            return True
    return False


def carried(graph: NeuronGraph, stream: Stream, states: States) -> Carried:
    """What brings B's stream nearest to A's, where it is clearly nearer so."""
    anchors = anchored(graph, stream.space)
    found = [c for c in stream.flips if (c.tensors[0], c.axis) in anchors]
    if not found:
        return Carried()
    a, b = (_anchors(stream, found, state) for state in states)
    if len(a) < ROWS or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return Carried()
    cosines = _cosines(a, b).numpy()
    order = linear_sum_assignment(np.abs(cosines), maximize=True)[1]
    met = cosines[np.arange(stream.size), order]
    signs = np.ones(stream.size)
    signs[order] = np.where(met < -ALIKE, -1.0, 1.0)
    flipped = Carried(stream.sign(signs) if (signs < 0).any() else None)
    judging = torch.arange(len(a)) % UNSEEN == UNSEEN - 1
    fitted = torch.from_numpy(nearest(FULL, (a[~judging].T @ b[~judging]).numpy()))
    reached = _cosine(a[judging], b[judging] @ fitted.T)
    otherwise = _cosine(a[judging], (b * torch.from_numpy(signs))[judging][:, torch.from_numpy(order)])
    if reached < REACHED or 1 - reached > CLEAR * (1 - otherwise) or 1 - otherwise < 1e-6:
        return flipped
    why = refused(stream, states)
    if why:
        return Carried(flipped.turn, why)
    return Carried(rotation(stream, nearest(FULL, (a.T @ b).numpy()), states))


def refused(stream: Stream, states: States) -> str:
    """Why this stream cannot be rotated, by its graph and these gains; empty where it can."""
    whole = [*stream.flips, *(gain for gain, _ in stream.gains), *stream.fixed]
    if any(len(c.members) != stream.size or c.positions.shape[1] > 1 for c in whole):
        return "parts of it lie alone on some weights"
    read = {id(reader) for _, readers in stream.gains for reader in readers}
    if sum(len(readers) for _, readers in stream.gains) != len(read):
        return "some weights are read through two gains"
    for state in states:
        for gain, _ in stream.gains:
            size = _vector(state, gain).abs()
            if not float(size.min()) * STEEP > float(size.max()):
                return f"gains of {gain.tensors[0]} are next to zero"
        for column in stream.fixed:
            value = _vector(state, column)
            if not float((value - value[0]).abs().max()) <= 1e-6 * max(float(value.abs().max()), 1e-30):
                return (
                    f"{column.tensors[0]} differs from neuron to neuron and cannot be folded into what reads it "
                    "(a tied head, or a gain of another form)"
                )
    return ""


def rotation(stream: Stream, matrix: np.ndarray, states: States) -> Turn:
    """B under the map; its gains become A's."""
    maps, axes = [matrix], []
    through = {id(reader): k for k, (_, readers) in enumerate(stream.gains) for reader in readers}
    ours, theirs = ([_vector(state, gain).numpy() for gain, _ in stream.gains] for state in states)
    place: dict[int, int] = {}
    for column in stream.flips:
        k = through.get(id(column))
        if k is not None and k not in place:
            place[k] = len(maps)
            maps.append(matrix * theirs[k] / ours[k][:, None])
        axes += _axes(column, 0 if k is None else place[k])
    for (gain, _), mine, its in zip(stream.gains, ours, theirs, strict=True):
        axes += _axes(gain, len(maps))
        maps.append(np.diag(mine / its))
    return Turn(Turnable(stream.space, STREAM, len(maps), stream.size, tuple(axes)), np.stack(maps))


def _axes(column: Column, unit: int) -> list[TurnedAxis]:
    at = column.positions[:, 0][None]
    return [TurnedAxis(name, column.axis, at, np.array([unit])) for name in column.tensors]


def _anchors(stream: Stream, found: Sequence[Column], state: Mapping[str, Tensor]) -> Tensor:
    """float64 [rows, neurons], gains folded in, each tensor divided by its root mean square."""
    through = {id(reader): gain for gain, readers in stream.gains for reader in readers}
    parts = []
    for column in found:
        rows = _columns(state[column.tensors[0]], column.axis, column.positions[:, 0])
        if id(column) in through:
            rows = rows * _vector(state, through[id(column)])
        size = float(rows.square().mean().sqrt())
        parts.append(rows / size if size > 0 else rows)
    return torch.cat(parts)


def _columns(value: Tensor, axis: int, positions: np.ndarray) -> Tensor:
    """float64 [all else, neurons]."""
    return value.detach().cpu().double().movedim(axis, -1)[..., torch.from_numpy(positions)].flatten(0, -2)


def _vector(state: Mapping[str, Tensor], column: Column) -> Tensor:
    out = torch.empty(len(column.members), dtype=torch.float64)
    out[torch.from_numpy(column.members)] = state[column.tensors[0]].detach().cpu().double()[column.positions[:, 0]]
    return out


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """[A's neurons, B's neurons]."""
    x, y = (v / v.norm(dim=0).clamp(min=1e-30) for v in (x, y))
    return x.T @ y


def _cosine(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-30))
