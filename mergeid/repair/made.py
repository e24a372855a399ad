"""What a network computes from its weights alone, and how it is computed again from others.

Every tensor has the recipe of what it holds at that moment: an operation that writes in place gives it a new one, and
what was computed before keeps the old.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mergeid.basics.aliases import written_among
from mergeid.basics.on_demand import memory_of


@dataclass(frozen=True)
class Derived:
    """A tensor that the network computes from weights alone (standardised kernels, weight norm, 1 + gain).

    Attributes:
        leaves: the parameters that it comes from, by name; buffers stay as they are.
        remake: computes it again from other values of these, differentiably.
    """

    leaves: dict[str, Tensor]
    remake: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Place:
    """A weight, or a strided part of one."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor was computed.

    Attributes:
        args, kwargs: of the call, with recipes for tensors that were themselves computed from weights.
        output: which of its answers the tensor is.
        places: the parts of weights that it comes from.
    """

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: int
    places: tuple[Place, ...]


class Made:
    """The tensors of one pass that are computed from weights alone.

    Args:
        place: which part of which weight a tensor is; None where it is none.
    """

    def __init__(self, place: Callable[[Any], Place | None]) -> None:
        self.place = place
        self.recipes: Any = WeakIdKeyDictionary()
        self.constants: Any = WeakIdKeyDictionary()

    def __contains__(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x in self.recipes

    def places(self, x: Any) -> list[Place]:
        """The parts of weights that a tensor is, or is computed from."""
        place = self.place(x)
        if place is not None:
            return [place]
        return list(self.recipes[x].places) if x in self else []

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call an operation without activations, and note how its answers come about."""
        tensors = [x for x in flat((*args, *kwargs.values())) if isinstance(x, Tensor)]
        places = tuple(dict.fromkeys(place for x in tensors for place in self.places(x)))
        if not places:
            out = func(*args, **kwargs)
            self.constants.update((x, None) for x in flat((out,)) if isinstance(x, Tensor))
            return out
        written = [x for x in _written(func, args, kwargs) if x.layout == torch.strided and self.place(x) is None]
        # what is written over is a constant no longer
        over = [x for v in written for x in (v, *self._beside(v)) if x not in self]
        old = {id(x): x.clone() for x in over}
        given, named = self._spelled(args, old), {k: self._spelled(v, old) for k, v in kwargs.items()}
        also = [(v, x, self._spelled(x, old)) for v in written for x in self._beside(v)]
        out = func(*args, **kwargs)
        for k, x in enumerate((*flat((out,)), *written)):  # some answer nothing
            if isinstance(x, Tensor) and self.place(x) is None:
                self.recipes[x] = Recipe(func, given, named, k, places)
        for part, whole, before in also:
            if part in self:
                of = before.places if isinstance(before, Recipe) else ()
                how = (before, self.recipes[part], _strides(whole), _strides(part))
                self.recipes[whole] = Recipe(_rewritten, how, {}, 0, tuple(dict.fromkeys((*of, *places))))
        return out

    def _beside(self, v: Tensor) -> list[Tensor]:
        """The other tensors that change with it."""
        where = memory_of(v)
        dense = (x for x in (*self.recipes, *self.constants) if x.layout == torch.strided and x.numel())
        known = {id(x): x for x in dense if memory_of(x) == where}
        if v._base is not None:
            known[id(v._base)] = v._base
        known.pop(id(v), None)
        return list(known.values())

    def _spelled(self, given: Any, old: Mapping[int, Tensor]) -> Any:
        def recipe(x: Any) -> Any:
            if not isinstance(x, Tensor) or self.place(x) is not None:
                return x
            return self.recipes[x] if x in self.recipes else old.get(id(x), x)

        return _each(given, recipe)

    def derived(self, tensor: Tensor, state: Mapping[str, Tensor]) -> Derived:
        """How to compute it again.

        Args:
            state: the parameters that it may depend on, by name.
        """
        recipe: Recipe = self.recipes[tensor]
        leaves = {place.name: state[place.name] for place in recipe.places if place.name in state}

        def remake(values: Mapping[str, Tensor]) -> Tensor:
            done: dict[int, Any] = {}
            dtype = next(iter(values.values())).dtype

            def of(x: Any) -> Any:
                if not isinstance(x, (Tensor, Recipe)):
                    return x
                if id(x) not in done:
                    done[id(x)] = again(x) if isinstance(x, Recipe) else leaf(x)
                return done[id(x)]

            def leaf(x: Tensor) -> Tensor:
                place = self.place(x)
                if place is not None and place.name in leaves:
                    offset = x.storage_offset() - leaves[place.name].storage_offset()
                    return values[place.name].as_strided(x.shape, x.stride(), offset)
                return x.to(dtype) if x.is_floating_point() else x

            def again(made: Recipe) -> Any:
                named = {k: _wide(_each(v, of), dtype) for k, v in made.kwargs.items()}
                return _answers(made.func, _each(made.args, of), named)[made.output]

            answer: Tensor = of(recipe)
            return answer

        return Derived(leaves, remake)


def flat(values: Sequence[Any]) -> list[Any]:
    """Without the lists and tuples."""
    found: list[Any] = []
    for x in values:
        found += flat(x) if isinstance(x, (list, tuple)) else [x]
    return found


def _each(x: Any, change: Callable[[Any], Any]) -> Any:
    """An argument with everything in its lists and tuples changed."""
    return type(x)(_each(y, change) for y in x) if isinstance(x, (list, tuple)) else change(x)


def _wide(x: Any, dtype: torch.dtype) -> Any:
    return dtype if isinstance(x, torch.dtype) and x.is_floating_point else x


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that the operation writes into."""
    if not isinstance(func, torch._ops.OpOverload):
        return []
    found = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    return written_among(func, found)


def _answers(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What an operation answers and, after that, what it has written; its arguments stay as they are."""
    over = {id(x) for x in _written(func, args, kwargs)}
    if any(id(x) in over for x in flat(list(kwargs.values()))):  # out=…, which cannot be differentiated
        found = flat((func.overloadpacket(*args, **{k: v for k, v in kwargs.items() if id(v) not in over}),))
        return [*found, *found]
    args = _each(args, lambda x: x.clone() if id(x) in over else x)
    return [*flat((func(*args, **kwargs),)), *_written(func, args, kwargs)]


Strides = tuple[tuple[int, ...], tuple[int, ...], int]


def _strides(x: Tensor) -> Strides:
    return tuple(x.shape), tuple(x.stride()), int(x.storage_offset())


def _rewritten(before: Tensor, part: Tensor, whole_at: Strides, part_at: Strides) -> Tensor:
    """What a tensor holds after another on its memory was written."""
    long = 1 + max(
        offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        for shape, stride, offset in (whole_at, part_at)
    )
    at = torch.arange(long, device=before.device)
    to, of = (at.as_strided(*where).reshape(-1) for where in (whole_at, part_at))
    memory = before.new_zeros(long).index_copy(0, to, before.reshape(-1)).index_copy(0, of, part.reshape(-1))
    return memory[to].reshape(before.shape)
