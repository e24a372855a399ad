"""Real values beside meta tensors, as far as they depend on the inputs and on constants alone.

A model too large for this machine is traced on the meta device, where tensors have shapes and no values. But masks,
positions and lengths steer the forward pass (``if mask.all()``, ``x[index]``), and they need no weights: every call
whose arguments all have values is run a second time on these, and calls that ask a meta tensor for its values are
answered from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from mergeid.errors import MergeidError

LARGEST = 2**22
"""Values of larger tensors are not kept: what steers a forward pass is smaller."""


class Shadows:
    """The values of meta tensors, by identity."""

    def __init__(self) -> None:
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def add(self, tensor: Tensor, value: Tensor) -> None:
        self._values[tensor] = value

    def follow(self, tensor: Tensor, other: Tensor) -> None:
        """`tensor` has the values of another one from now on."""
        self._values.pop(tensor, None)
        if other in self._values:
            self._values[tensor] = self._values[other]

    def value(self, tensor: Tensor) -> Tensor | None:
        """The tensor itself where it is real, its values where they are known, else None."""
        if not tensor.is_meta:
            return tensor
        found: Tensor | None = self._values.get(tensor)
        return found

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The call on meta tensors, with the values of its outputs where those of all inputs are known.

        Raises `MergeidError` where the call needs values that depend on the weights."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = all(self.value(t) is not None for t in tensors)
        if not any(t.is_meta for t in tensors) and not _wants_meta(kwargs):
            return func(*args, **kwargs)
        values = self._on_values(func, args, kwargs) if known else None
        try:
            # real constants that meet meta tensors
            out = func(*_all_meta(tuple(args)), **{k: _all_meta(v) for k, v in kwargs.items()})
        except (RuntimeError, NotImplementedError) as error:
            if values is None:
                raise MergeidError(
                    f"{func.overloadpacket} needs values that depend on the weights, which the meta device does not "
                    f"have ({' '.join(str(error).split())[:120]}); trace a smaller model of this architecture"
                ) from error
            return self._as_meta(values)
        if values is not None:
            for tensor, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
                if isinstance(tensor, Tensor) and tensor.is_meta and value.numel() <= LARGEST:
                    self._values[tensor] = value
        return out

    def _on_values(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))) and _too_large(args):
            return None

        def real(x: Any) -> Any:
            if isinstance(x, Tensor):
                known = self.value(x)
                # the tangents of forward-mode differentiation that are zero have no memory to be read
                return torch.zeros_like(known) if known is not None and known._is_zerotensor() else known
            return torch.device("cpu") if isinstance(x, torch.device) and x.type == "meta" else x

        return func(*tree_map(real, tuple(args)), **{k: tree_map(real, v) for k, v in kwargs.items()})

    def _as_meta(self, values: Any) -> Any:
        def meta(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            out = torch.empty_like(x, device="meta")
            self._values[out] = x
            return out

        return tree_map(meta, values)


def _all_meta(tree: Any) -> Any:
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) and not x.is_meta and x.dim() else x, tree)


def _wants_meta(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _too_large(args: Sequence[Any]) -> bool:
    """Whether a factory call would make many values."""
    count = 1
    for size in args[0] if args and isinstance(args[0], (list, tuple)) else ():
        count *= int(size) if isinstance(size, int) else 1
    return count > LARGEST
