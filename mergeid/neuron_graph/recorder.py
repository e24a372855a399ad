"""Watch executed forward passes and carry neuron labels through every aten call.

Nothing of the model is rewritten or interpreted: whatever control flow it has runs as it is, and a
``TorchDispatchMode`` sees the calls that remain. An operation without a rule freezes its inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mergeid.basics.aliases import place_of, written_among
from mergeid.neuron_graph.atoms import atoms
from mergeid.neuron_graph.call import Call, Places, Result
from mergeid.neuron_graph.combine import relate
from mergeid.neuron_graph.composed import HigherOrderOperator, plain_calls
from mergeid.neuron_graph.constants import constant
from mergeid.neuron_graph.facts import Facts, Labels
from mergeid.neuron_graph.layout import FREE, FROZEN, LABELLED, Fine, Group, Layout, of_axes, uniform
from mergeid.neuron_graph.routes import Routes
from mergeid.neuron_graph.rules import rule_for
from mergeid.neuron_graph.rules.places import places_through
from mergeid.neuron_graph.shadows import Shadows

_KNOWN_CONSTANTS = {"aten.eye", "aten.empty", "aten.empty_strided", "aten.empty_permuted"}
"""Made from no tensor, with a rule of their own."""


@dataclass
class _View:
    """How a view came from its parent: its layout is derived when somebody asks, and again after a write. Who wants
    nothing but its shape (``zeros_like(x[:, :1])``) binds no neurons."""

    parent: Tensor
    call: Call
    position: int
    version: int = -1


@dataclass(frozen=True, eq=False)
class Tap:
    """A place in the forward pass where a labelled activation can be read again by a hook.

    Attributes:
        module: name of the module; kind: ``"in"`` or ``"out"``; call: 0 for the module's first call, ….
        dims: the labelled dimensions; labels: their labels in row-major order.
    """

    module: str
    kind: str
    call: int
    ndim: int
    dims: tuple[int, ...]
    labels: Labels


class Recorder(TorchDispatchMode):
    """Records `facts` and `taps` of the calls made inside its context."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.facts = Facts()
        self.taps: list[Tap] = []
        self.tapping = True
        self.unknown: dict[str, str] = {}
        self.axes: dict[tuple[str, int], Labels] = {}
        self.shadows = Shadows()
        self.routes = Routes()
        self._layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._views: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._versions: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._places: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._keep: list[Tensor] = []
        self._stack: list[str] = []
        self._calls: dict[tuple[str, str], int] = {}

    # -- what goes in ------------------------------------------------------------------------------------

    def add_parameters(self, state: Mapping[str, Tensor]) -> None:
        for name, labels in atoms(self.facts, state).items():
            self._layouts[state[name]] = of_axes(labels, tuple(state[name].shape))
            self.routes.weight(state[name])
            self._keep.append(state[name])
            self.axes |= {(name, axis): each for axis, each in enumerate(labels)}

    def add_input(self, tensor: Tensor) -> None:
        self._layouts[tensor] = uniform(tensor.shape, FROZEN, data=True)
        self.routes.input(tensor)
        self._keep.append(tensor)

    # -- layouts -----------------------------------------------------------------------------------------

    def layout(self, tensor: Tensor) -> Layout:
        view: _View | None = self._views.get(tensor)
        if view is not None and view.version != self._version(view.parent):
            self._derive(tensor, view)
        found: Layout | None = self._layouts.get(tensor)
        if found is None:
            found = constant(tensor, self.shadows.value(tensor))
            self._layouts[tensor] = found
        return found

    def counts(self, tensor: Tensor, places: Places) -> None:
        self._places[tensor] = places

    def places(self, tensor: Any) -> Places | None:
        return self._places.get(tensor) if isinstance(tensor, Tensor) else None

    def use(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            places = self._places.pop(tensor, None)
            if places is not None:
                places.fix()

    def leaves(self, tensor: Tensor, how: str) -> None:
        """The numbers of a tensor leave torch."""
        self.use([tensor])
        self.facts.freeze(self.layout(tensor).all_labels, f"{how}() at {self.where()}")

    def _version(self, tensor: Tensor) -> int:
        """Counts the writes to a tensor's root."""
        view: _View | None = self._views.get(tensor)
        return int(self._versions.get(tensor, 0)) + (self._version(view.parent) if view else 0)

    def _derive(self, tensor: Tensor, view: _View) -> None:
        view.version = self._version(view.parent)
        found = dict(enumerate(_flat(view.call.rerun()))).get(view.position)
        self._layouts[tensor] = uniform(tensor.shape, FROZEN, data=True) if found is None else found

    # -- calls -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator) or rule_for(func) is None:
            plain = plain_calls(func)
            if plain is not None:
                with self:
                    return plain(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            return self._opaque(func, args, kwargs)
        call = Call(self, func, args, kwargs)
        call.refuse_nested(call.tensors())
        places = places_through(call)
        written = written_among(func, call.bound)
        if reshapes := torch.Tag.inplace_view in func.tags:
            call.exchange(written[0], self._set_aside(written[0]))
        shapes = [tuple(t.shape) for t in written]
        call.out = self.shadows.run(func, args, kwargs)
        call.refuse_nested(call.outputs())
        grown = [] if reshapes else [(t, n) for t, n in zip(written, shapes, strict=True) if tuple(t.shape) != n]
        for tensor, shape in grown:
            self._let_go(tensor, prod(shape) > 0, call)
        if reshapes or (func.is_view and call.tensors()):
            self._viewed(call)
        else:
            self._laid_out(call, written)
        for tensor, shape in grown:
            if prod(shape):
                self.facts.freeze(self.layout(tensor).all_labels, call.why)
        if places is not None:
            for tensor in call.outputs():
                self.counts(tensor, places)
        self.routes.follow(call)
        return call.out

    def _laid_out(self, call: Call, written: Sequence[Tensor]) -> None:
        """What a call computes or writes, by its rule."""
        results, outputs = _flat(self._apply(call)), call.outputs()
        for tensor in written:
            if not any(tensor is t for t in (*outputs, *call.aside)):
                # on the side (statistics, noise): nothing that has to be known
                self.facts.freeze(self.layout(tensor).all_labels, call.why)
        for i, tensor in enumerate(outputs):
            result = results[i] if i < len(results) else None
            if any(tensor is t for t in written):
                if result is not None or call.is_given(tensor):
                    self._write(tensor, result or uniform(tensor.shape, FROZEN, data=True), call)
            elif not any(tensor is t for t in call.tensors()):
                # None: computed without labels (indices, statistics that nobody reads)
                self._layouts[tensor] = uniform(tensor.shape, FROZEN, data=True) if result is None else result

    def _viewed(self, call: Call) -> None:
        """The outputs of a call that moves nothing in memory, to be laid out when somebody asks."""
        tensors = call.tensors()
        call.rerun = self._rule_of(call)
        for i, tensor in enumerate(call.outputs()):
            if not any(tensor is t for t in tensors):
                self._views[tensor] = _View(tensors[0], call, i)

    def _opaque(self, func: HigherOrderOperator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An operator that nobody can look into freezes what goes in and what comes out."""
        out = func(*args, **kwargs)
        self.use(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.facts.freeze(self.layout(x).all_labels, f"no rule for {func} at {self.where()}")
        self.unknown.setdefault(str(func), self.where())
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._layouts[x] = uniform(x.shape, FROZEN, data=True)
        return out

    def _apply(self, call: Call) -> Result:
        if not call.tensors() and call.name not in _KNOWN_CONSTANTS:
            return [constant(t, self.shadows.value(t)) for t in call.outputs()]
        call.rerun = self._rule_of(call)
        return call.rerun()

    def _rule_of(self, call: Call) -> Callable[[], Result]:
        rule = rule_for(call.func)
        return partial(self._unknown, call) if rule is None else partial(rule, call)

    def _unknown(self, call: Call) -> Result:
        """Sound by default: no rule, so nothing that goes in or comes out may move."""
        layouts = [self.layout(t) for t in call.tensors()]
        if any(x.groups for x in layouts):
            self.unknown.setdefault(call.name, call.where)
        for x in layouts:
            self.facts.freeze(x.all_labels, f"no rule for {call.why}")
        data = any(x.data for x in layouts)
        return [uniform(t.shape, FROZEN, data) for t in call.outputs()]

    def _set_aside(self, tensor: Tensor) -> Tensor:
        """Before the shape of `tensor` changes in place (transpose_, squeeze_, …): what it was is another tensor from
        now on, which its views are taken of, and so is `tensor` itself."""
        was = tensor.detach()
        self._layouts[was] = self.layout(tensor)
        self._versions[was] = self._versions.get(tensor, 0)
        if tensor in self._views:
            self._views[was] = self._views.pop(tensor)
            self._views[was].call.exchange(tensor, was)
        for view in list(self._views.values()):
            if view.parent is tensor:
                view.parent = was
                view.call.exchange(tensor, was)
        return was

    def assigned(self, tensor: Tensor, value: Tensor) -> None:
        """``tensor.data = value``: it is a view of other memory from now on."""
        if value is tensor:
            return
        root = self.root(tensor)
        with _disable_current_modes():
            same = value.stride() == root.stride() and place_of(value) == place_of(root)
        if same and value not in self._layouts and value not in self._views:
            value = root  # put back after a pass, by who kept it unseen
        with _disable_current_modes():
            self._set_aside(tensor)
        call = Call(self, torch.ops.aten.alias.default, (value,), {})
        call.out = tensor
        call.rerun = self._rule_of(call)
        self._views[tensor] = _View(value, call, 0)
        self.shadows.follow(tensor, value)

    def _let_go(self, tensor: Tensor, held: bool, call: Call) -> None:
        """A result did not fit into the memory that was given for it (out=). Where this `held` anything, what shares
        it is not followed."""
        root = self.root(tensor)
        kin = [t for t in list(self._views) if self.root(t) is root] if held else []
        for each in [t for t in (root, *kin) if t is not tensor and held]:
            self.facts.freeze(self.layout(each).all_labels, call.why)
        for each in (tensor, root, *kin) if held else (tensor,):
            self._views.pop(each, None)
            self._layouts[each] = uniform(each.shape, FROZEN, data=True)

    def _write(self, tensor: Tensor, new: Layout, call: Call) -> None:
        """`tensor` now holds values laid out as `new`; its base and its other views follow."""
        view: _View | None = self._views.get(tensor)
        if view is None:
            self._layouts[tensor] = new
            self._versions[tensor] = self._versions.get(tensor, 0) + 1
            return
        old = self.layout(tensor)
        root = self.root(tensor)
        # a part is written where all positions were alike, or what is written varies
        part = tensor.numel() < root.numel() and _has_free(self.layout(root))
        if part or _has_free(old) or (new.data and not old.data):
            self._upgrade(root, new)
            old = self.layout(tensor)
        relate(self.facts, old, new, call.why)

    def root(self, tensor: Tensor) -> Tensor:
        """What it is a view of."""
        view: _View | None = self._views.get(tensor)
        while view is not None:
            tensor = view.parent
            view = self._views.get(tensor)
        return tensor

    def _upgrade(self, root: Tensor, new: Layout) -> None:
        """Give the base of a view labels (or freeze it) where a write makes its values vary."""
        layout = self.layout(root)
        kind = LABELLED if new.groups else FROZEN
        swap = {f: Fine(f.size, kind) for d in layout.dims for f in d if f.kind == FREE}
        groups = list(layout.groups)
        if kind == LABELLED:
            groups += [Group(self.facts.fresh((f.size,)), (f,)) for f in swap.values()]
        dims = tuple(tuple(swap.get(f, f) for f in d) for d in layout.dims)
        self._layouts[root] = Layout(dims, tuple(groups), layout.data or new.data)
        self._versions[root] = self._versions.get(root, 0) + 1

    # -- modules -----------------------------------------------------------------------------------------

    def where(self) -> str:
        return self._stack[-1] if self._stack else ""

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know the running module's name, and record taps at the modules that have no children."""
        names = {id(m): n for n, m in model.named_modules()}

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            name = names.get(id(module))
            self._stack.append(name if name is not None else self.where())
            if name and not any(True for _ in module.children()):
                self._tap(name, "in", args)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            name = self._stack.pop()
            if name and names.get(id(module)) == name and not any(True for _ in module.children()):
                self._tap(name, "out", output)

        with ExitStack() as stack:
            for handle in (
                nn.modules.module.register_module_forward_pre_hook(enter),
                nn.modules.module.register_module_forward_hook(leave),
            ):
                stack.callback(handle.remove)
            yield

    def _tap(self, name: str, kind: str, value: Any) -> None:
        if not self.tapping:
            return
        call = self._calls.get((name, kind), 0)
        self._calls[name, kind] = call + 1
        tensor = next((t for t in tree_leaves(value) if isinstance(t, Tensor)), None)
        if tensor is None or tensor.dim() < 2 or tensor.is_complex() or self.routes.routed(tensor):
            return
        layout = self.layout(tensor)
        if not layout.data:
            return
        for g in layout.groups:
            dims = tuple(d for d, fines in enumerate(layout.dims) if any(f in g.fines for f in fines))
            fines = [f for d in dims for f in layout.dims[d]]
            if set(fines) == set(g.fines):
                labels = g.ordered(fines).reshape(-1)
                self.taps.append(Tap(name, kind, call, tensor.dim(), dims, labels))


def _has_free(layout: Layout) -> bool:
    return any(f.kind == FREE for d in layout.dims for f in d)


def _flat(result: Result) -> list[Layout | None]:
    return [result] if isinstance(result, Layout) or result is None else list(result)
