"""Make any model asymmetric before training, so that two networks trained from different seeds merge as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

from torch import Generator, Tensor, nn

from mergeid.errors import MergeidError
from mergeid.nn import syre, w_asymmetric  # noqa: F401  # register their kinds
from mergeid.nn.activations import convert_activations
from mergeid.nn.effective import Asymmetric, Parts, attach
from mergeid.nn.kinds import Kind, get_kind
from mergeid.nn.layers import neuron_axes
from mergeid.nn.selection import Layers, choose, selector


@dataclass
class Conversion:
    """What `asymmetrise` did.

    Attributes:
        converted: names of the layers (or activations) that are asymmetric now.
        skipped: name -> why it was left as it was.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def asymmetrise(
    model: nn.Module,
    kind: str = "w",
    *,
    generator: Generator,
    sigma: float | None = None,
    fixed: float = 0.25,
    layers: Layers | None = None,
    preserve_scale: bool = True,
    example_inputs: Any = None,
) -> Conversion:
    """Replace linear and convolutional layers by asymmetric ones, in place, before training.

    Models that are to merge as they are need the same fixed parts: the same architecture, arguments and generator
    seed. Their trainable weights may be initialised and trained with any seed.

    Args:
        kind: "w" (`mergeid.nn.w_asymmetric`), "syre", or "sigma" (activations instead of layers).
        generator: draws all fixed parts, on the CPU, in the order of ``model.named_modules()``.
        sigma: standard deviation of the fixed entries, absolute, beside trainable weights as they were initialised
            (kind "sigma": of F x for inputs of unit variance). Default: the kind's own.
        fixed: share (or number) of fixed entries per neuron, for kind "w".
        layers: glob of module names, several of them, or a predicate of (name, module). By default all but the task
            head, layers tied to an embedding, and layers too narrow for distinct masks.
        preserve_scale: multiply F and D of each layer by one factor, so that its output keeps the scale of its input
            (a neuron's effective weights have norm 1 in the root mean square, if W starts with variance
            1/inputs); W, σ and a training step of W keep their proportion. False leaves F and D as in the papers.
        example_inputs: needed by "sigma", to see where the neurons lie: a tensor, a tuple, or a dict of keywords.

    Raises:
        MergeidError: unknown kind, nothing to convert, a chosen layer that cannot be converted or is tied to one
            that is not.
    """
    if kind == "sigma":
        if example_inputs is None:
            raise MergeidError(
                'kind "sigma" needs example_inputs, to see on which axis the neurons of an activation lie'
            )
        chosen = selector(layers) if layers is not None else lambda name, module: True
        result = Conversion(
            *convert_activations(
                model, example_inputs, chosen, sigma=1.0 if sigma is None else sigma, generator=generator
            )
        )
    else:
        found = get_kind(kind)
        result = _convert_layers(
            model, found, found.sigma if sigma is None else sigma, fixed, layers, preserve_scale, generator
        )
    if not result.converted:
        why = "; ".join(f"{n}: {w}" for n, w in list(result.skipped.items())[:3]) or "it has none of the known layers"
        raise MergeidError(
            f"no layer of {type(model).__name__} was made asymmetric ({why}); choose others with `layers`"
        )
    return result


def asymmetric_layer(
    layer: nn.Module,
    kind: str = "w",
    *,
    generator: Generator,
    sigma: float | None = None,
    fixed: float = 0.25,
    preserve_scale: bool = False,
) -> nn.Module:
    """One linear or convolutional layer made asymmetric, in place, F and D as in the papers. Returns `layer`.

    Arguments as for `asymmetrise`. Raises `MergeidError` for another module, or masks that cannot be distinct."""
    asymmetrise(
        layer,
        kind,
        generator=generator,
        sigma=sigma,
        fixed=fixed,
        preserve_scale=preserve_scale,
        layers=lambda n, m: not n,
    )
    return layer


def _convert_layers(
    model: nn.Module,
    kind: Kind,
    sigma: float,
    fixed: float,
    layers: Layers | None,
    preserve_scale: bool,
    generator: Generator,
) -> Conversion:
    candidates, skipped = choose(model, layers)
    result = Conversion(skipped=skipped)
    drawn: dict[int, Parts] = {}
    ready: dict[str, dict[str, Parts]] = {}
    for name, module in candidates.items():
        try:
            ready[name] = _parts(module, kind, sigma, fixed, preserve_scale, generator, drawn)
        except MergeidError as error:
            if layers is not None:
                raise MergeidError(f"layer {name!r}: {error}") from None
            result.skipped[name] = str(error)
    for name, parts in ready.items():
        attach(candidates[name], parts, name)
        result.converted.append(name)
    return result


def _parts(
    module: nn.Module,
    kind: Kind,
    sigma: float,
    fixed: float,
    preserve_scale: bool,
    generator: Generator,
    drawn: dict[int, Parts],
) -> dict[str, Parts]:
    """Parts of one layer's parameters; those of a tied weight once (`drawn`)."""
    if isinstance(module, Asymmetric):
        raise MergeidError("it is asymmetric already")
    out: dict[str, Parts] = {}
    for name, axis in neuron_axes(module).items():
        weight = _parameter(module, name)
        if id(weight) not in drawn:
            made = kind.make(weight.detach(), axis, sigma=sigma, fixed=fixed, generator=generator)
            made = made.scaled(_scale(weight.shape, axis, made)) if preserve_scale else made
            drawn[id(weight)] = _like(made, weight)
        out[name] = drawn[id(weight)]
        bias_name = name.replace("weight", "bias")
        bias = module._parameters.get(bias_name)
        if kind.biases and bias is not None:
            if id(bias) not in drawn:
                made = kind.make(bias.detach(), 0, sigma=sigma, fixed=fixed, generator=generator)
                first = out[name].mask
                # the factor of the weight: the whole output is scaled, not a part of it
                factor = 1.0 if first is None else float(first.max())
                drawn[id(bias)] = _like(made.scaled(factor) if preserve_scale else made, bias)
            out[bias_name] = drawn[id(bias)]
    return out


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    found = module._parameters[name]
    assert found is not None
    return found


def _like(parts: Parts, parameter: Tensor) -> Parts:
    """In the parameter's dtype and on its device, once for all layers that share them."""
    data = parameter.detach()
    return Parts(parts.fixed.to(data), None if parts.mask is None else parts.mask.to(data))


def _scale(shape: Sequence[int], axis: int, parts: Parts) -> float:
    """The factor that makes a neuron's effective weights of norm 1 in the root mean square, if W is of norm 1.

    It depends on F and D only, not on how W was drawn, so that networks of any seed have the same F and D."""
    neurons = shape[axis]
    entries = prod(shape) // neurons
    free = float(entries) if parts.mask is None else float(parts.mask.double().sum()) / neurons
    return 1 / sqrt(float(parts.fixed.double().square().sum()) / neurons + free / entries)
