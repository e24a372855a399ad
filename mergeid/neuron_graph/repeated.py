"""Deep networks traced once per kind of layer.

Most networks are a few stacks of layers of one kind. Such a stack is traced with its first and last layer and one of
every kind between them; what was found of a layer is then said of all others of its kind, and what runs through it runs
through them. That is a guess, if a good one: layers may be told apart by code that nobody sees. So the whole network
has to bear it out (`mergeid.neuron_graph.verify`), and where it does not, or the shorter network does not run, all
layers are traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mergeid.basics.state import tensors_of
from mergeid.neuron_graph.neuron_graph import NeuronGraph, Space, TapMap

LEAST = 8
"""Layers from which on a stack is shortened."""

COPY = "@"
"""Between the number of a space and the layer that it was said of too."""
Labeller = Callable[[list[tuple[str, int]]], "str | None"]


@dataclass(frozen=True)
class Stack:
    """Layers that follow each other.

    Attributes:
        name: of the list that holds them.
        like: position of a layer that is not traced -> that of the traced one of its kind.
        count: how many there are.
    """

    name: str
    like: Mapping[int, int]
    count: int

    def layer(self, tensor: str) -> int | None:
        """The position of the layer that a tensor (or module) lies in."""
        rest = tensor.removeprefix(f"{self.name}.")
        first = rest.partition(".")[0]
        return int(first) if rest != tensor and first.isdigit() else None

    def moved(self, tensor: str, layer: int) -> str:
        """The same tensor of another layer."""
        rest = tensor.removeprefix(f"{self.name}.").partition(".")[2]
        return f"{self.name}.{layer}.{rest}" if rest else f"{self.name}.{layer}"


def stacks(model: nn.Module) -> list[Stack]:
    """The stacks that can be shortened, none inside another."""
    found: list[Stack] = []
    for name, module in model.named_modules():
        if not name or not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < LEAST:
            continue
        if any(name.startswith(f"{s.name}.") for s in found):
            continue
        kinds = [_kind(layer, i) for i, layer in enumerate(module)]
        like: dict[int, int] = {}
        first: dict[Any, int] = {}
        for i in range(1, len(kinds) - 1):
            if first.setdefault(kinds[i], i) != i:
                like[i] = first[kinds[i]]
        if like:
            found.append(Stack(name, like, len(kinds)))
    return found


def _kind(layer: nn.Module, position: int) -> Any:
    """What layers of one kind have in common: their modules, the shapes of their tensors, and their settings, other
    than the position itself."""
    parts = []
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}
        settings = tuple(sorted((k, repr(v)) for k, v in plain.items() if isinstance(v, bool) or v != position))
        parts.append((name, type(module), settings))
    shapes = tuple((k, tuple(v.shape), v.dtype) for k, v in tensors_of(layer, keep_vars=True).items())
    return tuple(parts), shapes


@contextmanager
def shortened(model: nn.Module, found: Sequence[Stack]) -> Iterator[None]:
    """While open, the model has one layer of every kind between the first and the last of its stacks, under the names
    that they have."""
    kept: list[tuple[nn.Module, dict[str, nn.Module | None]]] = []
    for stack in found:
        module = model.get_submodule(stack.name)
        kept.append((module, module._modules))
        module._modules = {k: m for i, (k, m) in enumerate(module._modules.items()) if i not in stack.like}
    try:
        yield
    finally:
        for module, layers in kept:
            module._modules = layers


def extended(
    graph: NeuronGraph, tensors: Mapping[str, tuple[int, ...]], found: Sequence[Stack], label: Labeller | None
) -> NeuronGraph:
    """The graph of the whole network from that of the shortened one.

    Args:
        tensors: shapes of all tensors, in the order of the state dict.
        label: a human label for a space that lives on these (tensor, axis) pairs.
    """
    place = {name: i for i, name in enumerate(tensors)}
    level = _levels(graph, place)
    for stack in found:
        graph = _with_layers(graph, stack)
    graph = replace(graph, tensors=dict(tensors), frozen=sorted(graph.frozen, key=lambda f: (place[f[0]], f[1])))
    return _in_order(graph, place, level, label)


def _with_layers(graph: NeuronGraph, stack: Stack) -> NeuronGraph:
    copies: dict[int, list[int]] = {}
    for layer, of in stack.like.items():
        copies.setdefault(of, []).append(layer)
    home = {s.id: _home(graph, s, stack) for s in graph.spaces}
    spaces: list[Space] = []
    taps: dict[str, list[TapMap]] = {}
    for s in graph.spaces:
        inside = home[s.id]
        own = graph.taps.get(s.id, [])
        if inside is None:
            more = [
                replace(a, tensor=stack.moved(a.tensor, i))
                for a in s.axes
                for i in copies.get(_number(stack, a.tensor), ())
            ]
            spaces.append(replace(s, axes=(*s.axes, *more)))
            taps[s.id] = _interleaved(own, stack, copies)
            continue
        spaces.append(s)
        taps[s.id] = own
        for i in copies.get(inside, ()):
            name = f"{s.id}{COPY}{stack.name}.{i}"
            parents = tuple(f"{p}{COPY}{stack.name}.{i}" if home[p] == inside else p for p in s.parents)
            axes = tuple(replace(a, tensor=stack.moved(a.tensor, i)) for a in s.axes)
            spaces.append(replace(s, id=name, parents=parents, axes=axes))
            taps[name] = [replace(t, module=stack.moved(t.module, i)) for t in own]
    frozen = [
        (stack.moved(t, i), axis, why.replace(f"{stack.name}.{of}", f"{stack.name}.{i}"))
        for t, axis, why in graph.frozen
        for of in (_number(stack, t),)
        for i in copies.get(of, ())
    ]
    return replace(graph, spaces=spaces, frozen=[*graph.frozen, *frozen], taps={k: v for k, v in taps.items() if v})


def _number(stack: Stack, tensor: str) -> int:
    layer = stack.layer(tensor)
    return -1 if layer is None else layer


def _home(graph: NeuronGraph, space: Space, stack: Stack) -> int | None:
    """The layer that a space, and all that it lies in or that lies in it, does not leave."""
    around, queue = {space.id}, [space]
    while queue:
        s = queue.pop()
        for other in graph.children(s) if not s.axes else ():
            if other.id not in around:
                around.add(other.id)
                queue.append(other)
    layers = {_number(stack, a.tensor) for i in around for a in graph.by_id[i].axes}
    return layers.pop() if len(layers) == 1 and layers != {-1} else None


def _interleaved(taps: Sequence[TapMap], stack: Stack, copies: Mapping[int, Sequence[int]]) -> list[TapMap]:
    """Taps in the order of execution: runs of taps inside the stack go layer by layer."""
    out: list[TapMap] = []
    run: list[tuple[int, TapMap]] = []
    for tap in [*taps, None]:
        layer = None if tap is None else stack.layer(tap.module)
        if tap is not None and layer is not None:
            run.append((layer, tap))
            run += [(i, replace(tap, module=stack.moved(tap.module, i))) for i in copies.get(layer, ())]
            continue
        out += [t for _, t in sorted(run, key=lambda item: item[0])]
        run = []
        if tap is not None:
            out.append(tap)
    return out


def _first(graph: NeuronGraph, place: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Where each space, or what lies in it, has its first axis."""
    found: dict[str, tuple[int, int]] = {}
    for s in reversed(graph.spaces):  # parents come first
        own = [(place[a.tensor], a.axis) for a in s.axes]
        found[s.id] = min([*own, found.get(s.id, (len(place), 0))])
        for p in s.parents:
            found[p] = min(found[s.id], found.get(p, found[s.id]))
    return found


