"""Weights that are formed where they are used and let go again: a network that is never whole in memory.

An `OnDemand` tensor says the shape, number format and device of a weight and holds none of its values. Whatever
operation it goes into gets the values, formed for it alone: read from a mapped file in the file's own format, brought
into another order, averaged. Nothing is asked of the module that uses it: any forward pass runs as it is, one weight at
a time. Where an operation needs a part of the rows (an embedding), or can be done in pieces of them (a wide output
head), no more than that is formed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Rows = Union[slice, Tensor]
"""Which rows of a weight are asked for: a slice, or an index (a form is given it on the CPU)."""
Form = Callable[[Rows], Tensor]
"""Gives rows of a weight, in any number format, on any device."""

EVERYTHING = slice(None)
PIECE = 1 << 22
"""Numbers of a weight that a product takes at once, where it is larger."""

aten = torch.ops.aten


@dataclass
class _Cell:
    """Shared by a weight and what is a view of it: new values are new for both."""

    form: Form


class OnDemand(Tensor):
    """A weight that is formed whenever it is used. It is never written into: new values are another form.

    Attributes:
        turned: whether it stands for the transpose of what is formed.
    """

    cell: _Cell
    turned: bool

    @staticmethod
    def __new__(
        cls,
        form: Form | _Cell,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        turned: bool = False,
    ) -> OnDemand:
        """Args:
        form: gives its rows.
        shape, dtype, device: as what uses it sees it; rows are brought there when they are formed.
        """
        made: OnDemand = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            tuple(shape),
            strides=(1, shape[0]) if turned else None,
            dtype=dtype,
            device=torch.device(device),
        )
        made.cell = form if isinstance(form, _Cell) else _Cell(form)
        made.turned = turned
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDemand({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDemand:
        """Values are not held, so they are not copied."""
        if id(self) not in memo:
            made: Any = OnDemand(self.cell.form, self.shape, self.dtype, self.device, self.turned)
            memo[id(self)] = nn.Parameter(made, requires_grad=False) if _is_parameter(self) else made
        found: OnDemand = memo[id(self)]
        return found

    def rows(self, which: Rows = EVERYTHING) -> Tensor:
        """Rows of what is formed, in the number format and on the device that this tensor says."""
        which = which.cpu() if isinstance(which, Tensor) else which  # an index of the CPU suits tensors anywhere
        return self.cell.form(which).to(self.device).to(self.dtype)  # a device casts faster, and gets less

    def whole(self) -> Tensor:
        """All values."""
        return self.rows().t() if self.turned else self.rows()

    def becomes(self, value: Tensor) -> None:
        """Other values from now on, for all views of this weight.

        Args:
            value: of what is formed, not of its transpose.
        """
        self.cell.form = lambda which: value[which]

    def then(self, change: Callable[[Tensor], Tensor]) -> OnDemand:
        """The weight with every entry changed by itself."""
        return OnDemand(lambda which: change(self.rows(which)), self.shape, self.dtype, self.device)

    def reordered(self, index: Mapping[int, Tensor]) -> OnDemand:
        """The weight with its positions in another order.

        Args:
            index: dimension -> old position for every new one.
        """
        form, first = self.cell.form, index.get(0)

        def rows(which: Rows) -> Tensor:
            value = form(which if first is None else first[which])
            for dim, order in index.items():
                value = value.index_select(dim, order.to(value.device)) if dim else value
            return value

        return OnDemand(rows, self.shape, self.dtype, self.device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            found = special(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*_plain(tuple(args)), **{k: _plain(v) for k, v in kwargs.items()})


def held(model: nn.Module) -> nn.Module:
    """The model with the values of all its weights in memory, in place; tied weights stay tied."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if isinstance(value, OnDemand):
                made = known.setdefault(id(value), nn.Parameter(value.whole().clone(), value.requires_grad))
                module._parameters[name] = made
    return model


def _plain(tree: Any) -> Any:
    return tree_map(lambda x: x.whole() if isinstance(x, OnDemand) else x, tree)


