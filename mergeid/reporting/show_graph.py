"""The table of a neuron graph: space, size, group, where it lives, share of the parameters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from rich.text import Text

from mergeid.errors import shown
from mergeid.reporting.tables import Column, make_table, percent

if TYPE_CHECKING:
    from rich.console import Console

    from mergeid.neuron_graph.neuron_graph import NeuronGraph, Space

LINES = 3
"""Lines that one space may take for its axes."""

WIDE = 110
"""Columns of a terminal from which the axes get a column of their own."""


def pattern(name: str) -> str:
    """A dotted name with its numbers replaced: ``blocks.3.attn`` is ``blocks.*.attn``."""
    return re.sub(r"(?<![^.\s])\d+(?![^.\s\[])", "*", name)


def places(axes: Iterable[tuple[str, int]], tensors: Mapping[str, tuple[int, ...]] | None = None) -> list[str]:
    """(tensor, axis) pairs in short: numbers become ``*``, siblings share a brace; matrices come before vectors.

    ``[("l.0.fc.weight", 0), ("l.0.fc.bias", 0), ("l.1.fc.weight", 0)]`` gives ``["l.*.fc.{weight,bias}[0]"]``.

    Args:
        tensors: all tensors with their shapes; where every one of a kind is meant, ``bn.*[0]`` says so."""
    shapes = tensors or {}
    leaves: dict[tuple[str, int], dict[str, None]] = {}
    for tensor, axis in sorted(axes, key=lambda pair: len(shapes.get(pair[0], ())) < 2):
        stem, _, leaf = pattern(tensor).rpartition(".")
        leaves.setdefault((stem, axis), {})[leaf] = None
    siblings: dict[str, set[str]] = {}
    for tensor in shapes:
        stem, _, leaf = pattern(tensor).rpartition(".")
        siblings.setdefault(stem, set()).add(leaf)
    out = []
    for (stem, axis), names in leaves.items():
        last = next(iter(names)) if len(names) == 1 else "{" + ",".join(names) + "}"
        if len(names) > 2 and siblings.get(stem) == set(names):
            last = "*"
        out.append(f"{stem}.{last}[{axis}]" if stem else f"{last}[{axis}]")
    return out


def alike(graph: NeuronGraph) -> list[list[Space]]:
    """Spaces that differ only in the number of their layer, together; in order of appearance."""
    rows: dict[tuple[object, ...], list[Space]] = {}
    keys: dict[str, tuple[object, ...]] = {}
    for space in graph.spaces:
        axes = tuple(sorted({(pattern(a.tensor), a.axis) for a in space.axes}))
        below = tuple(sorted(pattern(a.tensor) for child in graph.children(space) for a in child.axes))
        parents = tuple(keys[p] for p in space.parents)
        keys[space.id] = key = (axes or below, space.size, space.blocks, parents)
        rows.setdefault(key, []).append(space)
    return list(rows.values())


def print_graph(graph: NeuronGraph, console: Console, *, every: bool = False) -> None:
    """The table, and below it what is free, what was proven and what is frozen.

    Args:
        every: one row for each space and all of its axes, nothing summarised.
    """
    stacked = console.width < WIDE
    columns = [
        Column("id"),
        Column("space and its tensor[axis]" if stacked else "space", shrink=True, min_width=16),
        Column("size", "right"),
        Column("group"),
        Column("acts on (tensor[axis])", shrink=True, min_width=22),
        Column("share", "right"),
    ]
    groups = [[s] for s in graph.spaces] if every else alike(graph)
    heads, below = [], []
    for spaces in groups:
        first = spaces[0]
        axes = [(a.tensor, a.axis) for a in first.axes]
        lines = [f"{t}[{a}]" for t, a in axes] if every else places(axes, graph.tensors)
        if not every and len(lines) > LINES:
            lines = [*lines[: LINES - 1], f"and {len(lines) - LINES + 1} more"]
        below.append(lines or ["contains"])
        label = first.label if len(spaces) == 1 else f"{len(spaces)} × {pattern(first.label)}"
        share = percent(_share(graph, spaces)) if first.axes else "–"
        heads.append([_ids(spaces), label, f"{first.size:,}", _group(first, len(spaces) > 1), share])
    taken = sum(max((len(h[k]) for h in heads), default=0) for k in (0, 2, 3, 4)) + 10
    room = max(console.width - taken, 20)
    rows: list[list[Any]] = []
    for head, lines in zip(heads, below, strict=True):
        if stacked:
            rows.append(head)
            rows += [["", Text(f"  {ending(line, room - 2)}", style="dim"), "", "", ""] for line in lines]
        else:
            short = [ending(line, room * 3 // 5) for line in lines]
            rows.append([*head[:4], short[0], head[4]])
            rows += [["", "", "", "", line, ""] for line in short[1:]]
    if stacked:
        columns.pop(4)
    console.print(make_table(columns, rows, width=console.width, title=f"{graph.model}: {len(graph.spaces)} spaces"))
    for line in footer(graph, collapsed=len(groups) < len(graph.spaces)):
        console.print(line, markup=False)


def ending(name: str, width: int) -> str:
    """A dotted name in at most `width` cells where its parts allow: the first ones make place for an ellipsis."""
    parts = name.split(".")
    while len(name) > width and len(parts) > 2:
        parts = parts[1:]
        name = "…" + ".".join(parts)
    return name


def _ids(spaces: Sequence[Space]) -> str:
    if len(spaces) < 3:
        return ", ".join(s.id for s in spaces)
    return f"{spaces[0].id} … {spaces[-1].id}"


def _group(space: Space, many: bool) -> str:
    """The group; of several like spaces, that of the first, whose parent is the first of like ones too."""
    return f"{space.group} …" if many and space.parents else space.group


def _share(graph: NeuronGraph, spaces: Sequence[Space]) -> float:
    """Share of all parameters that lie on an axis of one of these spaces."""
    import numpy as np

    held: dict[str, list[np.ndarray]] = {}
    for axis in (a for s in spaces for a in s.axes):
        free = held.setdefault(axis.tensor, [np.ones(n, bool) for n in graph.tensors[axis.tensor]])
        free[axis.axis] &= axis.index < 0
    count = sum(prod(graph.tensors[t]) - prod(int(h.sum()) for h in rest) for t, rest in held.items())
    return count / max(_parameters(graph), 1)


def footer(graph: NeuronGraph, *, collapsed: bool) -> list[str]:
    """What the table adds up to, one sentence per line."""
    total = f"{_parameters(graph):,} parameters (running statistics included)"
    lines = [f"Can be permuted: {percent(graph.share, 2)} of {total}."]
    if graph.verified:
        missed = graph.verified.get("error_when_misapplied")
        power = (
            ""
            if missed is None
            else f" As a check, permuting one axis of each space alone changes them by {missed:.1g}."
        )
        lines.append(
            f"Verified: {graph.verified['samples']} random permutations leave the outputs unchanged, to a relative "
            f"error of {graph.verified['max_relative_error']:.1e} ({graph.verified['dtype']}).{power}"
            + verified_on(graph.verified)
        )
        if noise := graph.verified.get("noise"):
            names = ", ".join(map(shown, noise[:5])) + (f" and {len(noise) - 5} more" if len(noise) > 5 else "")
            lines.append(f"Not compared, because rounding alone changes them as much: {names}.")
    else:
        lines.append("Not verified.")
    if graph.frozen:
        lines.append(f"Frozen: {len(graph.frozen)} axes. " + frozen_summary(graph))
    if graph.unknown_ops:
        names = ", ".join(sorted(graph.unknown_ops))
        lines.append(f"Operations without a rule (their neurons are frozen): {names}.")
    if collapsed:
        lines.append(
            "Similar spaces share a row; --all lists each one. To see why an axis is frozen: --why 'TENSOR[AXIS]'."
        )
    return lines


def frozen_summary(graph: NeuronGraph, most: int = 4) -> str:
    """The commonest reasons with their counts: ``40 kernel position; 3 …``."""
    counts = Counter(re.sub(r" at [\w.*]+$", "", why) for _, _, why in graph.frozen)
    listed = [f"{why}: {n}" for why, n in counts.most_common(most)]
    rest = len(graph.frozen) - sum(n for _, n in counts.most_common(most))
    return "; ".join(listed) + (f"; other: {rest}" if rest else "") + "."


def _parameters(graph: NeuronGraph) -> int:
    return sum(prod(shape) for shape in graph.tensors.values())


def verified_on(verified: Mapping[str, Any]) -> str:
    """What was verified in place of a model too large to run here."""
    if "on" not in verified:
        return ""
    return (
        f" This model is too large to run here: traced without weights, verified on {verified['on']}, where "
        f"{verified['places']} of the {verified['of']} kinds of free axes were permuted."
    )
