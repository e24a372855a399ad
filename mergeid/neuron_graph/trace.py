"""From a model to its neuron graph: record its forward passes, solve, and lay the cells over the tensors."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from torch import nn

from mergeid.basics.casting import holds_numbers
from mergeid.basics.state import forget_derived, tensors_of
from mergeid.neuron_graph.by_hand import Constraints
from mergeid.neuron_graph.cells import Cell
from mergeid.neuron_graph.neuron_graph import AxisMap, NeuronGraph, Space, TapMap
from mergeid.neuron_graph.recorder import Recorder
from mergeid.neuron_graph.recording import Pass, record
from mergeid.neuron_graph.repeated import extended, shortened, stacks
from mergeid.neuron_graph.solve import Solution, solve

SpaceLabeller = Callable[[list[tuple[str, int]]], "str | None"]


def trace(
    model: nn.Module,
    inputs: Any,
    forward: Callable[[], Any],
    *,
    values: Any = None,
    more: Sequence[Pass] = (),
    constraints: Constraints | None = None,
    name: str = "",
    label: SpaceLabeller | None = None,
) -> NeuronGraph:
    """The neuron graph of a model, not yet verified.

    Args:
        model: in eval mode, on any device, also meta.
        inputs: the tree of input tensors that `forward` uses.
        forward: runs the model on them and returns the task output, whose neurons are frozen.
        values: for a model on the meta device, the inputs with their real values (`mergeid.neuron_graph.shadows`).
        more: further passes, over other inputs, that drive what the first does not; the graph holds for all of them.
        constraints: what is known of the neurons besides. May raise `MergeidError`.
        name: what the graph calls the model.
        label: a human label for a space that lives on these (tensor, axis) pairs.
    """
    state = tensors_of(model, keep_vars=True)
    forget_derived(model)  # what the model computed from its weights earlier would look like a constant
    with _uncollected():
        recorder = record(model, state, [Pass(inputs, forward, values), *more])
        if constraints is not None:
            constraints.add_to(recorder.facts, recorder.axes)
        is_atom = np.zeros(recorder.facts.count, bool)
        for labels in recorder.axes.values():
            is_atom[labels] = True
        solution = solve(recorder.facts, np.flatnonzero(is_atom))
        tensors = {k: tuple(v.shape) for k, v in state.items() if holds_numbers(v)}
        return _lay_out(recorder, solution, tensors, name, label)


def trace_repeated(
    model: nn.Module,
    inputs: Any,
    forward: Callable[[], Any],
    *,
    values: Any = None,
    name: str = "",
    label: SpaceLabeller | None = None,
) -> NeuronGraph | None:
    """The graph of a deep network, traced once per kind of layer (`mergeid.neuron_graph.repeated`; arguments as for
    `trace`). None where it has no stack of layers, or does not run without some of them."""
    found = stacks(model)
    if not found:
        return None
    state = tensors_of(model, keep_vars=True)
    tensors = {k: tuple(v.shape) for k, v in state.items() if holds_numbers(v)}
    try:
        with shortened(model, found):
            short = trace(model, inputs, forward, values=values, name=name, label=label)
        return extended(short, tensors, found, label)
    except Exception:  # whatever a foreign forward says to a missing layer
        return None


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for circles of garbage meanwhile: a large model makes very many arrays, and the search takes a sixth of
    the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass
class _Draft:
    """A space in the making: classes [blocks, members], parents as indices of drafts."""

    members: np.ndarray
    parents: tuple[int, ...]
    block_parents: np.ndarray
    folded: list[np.ndarray]


def _moving(cells: list[Cell]) -> list[bool]:
    moves: list[bool] = []
    for c in cells:
        moves.append(c.members.shape[1] > 1 or any(moves[p] for p in c.parents))
    return moves


def _says(drafts: list[_Draft | None], p: int, in_p: np.ndarray, q: int, in_q: np.ndarray) -> bool:
    """Whether lying in these members of draft p means lying in those of draft q."""
    d = drafts[p]
    if d is None or p == q:
        return False
    block = in_p // d.members.shape[1]
    return any(
        np.array_equal(d.block_parents[block, k], in_q)
        if parent == q
        else _says(drafts, parent, d.block_parents[block, k], q, in_q)
        for k, parent in enumerate(d.parents)
    )


def _simplified(cells: list[Cell]) -> list[_Draft | None]:
    """Drop parents that stand still or follow from other parents; None for cells that never move."""
    moves = _moving(cells)
    drafts: list[_Draft | None] = []
    for cell, m in zip(cells, moves, strict=True):
        given = [(p, cell.block_parents[:, k]) for k, p in enumerate(cell.parents) if drafts[p] is not None]
        columns = _followed(given, drafts)
        said = [x for x in columns if not any(_says(drafts, *other, *x) for other in columns)]
        said.sort(key=lambda x: x[0])
        where = np.stack([c for _, c in said], 1) if said else np.zeros((len(cell.members), 0), np.int64)
        drafts.append(_Draft(cell.members, tuple(p for p, _ in said), where, []) if m else None)
    return drafts


def _followed(given: list[tuple[int, np.ndarray]], drafts: list[_Draft | None]) -> list[tuple[int, np.ndarray]]:
    """The parents, or where one of them only follows, what it follows; one draft may be there in several roles."""
    columns: list[tuple[int, np.ndarray]] = []
    queue = list(given)
    while queue:
        p, column = queue.pop(0)
        draft = drafts[p]
        if draft is None:
            continue
        if draft.members.shape[1] == 1 and draft.parents:
            queue += [(q, draft.block_parents[column, k]) for k, q in enumerate(draft.parents)]
        elif not any(p == q and np.array_equal(column, known) for q, known in columns):
            columns.append((p, column))
    return columns


def _lay_out(
    recorder: Recorder,
    solution: Solution,
    tensors: dict[str, tuple[int, ...]],
    name: str,
    label: SpaceLabeller | None,
) -> NeuronGraph:
    drafts = _simplified(solution.cells)
    draft_of = np.full(len(solution.reason), -1)
    flat_of = np.full(len(draft_of), -1)
    for i, d in enumerate(drafts):
        if d is not None:
            draft_of[d.members.reshape(-1)] = i
            flat_of[d.members.reshape(-1)] = np.arange(d.members.size)
    on_axis = {key: draft_of[solution.class_of[labels]] for key, labels in recorder.axes.items()}
    index_at = {key: flat_of[solution.class_of[labels]] for key, labels in recorder.axes.items()}
    found = {key: _distinct(at) for key, at in on_axis.items()}
    home = _homes(drafts, on_axis, index_at)

    spaces: list[Space] = []
    taps: dict[str, list[TapMap]] = {}
    order = [i for i, d in enumerate(drafts) if d is not None and home[i][0] == i]
    ids = {i: f"s{n}" for n, i in enumerate(order)}
    shift = {i: home[i][1] for i in range(len(drafts)) if drafts[i] is not None}
    size: Counter[int] = Counter()
    blocks: Counter[int] = Counter()
    for i, d in enumerate(drafts):
        if d is not None and _merged(drafts, home, i):
            size[home[i][0]] += d.members.size
            blocks[home[i][0]] += d.members.shape[0]

    def where(draft_at: np.ndarray, flat: np.ndarray, target: int) -> np.ndarray:
        index = np.full(len(draft_at), -1)
        for i in _distinct(draft_at):
            if home[i][0] == target:
                d = drafts[i]
                assert d is not None
                hit = draft_at == i
                if _merged(drafts, home, i):
                    index[hit] = flat[hit] + shift[i]
                else:
                    index[hit] = d.block_parents[flat[hit], 0] + shift[d.parents[0]]
        return index

    lives: dict[int, list[tuple[str, int]]] = {i: [] for i in order}
    for key, drafts_here in found.items():
        for t in sorted({home[i][0] for i in drafts_here}):
            lives[t].append(key)
    for i in order:
        d = drafts[i]
        assert d is not None
        axes = tuple(AxisMap(t, a, where(on_axis[t, a], index_at[t, a], i)) for t, a in lives[i])
        parents = tuple(ids[home[p][0]] for p in d.parents)
        block_parents = d.block_parents.copy()
        for k, p in enumerate(d.parents):
            block_parents[:, k] += shift[p]
        if not parents:
            block_parents = np.zeros((blocks[i], 0), np.int64)
        text = (label(lives[i]) if label and lives[i] else None) or (
            f"{lives[i][0][0]}[{lives[i][0][1]}]" if lives[i] else "blocks"
        )
        spaces.append(Space(ids[i], text, size[i], blocks[i], parents, block_parents, axes))
    _label_roots(spaces, label)

    for tap in recorder.taps:
        at = draft_of[solution.class_of[tap.labels]]
        flat = flat_of[solution.class_of[tap.labels]]
        for t in sorted({home[i][0] for i in _distinct(at)}):
            seen = TapMap(tap.module, tap.kind, tap.call, tap.ndim, tap.dims, where(at, flat, t))
            taps.setdefault(ids[t], []).append(seen)
    return NeuronGraph(
        name,
        tensors,
        spaces,
        _frozen_axes(recorder, solution, on_axis),
        taps,
        _versions(),
        None,
        dict(recorder.unknown),
    )


def _distinct(at: np.ndarray) -> list[int]:
    """The small integers from 0 that occur, ascending."""
    answer: list[int] = np.flatnonzero(np.bincount(at[at >= 0])).tolist()
    return answer


def _merged(drafts: list[_Draft | None], home: dict[int, tuple[int, int]], i: int) -> bool:
    """Whether draft i is a space or blocks of one, rather than folded into its parent."""
    d = drafts[i]
    assert d is not None
    return not (d.parents and home[i][0] != i)


def _homes(
    drafts: list[_Draft | None],
    on_axis: Mapping[tuple[str, int], np.ndarray],
    index_at: Mapping[tuple[str, int], np.ndarray],
) -> dict[int, tuple[int, int]]:
    """draft -> (the draft whose space it belongs to, offset of its flat members there).

    Parentless drafts on the same axes are blocks of one space. A draft that only follows one parent is folded into
    it, where each member's positions come in one order.
    """
    lives: dict[int, set[tuple[tuple[str, int], int]]] = {}
    for key, at in on_axis.items():
        counts = np.bincount(at[at >= 0])
        for i in np.flatnonzero(counts).tolist():
            lives.setdefault(i, set()).add((key, int(counts[i])))
    home: dict[int, tuple[int, int]] = {}
    first: dict[Any, tuple[int, int]] = {}
    has_children = {p for d in drafts if d is not None for p in d.parents}
    for i, d in enumerate(drafts):
        if d is None:
            continue
        home[i] = (i, 0)
        if not d.parents:
            alike = (frozenset(lives.get(i, ())), d.members.shape[1], None if i not in has_children else i)
            if alike in first:
                home[i] = first[alike]
            first[alike] = (home[i][0], home[i][1] + d.members.size)
        elif len(d.parents) == 1 and d.members.shape[1] == 1 and home[d.parents[0]][0] == d.parents[0]:
            home[i] = (d.parents[0], 0) if i not in has_children else (i, 0)
    # positions of every member must come in the same order of drafts
    for key, at in on_axis.items():
        here = _distinct(at)
        for target in {home[i][0] for i in here}:
            mine = [i for i in here if home[i][0] == target and i != target]
            mine = [i for i in mine if drafts[i] is not None and drafts[i].parents]  # type: ignore[union-attr]
            if mine and not _same_order(at, index_at[key], drafts, mine, target):
                for i in mine:
                    home[i] = (i, 0)
    return home


def _same_order(at: np.ndarray, index: np.ndarray, drafts: list[_Draft | None], folded: list[int], target: int) -> bool:
    """Whether every member of `target` has the same sequence of drafts on its positions."""
    where = np.flatnonzero(np.isin(at, [*folded, target]))
    member = index[where].copy()
    for i in folded:
        d = drafts[i]
        assert d is not None
        here = at[where] == i
        member[here] = d.block_parents[member[here], 0]
    sequence = at[where][np.argsort(member, kind="stable")]
    count = np.unique(member, return_counts=True)[1]
    return bool((count == count[0]).all() and (sequence.reshape(len(count), -1) == sequence[: count[0]]).all())


def _label_roots(spaces: list[Space], label: SpaceLabeller | None) -> None:
    """A space without axes of its own (heads) is named after what lies in it."""
    for k, s in enumerate(spaces):
        if not s.axes:
            below = [(a.tensor, a.axis) for c in spaces if s.id in c.parents for a in c.axes]
            if below:
                text = (label(below) if label else None) or f"blocks of {below[0][0]}[{below[0][1]}]"
                spaces[k] = Space(s.id, text, s.size, s.blocks, s.parents, s.block_parents, s.axes)


def _frozen_axes(
    recorder: Recorder, solution: Solution, on_axis: Mapping[tuple[str, int], np.ndarray]
) -> list[tuple[str, int, str]]:
    out = []
    for (tensor, axis), at in on_axis.items():
        if (at >= 0).all():
            continue
        classes = solution.class_of[recorder.axes[tensor, axis]][at < 0]
        why = Counter(solution.reason[classes].tolist()).most_common(1)[0][0]
        text = solution.reasons[why] if why >= 0 else "single neuron"
        out.append((tensor, axis, text))
    return out


def _versions() -> dict[str, str]:
    found = {}
    for package in ("mergeid", "torch", "timm", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
