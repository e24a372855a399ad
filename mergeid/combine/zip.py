"""ZipIt! (Stoica et al. 2024, "ZipIt! Merging models from different tasks without training").

Features of both models at one space are paired greedily by their correlation, within one model too, so that n merged
features stand for 2n. Weights that write a space are merged (the mean of a pair), weights that read it are unmerged
(both partners read the pair's one feature). A zip may end at a layer: what comes after stays apart, two heads on one
trunk, each reading the merged features through its own unmerge.

Spaces without others inside (convolutional networks, multilayer perceptrons): heads of attention are not zipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mergeid.basics.state import tensors_of
from mergeid.errors import MergeidError
from mergeid.evidence.activations import PairStream, TapReader
from mergeid.evidence.taps import choose_taps
from mergeid.matchers.sides import side
from mergeid.models.running import fits_the_model
from mergeid.neuron_graph.neuron_graph import AxisMap, NeuronGraph


@dataclass(frozen=True)
class Zipped:
    """Two models with one trunk.

    Attributes:
        trunk: names of the tensors that both share.
        states: A's and B's state dicts; the trunk's tensors are the same in both.
        within: space id -> share of the merged features that come from one model alone.
    """

    trunk: tuple[str, ...]
    states: tuple[dict[str, Tensor], dict[str, Tensor]]
    within: dict[str, float]


def joint_correlations(
    graph: NeuronGraph,
    models: tuple[nn.Module, nn.Module],
    forward: Callable[[nn.Module, Any], Any],
    batches: Callable[[], Iterator[Mapping[str, Any]]],
) -> dict[str, np.ndarray]:
    """Space id -> float64 [2n, 2n] Pearson correlations of A's n features and B's n; features that never change
    correlate with nothing. One pass, in float64."""
    taps = {k: found[:1] for k, found in choose_taps(graph, models[0]).items()}
    flat = [t for found in taps.values() for t in found]

    def fitting(model: nn.Module, batch: Any) -> Any:
        with fits_the_model(batch):
            return forward(model, batch)

    stream = PairStream(TapReader(models[0], fitting, flat), TapReader(models[1], fitting, flat), batches)
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    for space, _, a, b in stream.rows(taps):
        if a.values.shape[1] != graph.by_id[space].size:
            continue
        both = torch.cat([a.values, b.values], 1).double()
        count, total, gram = sums.get(space, (0, torch.zeros(()), torch.zeros(())))
        sums[space] = (count + len(both), total + both.sum(0), gram + both.T @ both)
    out = {}
    for space, (count, total, gram) in sums.items():
        if (space, 0) in stream.routed:
            continue
        mean = total / count
        covariance = gram / count - torch.outer(mean, mean)
        spread = covariance.diagonal().clamp(min=0).sqrt()
        moves = spread > 1e-6 * float(spread.max())
        scale = torch.where(moves, 1 / spread.clamp(min=1e-300), torch.zeros_like(spread))
        out[space] = (covariance * torch.outer(scale, scale)).numpy()
    return out


def pairs_of(correlation: np.ndarray, *, within: bool = True) -> np.ndarray:
    """int [n, 2]: disjoint pairs of the 2n features, greedily by the highest correlation, each pair ascending and pairs
    in order. Ties go to feature i of A with feature i of B, then to the earlier pair.

    Args:
        correlation: [2n, 2n].
        within: whether features of one model may be paired.
    """
    n = len(correlation) // 2
    rows, columns = np.triu_indices(2 * n, 1)
    if not within:
        across = (rows < n) & (columns >= n)
        rows, columns = rows[across], columns[across]
    order = np.lexsort((columns, rows, columns - rows != n, -np.round(correlation[rows, columns], 9)))
    free = np.ones(2 * n, bool)
    pairs = []
    for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if free[i] and free[j]:
            free[i] = free[j] = False
            pairs.append((i, j))
            if len(pairs) == n:
                break
    return np.array(sorted(pairs))


def spaces_up_to(graph: NeuronGraph, model: nn.Module, module: str) -> set[str]:
    """The spaces that only layers up to this module write, itself included; the state dict's order is that of layers.

    Raises `MergeidError` for a module that has no tensors in the graph.
    """
    place = {name: i for i, name in enumerate(graph.tensors)}
    own = [i for name, i in place.items() if name.startswith(f"{module}.")]
    if not own:
        raise MergeidError(f"{graph.model} has no module {module!r} with weights to zip up to")
    return {
        s.id
        for s in graph.spaces
        if all(place[a.tensor] <= max(own) or side(graph, model, a.tensor, a.axis) == "in" for a in s.axes)
    }


def zip_models(
    graph: NeuronGraph,
    models: tuple[nn.Module, nn.Module],
    correlations: Mapping[str, np.ndarray],
    *,
    spaces: Collection[str] | None = None,
    within: bool = True,
) -> Zipped:
    """Zip two models.

    Args:
        correlations: of `joint_correlations`.
        spaces: ids of what is zipped (`spaces_up_to`); default: every space. What reads a zipped space without
            writing another stays apart, as do classifiers.
        within: whether features of one model may be merged.

    Raises `MergeidError` where a space has no correlations, lies in another, or is read before the zip ends.
    """
    chosen = [s for s in graph.spaces if spaces is None or s.id in spaces]
    maps: dict[str, tuple[Tensor, Tensor]] = {}
    shares: dict[str, float] = {}
    for s in chosen:
        if s.parents or graph.children(s):
            raise MergeidError(
                f"{s.label!r} is inside attention heads or contains them; only convolutional networks and "
                f"perceptrons can be zipped"
            )
        if s.id not in correlations:
            raise MergeidError(f"the activations of {s.label!r} cannot be read; leave it out")
        pairs = pairs_of(correlations[s.id], within=within)
        shares[s.id] = float(((pairs[:, 0] < s.size) == (pairs[:, 1] < s.size)).mean())
        gather = torch.zeros(s.size, 2 * s.size, dtype=torch.float64)
        gather[torch.arange(s.size)[:, None], torch.from_numpy(_in_place(pairs, s.size))] = 1
        maps[s.id] = (gather[:, : s.size], gather[:, s.size :])
    given = [tensors_of(m) for m in models]
    trunk: list[str] = []
    states: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, ours in given[0].items():
        on = [(s, a, side(graph, models[0], name, a.axis)) for s, a in graph.on_tensor.get(name, [])]
        written = [s.id for s, _, where in on if where == "out"]
        moved = [_moved(ours if m == 0 else given[1][name], on, maps, m) for m in range(2)]
        if written and all(s in maps for s in written):
            unread = [s.label for s, _, where in on if where == "in" and s.id not in maps]
            if unread:
                raise MergeidError(f"{name!r} is zipped but reads {unread[0]!r}, which is not")
            trunk.append(name)
            merged = (moved[0] + moved[1]).to(ours.dtype)
            states[0][name] = states[1][name] = merged
        else:
            for state, value in zip(states, moved, strict=True):
                state[name] = value.to(ours.dtype)
    return Zipped(tuple(trunk), states, shares)


class TwoHeads(nn.Module):
    """Two models with the trunk's parameters and buffers shared; calling it gives both outputs. It is run as two
    models: what is saved is memory, not time.

    Args:
        heads: both models, with their weights; the second is given the first one's tensors of the trunk.
        trunk: names of the tensors that both share.
    """

    def __init__(self, heads: tuple[nn.Module, nn.Module], trunk: Collection[str]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        for name in trunk:
            path, _, leaf = name.rpartition(".")
            first, second = (head.get_submodule(path) for head in heads)
            held = first._parameters if leaf in first._parameters else first._buffers
            (second._parameters if leaf in second._parameters else second._buffers)[leaf] = held[leaf]  # type: ignore[assignment]

    @classmethod
    def of(cls, models: tuple[nn.Module, nn.Module], zipped: Zipped) -> TwoHeads:
        """Of copies of the models that were zipped."""
        heads = copy.deepcopy(models[0]), copy.deepcopy(models[1])
        for head, state in zip(heads, zipped.states, strict=True):
            head.load_state_dict(state, strict=False)
        return cls(heads, zipped.trunk)

    def forward(self, *args: object, **kwargs: object) -> tuple[Any, Any]:
        return self.heads[0](*args, **kwargs), self.heads[1](*args, **kwargs)


def _in_place(pairs: np.ndarray, n: int) -> np.ndarray:
    """The pairs in an order in which each pair that holds a feature of A stands where its first does, if it can."""
    out = np.full((n, 2), -1)
    left = []
    for pair in pairs:
        if pair[0] < n and out[pair[0], 0] < 0:
            out[pair[0]] = pair
        else:
            left.append(pair)
    if left:
        out[out[:, 0] < 0] = left
    return out


def _moved(value: Tensor, on: list[Any], maps: Mapping[str, tuple[Tensor, Tensor]], m: int) -> Tensor:
    """Model m's part of a merged tensor: halves where it writes, copies where it reads."""
    if not value.is_floating_point():
        return value
    out = value.double()
    for space, axis, where in on:
        if space.id in maps:
            gather = maps[space.id][m]
            out = _along(out, axis, gather / 2 if where == "out" else gather)
    return out


def _along(value: Tensor, axis: AxisMap, matrix: Tensor) -> Tensor:
    """[size, size] acting on the members of an axis; positions that stand still are kept."""
    members = torch.from_numpy(axis.members)
    where = torch.from_numpy(axis.positions).to(value.device)
    front = value.movedim(axis.axis, 0)
    moved = matrix[members][:, members].to(value.device) @ front[where].reshape(len(members), -1)
    new = front.index_copy(0, where.reshape(-1), moved.reshape(-1, *front.shape[1:]))
    return new.movedim(0, axis.axis)
