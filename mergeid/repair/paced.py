"""Networks that run side by side and wait for each other at every layer.

A layer of the merged network is to be solved when its inputs are known, with all layers before it solved, and the
models' own answers at the same place beside it. So every network (and every batch of it) runs in a thread of its own,
one at a time, and rests at each operation of interest: activations are carried from layer to layer, nothing is run
twice, and of all that was computed only what lies at the current cut is held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from mergeid.basics.nested import named_tensors
from mergeid.basics.on_demand import memory_of
from mergeid.basics.state import forget_derived, tensors_of
from mergeid.plugins import Batch
from mergeid.repair.made import Derived, Made, Place, flat

Forward = Callable[[nn.Module, Any], Any]


class _Stopped(BaseException):
    """Ends a thread that nobody waits for."""


@dataclass(frozen=True)
class Value:
    """A tensor of one pass: which operation on activations made it, and as which of its answers. Inputs have negative
    numbers."""

    step: int
    output: int


@dataclass(frozen=True)
class Node:
    """One operation on activations.

    Attributes:
        step: its number; index: its number among those that also take a weight, else None.
        args, kwargs: the call, with `Value` and `Place` for tensors.
        takes: the values among the arguments.
        shape: of the (first) answer.
        opaque: it takes a tensor that is neither an activation nor a weight.
    """

    step: int
    index: int | None
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    takes: tuple[Value, ...]
    shape: tuple[int, ...]
    opaque: bool

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket).removeprefix("aten.")


@dataclass
class Stop:
    """Where a network rests.

    Attributes:
        index: number of the operation among those on weights and activations.
        func, args, kwargs: the call.
        weights: names of the weights, by the position of the argument that is one of them or a view of it.
        places: which parts of weights each of these arguments is or comes from, buffers included.
        derived: of arguments that are computed from weights: how.
        out: what it answered; None where the network rests before it.
        step: its number among all operations on activations.
        block: columns of the answer that are looked at together, where it is too wide to be held; else 0.
        shape: of the (first) answer, in a `Record`.
    """

    index: int
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    weights: dict[int, str]
    places: dict[int, list[Place]]
    derived: dict[int, Derived]
    out: Any = None
    step: int = 0
    block: int = 0
    shape: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket).removeprefix("aten.")

    @property
    def signature(self) -> Any:
        return (self.index, self.func, tuple(sorted(self.weights.items())))


class _Watch(TorchDispatchMode):
    """Counts operations that take a weight, or a view of one, together with activations.

    Args:
        met: told of every operation on activations when it has run: its number, the number among those with weights,
            function, arguments, keywords, answer.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        meet: Callable[[Stop], Any],
        met: Callable[[int, int | None, Any, Any, Any, Any], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.meet, self.met, self.count, self.step = meet, met, 0, 0
        self.names: dict[int, str] = {}
        self.state = tensors_of(model, keep_vars=True)
        self.fitted = parameters_of(model)
        for name in sorted(self.state, key=lambda name: name not in self.fitted):
            value = self.state[name]
            if value.is_floating_point() and value.numel():
                self.names.setdefault(memory_of(value), name)
        self.made = Made(self._place)
        self.leaves = {name: value for name, value in self.state.items() if name in self.fitted}
        self.live: Any = WeakIdKeyDictionary()
        for k, tensor in enumerate(named_tensors(batch).values()):
            self.live[tensor] = Value(-1 - k, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in flat((*args, *kwargs.values())) if isinstance(x, Tensor)]
        if not any(t in self.live for t in tensors):
            return self.made.run(func, args, kwargs)
        places = {i: found for i, x in enumerate(args) if (found := self.made.places(x))}
        step, self.step = self.step, self.step + 1
        index = self.count if places else None
        if index is not None:
            self.count += 1
            weights = {i: "+".join(dict.fromkeys(place.name for place in found)) for i, found in places.items()}
            derived = {i: self.made.derived(args[i], self.leaves) for i in places if args[i] in self.made}
            out = self.meet(Stop(index, func, args, kwargs, weights, places, derived, step=step))
        else:
            out = func(*args, **kwargs)
        if self.met is not None:
            self.met(step, index, func, args, kwargs, out)
        for k, x in enumerate(flat((out,))):
            if isinstance(x, Tensor):
                self.live[x] = Value(step, k)
        return out

    def spelled(self, x: Any) -> Any:
        """An argument with `Value` and `Place` for tensors; other tensors stay."""
        if isinstance(x, (list, tuple)):
            return [self.spelled(y) for y in x]
        if not isinstance(x, Tensor):
            return x
        if x in self.live:
            return self.live[x]
        return self._place(x) or x

    def _weight(self, x: Any) -> str | None:
        """The weight that a tensor is, or is a view of."""
        if not isinstance(x, Tensor) or x in self.live or not x.is_floating_point() or x.layout != torch.strided:
            return None
        return self.names.get(memory_of(x))

    def _place(self, x: Any) -> Place | None:
        name = self._weight(x)
        return None if name is None else Place(name, tuple(x.shape), tuple(x.stride()), int(x.storage_offset()))


def parameters_of(model: nn.Module) -> frozenset[str]:
    """All names of parameters, those of shared ones included."""
    return frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))


