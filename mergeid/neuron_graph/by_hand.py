"""What a person says of a model's neurons: axes to freeze, axes to tie, or a whole graph. It is verified too."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Union

import numpy as np

from mergeid.basics.reading import read_json
from mergeid.errors import MergeidError
from mergeid.neuron_graph.facts import Facts, Labels
from mergeid.neuron_graph.neuron_graph import NeuronGraph

FROZEN_BY_HAND = "frozen by hand"
Given = Union[NeuronGraph, Mapping[str, Any], str, "os.PathLike[str]"]
"""A graph: as such, in the exchange format, or the path of a file in that format."""


@dataclass(frozen=True)
class Constraints:
    """Facts that no forward pass told.

    Attributes:
        freeze: ``"TENSOR[AXIS]"`` or ``"TENSOR"`` (all its axes); TENSOR may be a glob. Nothing there moves.
        tie: pairs of ``"TENSOR[AXIS]"`` of equal length: position i of one moves with position i of the other.
    """

    freeze: Sequence[str] = ()
    tie: Sequence[tuple[str, str]] = ()

    def add_to(self, facts: Facts, axes: Mapping[tuple[str, int], Labels]) -> None:
        """Record them beside what was traced.

        Args:
            axes: (tensor, axis) -> its labels.

        Raises `MergeidError` for a tensor or axis that the model does not have, or a tie of unequal lengths."""
        for text in self.freeze:
            for key in _matching(text, axes):
                facts.freeze(axes[key], FROZEN_BY_HAND)
        for pair in self.tie:
            if isinstance(pair, str) or len(pair) != 2:
                raise MergeidError(
                    f"tie {pair!r} is not a pair; expected two axes, such as ('a.weight[0]', 'b.weight[0]')"
                )
            first, second = (axes[_axis(text, axes)] for text in pair)
            if len(first) != len(second):
                raise MergeidError(
                    f"cannot tie {pair[0]} ({len(first)} positions) to {pair[1]} ({len(second)} positions); "
                    "expected axes of equal length"
                )
            facts.eq(first, second)


def _split(text: str) -> tuple[str, int | None]:
    """``"a.weight[1]"`` as ("a.weight", 1), ``"a.weight"`` as ("a.weight", None)."""
    match = re.fullmatch(r"(.+)\[(\d{1,9})\]", text.strip())
    return (match[1], int(match[2])) if match else (text.strip(), None)


def _matching(text: str, axes: Mapping[tuple[str, int], Labels]) -> list[tuple[str, int]]:
    pattern, axis = _split(text)
    found = [(t, a) for t, a in axes if fnmatchcase(t, pattern) and axis in (None, a)]
    if not found:
        raise MergeidError(f"freeze {text!r} matches no axis of the model{_near(pattern, axes)}")
    return found


def _axis(text: str, axes: Mapping[tuple[str, int], Labels]) -> tuple[str, int]:
    tensor, axis = _split(text)
    if axis is None:
        raise MergeidError(f"tie: {text!r} does not name an axis; expected TENSOR[AXIS], such as 'a.weight[0]'")
    if (tensor, axis) not in axes:
        raise MergeidError(f"tie: the model has no axis {text!r}{_near(tensor, axes)}")
    return tensor, axis


def _near(name: str, axes: Mapping[tuple[str, int], Labels]) -> str:
    return _hint(name, list(dict.fromkeys(t for t, _ in axes)))


def _hint(name: str, tensors: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, tensors, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else f"; expected one of its {len(tensors)} tensors"


def read_graph(given: Given) -> NeuronGraph:
    """A graph that somebody wrote. Raises `MergeidError` where there is none, or it is not a valid one."""
    if isinstance(given, NeuronGraph):
        return given
    if isinstance(given, Mapping):
        return NeuronGraph.from_json(given)
    path = Path(given)
    if not path.exists():
        raise MergeidError(f"no such graph file: {path}; expected JSON as `mergeid graph MODEL --json FILE` writes it")
    parsed = read_json(path, "a neuron graph as `mergeid graph MODEL --json FILE` writes it", own=True)
    try:
        return NeuronGraph.from_json(parsed)
    except MergeidError as error:
        raise MergeidError(f"{path}: {error}") from None


def fitted(graph: NeuronGraph, tensors: Mapping[str, tuple[int, ...]], name: str) -> NeuronGraph:
    """A graph by hand over all tensors of a model, not yet verified.

    Args:
        tensors: the model's floating-point tensors and their shapes.
        name: what the graph calls the model.

    Raises `MergeidError` where the graph speaks of tensors that the model does not have, or has in another shape."""
    for tensor, shape in graph.tensors.items():
        if tensor not in tensors:
            hint = _hint(tensor, list(tensors))
            raise MergeidError(f"the graph names tensor {tensor!r}, which {name} does not have{hint}")
        if tuple(shape) != tuple(tensors[tensor]):
            raise MergeidError(
                f"the graph gives tensor {tensor!r} the shape {list(shape)}, but in {name} it has "
                f"{list(tensors[tensor])}; use the graph of this very architecture"
            )
    covered = {key: np.zeros(n, bool) for key, n in _lengths(tensors).items()}
    for space in graph.spaces:
        for a in space.axes:
            covered[a.tensor, a.axis] |= a.index >= 0
    said = {(t, a) for t, a, _ in graph.frozen}
    silent = [
        (t, a, "not free in the given graph") for (t, a), c in covered.items() if not c.all() and (t, a) not in said
    ]
    return replace(
        graph, model=graph.model or name, tensors=dict(tensors), frozen=[*graph.frozen, *silent], verified=None
    )


def _lengths(tensors: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, int], int]:
    return {(t, a): n for t, shape in tensors.items() for a, n in enumerate(shape)}
