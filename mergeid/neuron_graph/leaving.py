"""Numbers that leave torch, as lists and as arrays of NumPy, come back as constants: nothing is known of what was done
with them, so that neurons that they tell apart stand still."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_OUT = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__})

_ASSIGN = Tensor.data.__set__  # type: ignore[attr-defined]


class Leaving(TorchFunctionMode):
    """While open, tells of every tensor whose numbers leave, and of those that are given others (``x.data = y``), which
    is no operation of torch either."""

    def __init__(self, tell: Callable[[Tensor, str], None], assigned: Callable[[Tensor, Tensor], None]) -> None:
        """`tell`: takes the tensor and the method's name; `assigned`: the tensor, and whose numbers it has now."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.tell, self.assigned = tell, assigned

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _OUT and isinstance(args[0], Tensor):
            self.tell(args[0], func.__name__)
        if func == _ASSIGN:
            self.assigned(args[0], args[1])
        return func(*args, **(kwargs or {}))
