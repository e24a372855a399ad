"""The neuron graph of one architecture: which axis of which tensor belongs to which space of neurons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeid.errors import MergeidError
from mergeid.neuron_graph.exchange import check_graph, parsed, written
from mergeid.neuron_graph.group import Structure, block_images, random_permutations
from mergeid.neuron_graph.space import AxisMap as AxisMap
from mergeid.neuron_graph.space import Element as Element
from mergeid.neuron_graph.space import Space as Space
from mergeid.neuron_graph.space import TapMap as TapMap

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from mergeid.neuron_graph.scaled import Powers
    from mergeid.neuron_graph.turned import Turnable


@dataclass
class NeuronGraph:
    """Spaces (parents first) over the axes of named tensors; applying a group element to all axes at once leaves
    the network's function unchanged.

    Attributes:
        tensors: tensor name -> shape (floating-point tensors of the state dict).
        frozen: (tensor, axis, why) for every axis with a frozen position.
        taps: space id -> places where its activations can be read.
        verified: ``{"max_relative_error", "error_when_misapplied", "samples", "dtype"}`` once proven; the second is
            the error when every space moves on one axis only, None where none has two.
        turnable: what may be turned inside heads (`mergeid.neuron_graph.turns`); None: not looked for yet.
        powers: scales and signs (`mergeid.neuron_graph.powers`); None: not looked for yet.
    """

    model: str
    tensors: dict[str, tuple[int, ...]]
    spaces: list[Space]
    frozen: list[tuple[str, int, str]]
    taps: dict[str, list[TapMap]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    verified: dict[str, Any] | None = None
    unknown_ops: dict[str, str] = field(default_factory=dict)
    turnable: tuple[Turnable, ...] | None = field(default=None, compare=False)
    powers: Powers | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        proven = "verified" if self.verified else "not verified"
        return f"NeuronGraph({self.model!r}, {len(self.spaces)} spaces on {len(self.tensors)} tensors, {proven})"

    @cached_property
    def by_id(self) -> dict[str, Space]:
        """The spaces by their ids."""
        return {s.id: s for s in self.spaces}

    @cached_property
    def on_tensor(self) -> dict[str, list[tuple[Space, AxisMap]]]:
        """Tensor name -> the spaces on its axes."""
        out: dict[str, list[tuple[Space, AxisMap]]] = {}
        for s in self.spaces:
            for a in s.axes:
                out.setdefault(a.tensor, []).append((s, a))
        return out

    def children(self, space: Space) -> list[Space]:
        """The spaces whose blocks lie in it."""
        return [s for s in self.spaces if space.id in s.parents]

    def free_share(self, tensor: str) -> float:
        """Share of a tensor's parameters that lie on at least one free axis."""
        shape = self.tensors[tensor]
        held = [np.ones(n, bool) for n in shape]
        for _, a in self.on_tensor.get(tensor, []):
            held[a.axis] &= a.index < 0
        total = prod(shape)
        return 1 - prod(int(h.sum()) for h in held) / total if total else 0.0

    @property
    def share(self) -> float:
        """Parameters on a free axis / all parameters."""
        total = sum(prod(s) for s in self.tensors.values())
        return sum(self.free_share(t) * prod(s) for t, s in self.tensors.items()) / total if total else 0.0

    def share_of(self, space: Space) -> float:
        """Share of all parameters that lie on an axis of this space."""
        total = sum(prod(s) for s in self.tensors.values())
        count = 0.0
        for tensor in {a.tensor for a in space.axes}:
            shape = self.tensors[tensor]
            held = [np.ones(n, bool) for n in shape]
            for a in space.axes:
                if a.tensor == tensor:
                    held[a.axis] &= a.index < 0
            count += prod(shape) - prod(int(h.sum()) for h in held)
        return count / total if total else 0.0

    # -- group elements ----------------------------------------------------------------------------------

    @cached_property
    def structures(self) -> list[Structure]:
        """Of every space: (blocks, members), the places of its parents, and which members hold its blocks."""
        at = {s.id: i for i, s in enumerate(self.spaces)}
        return [((s.blocks, s.members), tuple(at[p] for p in s.parents), s.block_parents) for s in self.spaces]

    def identity(self) -> Element:
        """The element that moves nothing."""
        return {s.id: np.arange(s.size) for s in self.spaces}

    def random_element(self, generator: Generator, only: Iterable[str] | None = None) -> Element:
        """A uniformly random group element. `only`: move nothing but these spaces, and what lies in them follows
        with its members in order."""
        import torch

        chosen = None if only is None else set(only)
        perms: list[np.ndarray] = []
        for i, s in enumerate(self.spaces):
            moves = chosen is None or s.id in chosen

            def draw(n: int, moves: bool = moves) -> np.ndarray:
                return torch.randperm(n, generator=generator).numpy() if moves else np.arange(n)

            (blocks, size), parents, _ = self.structures[i]
            images = block_images(self.structures[i], [perms[p] for p in parents], i)
            inner = np.stack([draw(size) for _ in range(blocks)])
            perms.append((images[:, None] * size + inner).reshape(-1))
        return {s.id: p for s, p in zip(self.spaces, perms, strict=True)}

    def follow(self, space: Space, element: Mapping[str, np.ndarray]) -> np.ndarray:
        """The permutation of a space that only follows its parents in `element` (members in order)."""
        i = self.spaces.index(space)
        images = block_images(self.structures[i], [element[p] for p in space.parents], i)
        return (images[:, None] * space.members + np.arange(space.members)).reshape(-1)

    def contains(self, element: Mapping[str, np.ndarray]) -> bool:
        """Whether `element` is one of the group: blocks go where their parents go."""
        for i, s in enumerate(self.spaces):
            perm = element[s.id]
            if not np.array_equal(np.sort(perm), np.arange(s.size)):
                return False
            images = block_images(self.structures[i], [element[p] for p in s.parents], i)
            if not np.array_equal(perm.reshape(s.blocks, -1) // s.members, np.repeat(images[:, None], s.members, 1)):
                return False
        return True

    def gather_index(self, tensor: str, axis: int, element: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Old position for every new position of an axis, or None where nothing moves."""
        index: np.ndarray | None = None
        for space, a in self.on_tensor.get(tensor, []):
            if a.axis != axis:
                continue
            perm = element[space.id]
            if np.array_equal(perm, np.arange(len(perm))):
                continue
            if index is None:
                index = np.arange(self.tensors[tensor][axis])
            rows = np.searchsorted(a.members, perm[a.members])
            index[a.positions] = a.positions[rows]
        return index

    def apply(self, element: Mapping[str, np.ndarray], tensor: str, value: Tensor) -> Tensor:
        """One tensor under a group element (`value` itself where nothing moves).

        Raises `MergeidError` when the value's shape is not the graph's."""
        import torch

        from mergeid.basics.on_demand import OnDemand

        if tensor not in self.on_tensor:
            return value
        if tuple(value.shape) != self.tensors[tensor]:
            raise MergeidError(
                f"tensor {tensor!r} has shape {tuple(value.shape)}, but the graph of {self.model} expects "
                f"{self.tensors[tensor]}; use the graph of this checkpoint's own architecture"
            )
        found = {d: self.gather_index(tensor, d, element) for d in range(value.dim())}
        moved = {d: torch.from_numpy(index) for d, index in found.items() if index is not None}
        if isinstance(value, OnDemand) and moved:
            return value.reordered(moved)
        for axis, index in moved.items():
            value = value.index_select(axis, index.to(value.device))
        return value

    def apply_state(self, element: Mapping[str, np.ndarray], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole state dict under a group element."""
        return {name: self.apply(element, name, value) for name, value in state.items()}

    # -- changes -----------------------------------------------------------------------------------------

    def without(self, ids: Iterable[str], why: str) -> NeuronGraph:
        """The graph with these spaces, and the parents that they would have to follow, frozen."""
        gone = set(ids)
        for s in reversed(self.spaces):
            if s.id in gone:
                gone |= set(s.parents)
        kept = []
        for s in self.spaces:
            if s.id in gone:
                continue
            columns = [k for k, p in enumerate(s.parents) if p not in gone]
            if not columns and s.members == 1:
                gone.add(s.id)
                continue
            kept.append(
                replace(
                    s,
                    parents=tuple(s.parents[k] for k in columns),
                    block_parents=s.block_parents[:, columns],
                )
            )
        lost = [s for s in self.spaces if s.id in gone]
        frozen = self.frozen + [(a.tensor, a.axis, why) for s in lost for a in s.axes]
        taps = {k: v for k, v in self.taps.items() if k not in gone}
        graph = NeuronGraph(self.model, self.tensors, kept, frozen, taps, self.versions, None, self.unknown_ops)
        # a frozen parent may leave children whose blocks cannot tell themselves apart: check that they still can
        random_permutations(graph.structures, np.arange)
        return graph

    def renamed(self, names: Mapping[str, str]) -> NeuronGraph:
        """The graph over other tensor names (model key -> checkpoint name); tensors without one are left out."""
        spaces = [
            replace(s, axes=tuple(replace(a, tensor=names[a.tensor]) for a in s.axes if a.tensor in names))
            for s in self.spaces
        ]
        return NeuronGraph(
            self.model,
            {names[t]: s for t, s in self.tensors.items() if t in names},
            spaces,
            [(names[t], a, why) for t, a, why in self.frozen if t in names],
            self.taps,
            self.versions,
            self.verified,
            self.unknown_ops,
        )

    def of_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> NeuronGraph:
        """The graph of a model whose other tensors have the same axes of neurons, and other sizes elsewhere (a head of
        other classes).

        Raises `MergeidError` where an axis of neurons has another size."""
        for name, shape in shapes.items():
            axes = {a.axis for _, a in self.on_tensor.get(name, [])}
            ours = self.tensors.get(name, shape)
            if axes and (len(shape) != len(ours) or any(shape[d] != ours[d] for d in axes)):
                raise MergeidError(
                    f"tensor {name!r} is {shape} and {ours}, so its neurons are not those of the rest of the network, "
                    "which cannot be reordered without it; use two models of one width"
                )
        found = self.renamed({n: n for n in self.tensors})
        found.tensors.update({n: s for n, s in shapes.items() if n in found.tensors})
        return found

    def on_tensors(self, names: Iterable[str]) -> NeuronGraph:
        """The graph over some of its tensors: the others are no longer permuted (nor evidence). Spaces that nothing is
        left of are gone."""
        found = self.renamed({n: n for n in names})
        left = {s.id for s in found.spaces if s.axes}
        for space in reversed(found.spaces):  # parents come first
            if space.id in left:
                left |= set(space.parents)
        found.spaces = [s for s in found.spaces if s.id in left]
        found.taps = {k: v for k, v in found.taps.items() if k in left}
        return found

    # -- exchange format ---------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The graph in the exchange format ``mergeid.graph/1`` (`mergeid.neuron_graph.exchange`)."""
        return written(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> NeuronGraph:
        """Read the exchange format; a graph written or corrected by hand may leave out everything but format, tensors
        and spaces, and of a space everything but id, size and axes (blocks: one).

        Raises `MergeidError` for anything that is not a valid graph."""
        graph = cls(**vars(parsed(data)))
        check_graph(graph)
        return graph
