"""A copy of a model that runs on other weights, so that its outputs can be compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mergeid.basics.casting import in_precision, kept_kind
from mergeid.basics.memory import SMALL_NETWORK
from mergeid.basics.nested import dense_tensors, mapped
from mergeid.basics.on_demand import OnDemand, light_copy
from mergeid.basics.state import evaluating, forget_derived, tensors_of, uncompiled
from mergeid.errors import MergeidError, reason
from mergeid.neuron_graph.compare import any_nan, as_real
from mergeid.neuron_graph.composed import HigherOrderOperator, plain_calls
from mergeid.neuron_graph.settle import own_statistics
from mergeid.request.boundary import explained

SAMPLED = 256
"""Rows of a weight that say whether it is constant, where it is not held in memory."""


def randomised(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A state dict in which no wrong permutation can hide: constant tensors (fresh BatchNorm statistics, LayerScale,
    zero-initialised layers) get values that differ from neuron to neuron, and gates that are 0 open."""
    state = {}
    for name, own in tensors_of(model).items():
        value = torch.view_as_real(own) if own.is_complex() and not isinstance(own, OnDemand) else own
        if isinstance(value, OnDemand):
            state[name] = _disturbed(value, generator)
        elif value.is_floating_point() and value.numel() > 1:
            wide = value if value.dtype == torch.float64 else value.float()
            noise = torch.rand(value.shape, generator=generator).to(value.device)
            spread = float(wide.std())
            if "running_var" in name:
                wide = (wide.abs() + 0.1) * (0.5 + noise)
            elif not spread >= 1e-6:  # also where it is not finite
                wide = wide + 0.4 * (noise - 0.5)
            else:
                wide = wide + 0.1 * spread * (noise - 0.5)
            state[name] = wide.to(value.dtype)
        elif value.is_floating_point() and value.numel() == 1 and not value.is_meta and float(value) == 0:
            state[name] = torch.full_like(value, 0.5)
        else:
            state[name] = value.clone()
        if own.is_complex():
            state[name] = torch.view_as_complex(state[name].contiguous())
    return state


def _disturbed(value: OnDemand, generator: torch.Generator) -> Tensor:
    """A weight that is formed on demand: as it is, unless its first rows say that it is constant."""
    if value.numel() == 1 or float(value[:SAMPLED].float().std()) >= 1e-6:
        return value.clone()
    noise = torch.rand(value.shape, generator=generator).to(value.device)
    return (value.whole() + 0.4 * (noise - 0.5)).to(value.dtype)


def _copied(model: nn.Module) -> nn.Module:
    """Of a small model a copy with matrices of its own; that of a larger one forms them as it runs."""
    large = sum(p.numel() for p in model.parameters()) > SMALL_NETWORK
    try:
        return light_copy(model) if large else copy.deepcopy(model)
    except Exception as error:
        held = [(n, k, v) for n, m in model.named_modules() for k, v in vars(m).items() if k not in vars(nn.Module())]
        for name, key, value in held:
            if not _can_be_copied(value):
                raise MergeidError(
                    f"{'.'.join(filter(None, (name, key)))} of {type(model).__name__} (of type {type(value).__name__}) "
                    f"cannot be copied ({reason(error)}), and a graph is verified on a copy; take it off the module "
                    "meanwhile"
                ) from error
        raise


def _can_be_copied(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # whatever a foreign object says to that
        return False
    return True


class at_least(TorchDispatchMode):
    """Casts to a shorter float that the model's own code asks for (norms in float32, say) go to `dtype` instead, so
    that a check in float64 has its precision throughout."""

    supports_higher_order_operators = True

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):
            with self:
                return (plain_calls(func) or func)(*args, **kwargs)
        asked = kwargs.get("dtype")
        if asked is not None and asked.is_floating_point and asked.itemsize < self.dtype.itemsize:
            kwargs["dtype"] = self.dtype
        elif asked is not None and asked.is_complex and asked.itemsize < 2 * self.dtype.itemsize:
            kwargs["dtype"] = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        return func(*args, **kwargs)


Change = Callable[[str, Tensor], Tensor]
"""A tensor's name and value -> what takes its place."""


class Probe:
    """Attributes:
    model: the copy, in `dtype`.
    state: the weights that it is compared on.
    noise: names of outputs that are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        forward: Callable[[nn.Module, Any], Any],
        generator: torch.Generator,
        *,
        dtype: torch.dtype,
        randomise: bool,
    ) -> None:
        """Args as for `mergeid.neuron_graph.verify.verify`."""
        self.original, self.inputs, self.forward = model, inputs, forward
        self.dtype, self.randomise = dtype, randomise
        self.noise: list[str] = []
        self.model = evaluating(_copied(model))
        self.state = randomised(self.model, generator) if randomise else self._now()
        self._cuda = sorted({p.device.index for p in self.model.parameters() if p.is_cuda})

    def _now(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in tensors_of(self.model).items()}

    def run(self, change: Change = lambda _, value: value) -> dict[str, Tensor]:
        """The outputs by name, in float64."""
        with torch.no_grad():
            for name, value in tensors_of(self.model).items():
                value.copy_(change(name, self.state[name]))  # one tensor at a time: large models fit
        forget_derived(self.model)
        # a model that draws random numbers draws the same ones every time
        with torch.no_grad(), uncompiled(), at_least(self.dtype), torch.random.fork_rng(self._cuda):
            torch.manual_seed(0)
            out = self.forward(self.model, mapped(self.inputs, self._cast))
        return {name: as_real(t) for name, t in dense_tensors(out).items() if name not in self.noise}

    def _cast(self, tensor: Tensor) -> Tensor:
        """A copy: the model may write into its inputs."""
        return tensor.detach().to(kept_kind(tensor, self.dtype), copy=True)

    def in_precision(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs in that precision from now on."""
        self.dtype = dtype
        self.model = in_precision(self.model, dtype)
        return self.run()

    def start(self) -> dict[str, Tensor]:
        """The first outputs: in the precision that was asked for; in float32 where that does not work (kernels that
        refuse float64, models made for float32); on the model's own weights where disturbed ones are too much.

        Raises `MergeidError` where none of these gives numbers."""
        asked = self.dtype
        said: Exception | None = None
        for own in (False, True) if self.randomise else (False,):
            if own:
                self.state = tensors_of(self.original)
            for dtype in dict.fromkeys((asked, torch.float32)):
                try:
                    reference = self.in_precision(dtype)
                except MergeidError:
                    raise
                except Exception as error:  # whatever a foreign forward says to other weights, or to float64
                    if dtype == torch.float32 and explained(error) is not None:
                        raise
                    said = error
                    continue
                if not any_nan(reference):
                    return reference
                said = None
        source = type(self.original).__name__
        if said is not None:
            raise MergeidError(
                f"a copy of {source} does not run on its example inputs, in float64 or float32 ({type(said).__name__}: "
                f"{reason(said)}), so its graph cannot be verified; give inputs and weights on which copies of it run"
            ) from said
        raise MergeidError(
            f"the outputs of {source} on its example inputs are not numbers (NaN), so its graph cannot be verified; "
            f"give inputs and weights for which its outputs are finite"
        )

    def settle(self) -> dict[str, Tensor]:
        """Outputs with statistics of the layers' own activations from now on."""
        with own_statistics(self.model):
            self.run()
        self.state = self._now()
        return self.run()