@dataclass(frozen=True)
class Record:
    """What one pass executes, without the tensors: operations on weights and activations, and all on activations."""

    stops: list[Stop]
    nodes: list[Node]


def record(model: nn.Module, forward: Forward, batch: Batch) -> Record:
    """One pass; tensors that are no weights are let go."""
    found = Record([], [])

    def meet(stop: Stop) -> Any:
        out = stop.func(*stop.args, **stop.kwargs)
        found.stops.append(Stop(stop.index, stop.func, [], {}, stop.weights, stop.places, {}, shape=_shape(out)))
        return out

    def met(step: int, index: int | None, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        spelled, named = watch.spelled(args), {k: watch.spelled(v) for k, v in kwargs.items()}
        given = flat((*spelled, *named.values()))
        takes = tuple(x for x in given if isinstance(x, Value))
        opaque = any(isinstance(x, Tensor) for x in given)
        kept = tuple(None if isinstance(x, Tensor) else x for x in spelled)
        found.nodes.append(Node(step, index, func, kept, named, takes, _shape(out), opaque))

    forget_derived(model)  # every pass computes what it keeps of its weights
    with torch.no_grad(), _Watch(model, batch, meet, met) as watch:
        forward(model, batch)
    return found


def _shape(out: Any) -> tuple[int, ...]:
    """Of the first tensor."""
    return next((tuple(x.shape) for x in flat((out,)) if isinstance(x, Tensor)), ())


class Paced:
    """One network on one batch, resting at the operations of interest.

    Args:
        wanted: numbers of the operations to rest at.
        after: rest when the operation has answered (its `out` is known), else before it runs: then it runs with the
            weights as they are when the network goes on.
        keep: values that are held when they are made, until they are let go (`kept`).
        blocks: number of an operation before which it rests in any case -> `Stop.block`.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        batch: Batch,
        wanted: frozenset[int],
        *,
        after: bool,
        keep: frozenset[Value] = frozenset(),
        blocks: Mapping[int, int] | None = None,
    ) -> None:
        self.model, self.forward, self.batch, self.wanted, self.after = model, forward, batch, wanted, after
        self.blocks = blocks or {}
        self.keep, self.kept = keep, dict[Value, Tensor]()
        self.state: Mapping[str, Tensor] = tensors_of(model)
        self._stop: Stop | None = None
        self._error: BaseException | None = None
        self._done = self._ending = False
        self._go, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self) -> Stop | None:
        """Run to the next operation of interest; None at the end. Raises what the network raised."""
        if not self._done:
            self._stop = None
            self._go.release()
            self._rests.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def forget(self, but: frozenset[Value]) -> None:
        """Let go of all values but these."""
        self.keep = but
        self.kept = {k: v for k, v in self.kept.items() if k in but}

    def close(self) -> None:
        """Give up what is left of the run."""
        if not self._done:
            self._ending = True
            self._go.release()
            self._rests.acquire()
        self._thread.join()
        self.batch = {}  # let go of at once, not when Python looks for cycles

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._ending:
                forget_derived(self.model)
                with torch.no_grad(), _Watch(self.model, self.batch, self._meet, self._met):
                    self.forward(self.model, self.batch)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._done = True
        self._stop = None
        self._rests.release()

    def _met(self, step: int, index: int | None, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for k, x in enumerate(flat((out,))):
            if isinstance(x, Tensor) and Value(step, k) in self.keep:
                self.kept[Value(step, k)] = x

    def _meet(self, stop: Stop) -> Any:
        if stop.index not in self.wanted:
            return stop.func(*stop.args, **stop.kwargs)
        stop.block = self.blocks.get(stop.index, 0)
        after = self.after and not stop.block
        if after:
            stop.out = stop.func(*stop.args, **stop.kwargs)
        self._stop = stop
        self._rests.release()
        self._go.acquire()
        if self._ending:
            raise _Stopped
        return stop.out if after else stop.func(*stop.args, **stop.kwargs)