def _levels(graph: NeuronGraph, place: Mapping[str, int]) -> dict[str, int]:
    """How deep each space of a traced graph lies in others, which is known from its order: by depth, then by the first
    axis."""
    first, level, before = _first(graph, place), 0, (-1, 0)
    found = {}
    for s in graph.spaces:
        level += first[s.id] < before
        found[s.id], before = level, first[s.id]
    return found


def _in_order(
    graph: NeuronGraph, place: Mapping[str, int], level: Mapping[str, int], label: Labeller | None
) -> NeuronGraph:
    """Spaces and axes in the order in which a trace of all layers finds them, numbered and labelled so."""
    children: dict[str, list[Space]] = {}
    for s in graph.spaces:
        for p in s.parents:
            children.setdefault(p, []).append(s)
    first = _first(graph, place)
    order = sorted(graph.spaces, key=lambda s: (level[s.id.partition(COPY)[0]], first[s.id]))
    ids = {s.id: f"s{i}" for i, s in enumerate(order)}
    spaces = []
    for s in order:
        axes = tuple(sorted(s.axes, key=lambda a: (place[a.tensor], a.axis)))
        named = axes or tuple(a for c in children.get(s.id, ()) for a in c.axes)
        lives = sorted(((a.tensor, a.axis) for a in named), key=lambda p: (place[p[0]], p[1]))
        text = label(lives) if label and lives else None
        if text is None:
            text = s.label if not lives else f"{'' if axes else 'blocks of '}{lives[0][0]}[{lives[0][1]}]"
        parents = tuple(ids[p] for p in s.parents)
        spaces.append(replace(s, id=ids[s.id], label=text, parents=parents, axes=axes))
    taps = {ids[s.id]: graph.taps[s.id] for s in order if s.id in graph.taps}
    return replace(graph, spaces=spaces, taps=taps)
