"""One executed aten call, as the op rules see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Union

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mergeid.errors import MergeidError
from mergeid.neuron_graph.facts import Facts, Labels
from mergeid.neuron_graph.layout import FROZEN, LABELLED, Fine, Group, Layout
from mergeid.neuron_graph.shadows import Shadows

Result = Union[Layout, None, Sequence[Layout | None]]
"""Layouts of a call's outputs; None for one that nobody reads as neurons."""


@dataclass(frozen=True, eq=False)
class Places:
    """What a tensor of indices counts: positions among neurons, which are other numbers in another order.

    Attributes:
        labels: int64 [n], the neuron at each position; None where they are not of one dimension alone.
        fix: freezes these neurons, for whoever uses the numbers otherwise than to look something up by them.
        bounds: these are the smallest and the largest of such numbers.
    """

    labels: Labels | None
    fix: Callable[[], object]
    bounds: bool = False


class Watcher(Protocol):
    """What a call knows of whoever watches the forward pass."""

    facts: Facts
    shadows: Shadows

    def where(self) -> str:
        """Name of the module that is running."""
        ...

    def layout(self, tensor: Any) -> Layout:
        """Layout of a tensor."""
        ...

    def counts(self, tensor: Tensor, places: Places) -> None:
        """The values of a tensor are places."""
        ...

    def places(self, tensor: Any) -> Places | None:
        """The places that a tensor holds."""
        ...

    def root(self, tensor: Tensor) -> Tensor:
        """What a tensor is a view of, in the end."""
        ...

    def use(self, tensors: Iterable[Tensor]) -> None:
        """The numbers of these tensors are read: neurons whose places they are stand still."""
        ...


class Call:
    """One aten call with its arguments by schema name, as the rules see it."""

    def __init__(self, recorder: Watcher, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.recorder, self.func, self.args, self.kwargs = recorder, func, args, kwargs
        self.facts = recorder.facts
        self.where = recorder.where()
        self.out: Any = None
        self.rerun: Callable[[], Result] = lambda: None
        self.aside: list[Tensor] = []
        """What is written on the side, and stays laid out as it was: rules say so."""
        self.bound: dict[str, Any] = {}
        for i, spec in enumerate(func._schema.arguments):
            if spec.name in kwargs:
                self.bound[spec.name] = kwargs[spec.name]
            elif i < len(args) and not spec.kwarg_only:
                self.bound[spec.name] = args[i]
            elif spec.has_default_value():
                self.bound[spec.name] = spec.default_value

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket)

    @property
    def why(self) -> str:
        """The reason that the user reads when this call freezes something."""
        return f"{self.name} at {self.where}" if self.where else self.name

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.bound.get(name, default)

    def layout(self, name: str) -> Layout:
        """Layout of the tensor argument of that name."""
        return self.recorder.layout(self.bound[name])

    def layout_of(self, tensor: Tensor) -> Layout:
        return self.recorder.layout(tensor)

    def tensors(self) -> list[Tensor]:
        """Those that it reads: not the memory that is given for its results (out=)."""
        given = [s.name for s in self.func._schema.arguments if s.is_out]
        read = {k: v for k, v in self.kwargs.items() if k not in given} if given else self.kwargs
        return [x for x in tree_leaves((self.args, read)) if isinstance(x, Tensor)]

    def is_given(self, tensor: Tensor) -> bool:
        """Whether it is memory for a result (out=)."""
        return any(s.is_out and self.kwargs.get(s.name) is tensor for s in self.func._schema.arguments)

    def outputs(self) -> list[Tensor]:
        return [x for x in tree_leaves(self.out) if isinstance(x, Tensor)]

    def exchange(self, old: Tensor, new: Tensor) -> None:
        """Put one tensor in the place of another, wherever it is taken or returned."""

        def put(x: Any) -> Any:
            return new if x is old else x

        self.args, self.kwargs = tree_map(put, self.args), tree_map(put, self.kwargs)
        self.bound, self.out = tree_map(put, self.bound), tree_map(put, self.out)

    def refuse_nested(self, tensors: Sequence[Tensor]) -> None:
        """Raises `MergeidError` where one of these is nested: it has no shape."""
        if any(t.is_nested for t in tensors):
            raise MergeidError(
                f"{self.why} works on nested tensors, whose neurons cannot be followed; set the model up so that it "
                "pads its sequences instead"
            )

    def freeze_dims(self, layout: Layout, dims: Sequence[int]) -> Layout:
        """Freeze the labels on some dimensions: an operation treats their positions as fixed."""
        n = len(layout.dims)
        fines = {f for d in dims for f in layout.dims[d % n] if f.kind == LABELLED}
        if not fines:
            return layout
        groups, new = [], {f: Fine(f.size, FROZEN) for f in fines}
        for g in layout.groups:
            held, rest = [f for f in g.fines if f in fines], [f for f in g.fines if f not in fines]
            if held and rest:
                # the neurons of the other dimensions move as one, whatever the frozen position
                labels = g.ordered([*held, *rest])
                free = self.facts.fresh([f.size for f in rest])
                frozen = self.facts.frozen([f.size for f in held], self.why)
                self.facts.par(labels, free)
                self.facts.par(labels, frozen.reshape(*frozen.shape, *(1 for _ in rest)))
                groups.append(Group(free, tuple(rest)))
            elif held:
                self.facts.freeze(g.labels, self.why)
            else:
                groups.append(g)
        dims_now = tuple(tuple(new.get(f, f) for f in d) for d in layout.dims)
        return Layout(dims_now, tuple(groups), layout.data)
