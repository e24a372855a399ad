"""A device that is not there: tensors that say that they lie on it hold real values, and mix with no tensor elsewhere.

Every operation is done by the CPU on the values; where a real GPU would refuse the arguments, because they lie on two
devices or a generator belongs to another one, this device does so too. A value comes to the host by `.cpu()`,
`.item()`, `.tolist()` and the like, and `.numpy()` is refused. To be used in a process of its own.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import mergeid
from mergeid.basics.on_demand import OnDemand

NAME = "pretended"
ACROSS = ("_to_copy", "copy_")
"""Operations that take tensors of two devices."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
"""Operations whose indices may lie on the CPU."""


class Elsewhere(Tensor):
    """A tensor on the pretended device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        here = torch.device(NAME, 0)
        made = Tensor._make_subclass(  # shares the memory, so that views are views
            cls, values, values.requires_grad, dispatch_device=True, device_for_backend_keys=here
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Any:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = Elsewhere(self.values.detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if is_parameter else made
        return memo[id(self)]

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy()


def run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One operation, by the CPU."""
    if func is torch.ops.prim.device.default:
        return torch.device(NAME, 0)
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, Elsewhere) for x in tensors)
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    strangers = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    if there and strangers and name not in ACROSS and not (name in INDEXING and isinstance(args[0], Elsewhere)):
        shapes = ", ".join(str(list(x.shape)) for x in strangers)
        raise RuntimeError(f"{func}: expected all tensors on one device, but found {NAME}:0 and cpu ({shapes})")
    result_there = there if asked is None else asked.type == NAME
    if name == "copy_":
        result_there = isinstance(args[0], Elsewhere)
    generator = kwargs.get("generator")
    if generator is not None and result_there:
        raise RuntimeError(f"{func}: expected a generator of {NAME}, but found one of {generator.device}")
    plain = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    if result_there and asked is not None:
        plain["device"] = torch.device("cpu")
    taken: dict[int, Tensor] = {}

    def values(x: Any) -> Any:
        if not isinstance(x, Elsewhere):
            return x
        taken[id(x.values)] = x
        return x.values

    found = func(*tree_map(values, args), **tree_map(values, plain))
    if torch.Tag.inplace_view in func.tags:
        with torch._C._DisableTorchDispatch():  # what carries the values has the new shape too
            func(*args, **kwargs)

    def placed(x: Any) -> Any:
        if id(x) in taken and result_there:  # in place
            return taken[id(x)]
        return Elsewhere(x) if type(x) is Tensor and result_there and x.device.type == "cpu" else x

    return tree_map(placed, found)


class Pretended(TorchDispatchMode):
    """Inside, the device is there; `calls` counts what was computed on it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.is_here = 0, False

    def __enter__(self) -> Pretended:
        self.is_here = True
        torch.autograd.set_multithreading_enabled(False)  # a thread for each device would have no mode
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.is_here = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, OnDemand) for x in tree_leaves((args, kwargs))):
            with Pretended() as inner:  # what is formed, and then done with it, is done here
                found = OnDemand.__torch_dispatch__(func, types, args, kwargs)
            self.calls += inner.calls
            return found
        composed = func is not torch.ops.prim.device.default and func._can_decompose()
        if composed:  # `.to` and the like, inside of what is formed
            with Pretended() as inner:
                found = func.decompose(*args, **(kwargs or {}))
            self.calls += inner.calls
            return found
        found = run(func, args, kwargs or {})
        self.calls += any(isinstance(x, Elsewhere) for x in tree_leaves(found))
        return found


def _unasked(dispatch: Any) -> Any:
    """A mode's method that is not told of questions for the device, which are no operations."""

    def dispatched(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        return dispatch(self, func, types, args, kwargs)

    return dispatched


def pretend() -> Pretended:
    """From now on the verbs know the device; it is there inside of the mode that this returns."""
    from mergeid.models import running
    from mergeid.request import request

    _setup_privateuseone_for_python_backend(NAME)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else parameters would keep their class
    request._device_here = lambda name: name

    def accelerator(device: str | None = None) -> Any:
        return SimpleNamespace(
            device=torch.device(device or "cpu"),
            process_index=0,
            num_processes=1,
            is_main_process=True,
            mixed_precision="no",
            autocast=nullcontext,
            backward=lambda loss: loss.backward(),
        )

    for _, name, _ in pkgutil.walk_packages(mergeid.__path__, "mergeid."):
        if "__main__" not in name:
            importlib.import_module(name)
    for mode in TorchDispatchMode.__subclasses__():
        if mode.__module__.startswith("mergeid."):
            mode.__torch_dispatch__ = _unasked(mode.__torch_dispatch__)

    def placed(make: Any) -> Any:
        def made(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
            contexts = [m.device for m in _get_current_function_mode_stack() if isinstance(m, DeviceContext)]
            device = device or (contexts[-1] if contexts else "cpu")
            with torch._C.DisableTorchFunction():
                found = make(data, device="cpu", **kwargs) if not isinstance(data, Tensor) else make(data, **kwargs)
            return found.to(device)

        return made

    torch.tensor, torch.as_tensor = placed(torch.tensor), placed(torch.as_tensor)  # which ask no mode for its device
    real = running.make_accelerator
    for module in list(sys.modules.values()):
        if getattr(module, "make_accelerator", None) is real:
            module.make_accelerator = accelerator
    pretended, plain = Pretended(), threading.Thread.run

    def in_thread(self: threading.Thread) -> None:  # a mode is that of one thread
        with Pretended() if pretended.is_here else nullcontext():
            plain(self)

    threading.Thread.run = in_thread
    return pretended