def _is_parameter(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_is_param", False))


def _same(tensor: Any, *_: Any) -> Any:
    return OnDemand(tensor.cell, tensor.shape, tensor.dtype, tensor.device, tensor.turned)


def _cloned(tensor: Any, **_: object) -> Any:
    return OnDemand(tensor.cell.form, tensor.shape, tensor.dtype, tensor.device, tensor.turned)


def _cast(tensor: Any, *, dtype: Any = None, device: Any = None, **_: object) -> Any:
    place, kind = device or tensor.device, dtype or tensor.dtype
    if torch.device(place).type == "meta":
        return torch.empty(tensor.shape, dtype=kind, device="meta")
    return OnDemand(tensor.cell.form, tensor.shape, kind, place, tensor.turned)


def _transposed(tensor: Any) -> Any:
    if tensor.dim() != 2:
        return NotImplemented
    return OnDemand(tensor.cell, tensor.shape[::-1], tensor.dtype, tensor.device, not tensor.turned)


def _viewed(tensor: Any, shape: Any) -> Any:
    """What is formed of a transposed weight does not lie as the weight says."""
    return tensor.whole().reshape(shape)


def _looked_up(weight: Any, index: Any, *_: Any) -> Any:
    if not isinstance(weight, OnDemand) or weight.turned or isinstance(index, OnDemand):
        return NotImplemented
    return weight.rows(index.reshape(-1)).reshape(*index.shape, *weight.shape[1:])


def _selected(tensor: Any, dim: int, index: Any) -> Any:
    """Positions of one dimension: cast after they were taken."""
    if not isinstance(tensor, OnDemand) or tensor.turned or isinstance(index, OnDemand):
        return NotImplemented
    if dim % tensor.dim() == 0:
        return tensor.rows(index)
    found = tensor.cell.form(EVERYTHING)
    return found.index_select(dim, index.to(found.device)).to(tensor.device, tensor.dtype)


def _sliced(tensor: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    at = slice(start, end, step)
    if dim % tensor.dim() == (1 if tensor.turned else 0):
        return tensor.rows(at).t() if tensor.turned else tensor.rows(at)
    if tensor.turned:
        return NotImplemented
    found = tensor.cell.form(EVERYTHING)
    return found[(EVERYTHING,) * (dim % tensor.dim()) + (at,)].to(tensor.device, tensor.dtype)


def _product(x: Any, weight: Any) -> Any:
    """x Wᵀ, pieces of W's rows at a time where W is large."""
    large = isinstance(weight, OnDemand) and weight.turned and weight.numel() > PIECE
    if not large or isinstance(x, OnDemand) or x.dtype != weight.dtype:
        return NotImplemented
    out = x.new_empty(x.shape[0], weight.shape[1])
    step = max(PIECE // weight.shape[0], 1)
    for begin in range(0, weight.shape[1], step):
        at = slice(begin, min(begin + step, weight.shape[1]))
        out[:, at] = torch.mm(x, weight.rows(at).t())
    return out


def _product_and_bias(bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    found = _product(x, weight)
    if found is NotImplemented:
        return found
    return found.mul_(alpha).add_(_plain(bias), alpha=beta)


def _written(target: Any, value: Any, *_: Any) -> Any:
    """New values: these are held from now on, or formed where they are formed themselves."""
    if not isinstance(target, OnDemand) or target.turned:
        return NotImplemented
    if isinstance(value, OnDemand) and not value.turned and value.shape == target.shape:
        form, dtype = value.cell.form, value.dtype
        target.cell.form = form if dtype == target.dtype else lambda which: form(which).to(dtype)
    else:
        target.becomes(_plain(value).expand(target.shape).to(target.dtype, copy=True))
    return target


_SPECIAL: Mapping[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _cloned,
    aten._to_copy.default: _cast,
    aten.t.default: _transposed,
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.embedding.default: _looked_up,
    aten.index_select.default: _selected,
    aten.slice.Tensor: _sliced,
    aten.mm.default: _product,
    aten.addmm.default: _product_and_bias,
    aten.copy_.default: _written,
}


def formed(tensor: Tensor) -> Tensor:
    """The values of any tensor."""
    return tensor.whole() if isinstance(tensor, OnDemand) else tensor


def memory_of(tensor: Tensor) -> int:
    """What a tensor shares with all views of it, and with no other."""
    return -id(tensor.cell) if isinstance(tensor, OnDemand) else tensor.untyped_storage().data_ptr()


def with_other_names(state: Mapping[str, Tensor], keys: Iterable[str]) -> set[str]:
    """These keys of a state dict, and the others that the very same tensors have."""

    def place(key: str) -> Hashable:
        tensor = state[key]
        return memory_of(tensor) if isinstance(tensor, OnDemand) else (tensor.data_ptr(), tensor.shape)

    known = [k for k in keys if k in state]
    places = {place(k) for k in known if state[k].numel()}
    return {*known, *(k for k, v in state.items() if places and v.numel() and place(k) in places)}


def rows_of(tensor: Tensor, which: Rows) -> Tensor:
    """Rows of any tensor."""
    return tensor.rows(which) if isinstance(tensor, OnDemand) and not tensor.turned else tensor[which]


def in_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors of one shape, together: all of them at once, unless a tensor is formed on demand and large."""
    demanded = [isinstance(t, OnDemand) for t in tensors]
    turned = {t.turned for t in tensors if isinstance(t, OnDemand)}
    if not any(demanded) or tensors[0].numel() <= PIECE or len(turned) > 1 or (True in turned and not all(demanded)):
        yield tuple(map(formed, tensors))
        return
    rows = [t.t() if turned == {True} else t for t in tensors]
    step = max(PIECE * len(rows[0]) // rows[0].numel(), 1)
    for begin in range(0, len(rows[0]), step):
        yield tuple(rows_of(t, slice(begin, begin + step)) for t in rows)


def places_of(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Every parameter once, with all the places where it stands: more than one where it is tied."""
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                found.setdefault(id(value), (value, []))[1].append((module, name))
    yield from found.values()


def put_weights(model: nn.Module, values: Mapping[int, Tensor]) -> None:
    """Put values in the place of parameters; tied ones stay so.

    Args:
        values: identity of a parameter -> what takes its place. Others stay as they are.
    """
    for old, places in list(places_of(model)):
        if id(old) in values:
            new = nn.Parameter(values[id(old)], requires_grad=False)
            for module, name in places:
                setattr(module, name, new)


def light_copy(model: nn.Module) -> nn.Module:
    """A copy whose matrices and kernels are formed of the model's own when they are used, until they get new values."""
    memo: dict[int, Any] = {}
    for place, _ in places_of(model):
        if place.dim() > 1 and place.is_floating_point() and not isinstance(place, OnDemand):
            memo[id(place)] = nn.Parameter(_formed_of(place.detach()), requires_grad=False)
    return copy.deepcopy(model, memo)


def _formed_of(value: Tensor) -> OnDemand:
    return OnDemand(lambda which: value[which], value.shape, value.dtype, value.device)


def is_on_demand(model: nn.Module) -> bool:
    """Whether any weight of a network is formed on demand."""
    return any(isinstance(p, OnDemand) for p in model.parameters())
