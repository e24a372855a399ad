"""Make any model asymmetric before training, so that two networks trained from different seeds merge as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mergeid.errors import MergeidError
from mergeid.nn import syre, w_asymmetric  # noqa: F401  # register their kinds
from mergeid.nn.activations import convert_activations
from mergeid.nn.effective import Asymmetric, Parts, attach
from mergeid.nn.kinds import Kind, get_kind
from mergeid.nn.layers import is_table
from mergeid.nn.selection import Candidate, Layers, choose, selector, users

CLEAR = 1.1
"""Times 1/√inputs: weights drawn with that standard deviation lie closer to it."""


@dataclass
class Conversion:
    """What `asymmetrise` did.

    Attributes:
        converted: names of the layers (of bare tables: of the parameters; of activations) that are asymmetric now.
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
    """Give a whole network fixed parts, in place, before training: linear and convolutional layers, embeddings, class
    tokens and learned positions; the task head is left free.

    Models that are to merge as they are need the same fixed parts: the same architecture, arguments and generator
    seed. Their trainable weights may be initialised and trained with any seed.

    The chain from the inputs on is what holds neurons in place: a layer whose inputs may be in any order says nothing
    of its own. An output layer that is tied to an embedding shares the embedding's fixed part. What has too few entries
    for distinct masks (a class token, a depthwise kernel) gets a fixed part in every entry, beside trainable ones
    (D = 1), unless `layers` names it.

    Args:
        kind: "w" (`mergeid.nn.w_asymmetric`), "syre", or "sigma" (activations instead of layers).
        generator: draws all fixed parts, on the CPU: tables first, else in the order of ``model.named_modules()``.
        sigma: standard deviation of the fixed entries, absolute, beside trainable weights as they were initialised
            (kind "sigma": of F x for inputs of unit variance). Default: the kind's own.
        fixed: share (or number) of fixed entries per neuron, for kind "w".
        layers: glob of module names (of bare tables: parameter names), several of them, or a predicate of (name,
            module), which sees layers and embeddings only. By default all but the task head.
        preserve_scale: multiply F and D of each layer by one factor, so that its output keeps the scale of its input
            (a neuron's effective weights have norm 1 in the root mean square, if W starts with variance
            1/inputs; one that starts larger is scaled down to that); W, σ and a training step of W keep their
            proportion. Entries of a table have variance 1, of one that an output layer reads 1/neurons. False leaves
            F and D as in the papers, and W as it is.
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
    draw = _Draw(kind, sigma, fixed, preserve_scale, generator, dense=layers is None)
    # an embedding that an output layer reads: its entries are that layer's weights too
    draw.read |= {k for k, group in users(model).items() if any(not is_table(m, p) for _, m, p in group)}
    ready: dict[str, dict[str, Parts]] = {}
    # a tied tensor has its neurons where a table has them, whoever comes first
    for name in sorted(candidates, key=lambda n: not _holds_table(candidates[n])):
        try:
            ready[name] = draw.parts(candidates[name])
        except MergeidError as error:
            if layers is not None:
                raise MergeidError(f"layer {name!r}: {error}") from None
            result.skipped[name] = str(error)
    by_owner: dict[str, dict[str, Parts]] = {}
    for name, candidate in candidates.items():
        if name in ready:
            by_owner.setdefault(candidate.owner, {}).update(ready[name])
            result.converted.append(name)
    modules = {c.owner: c.module for c in candidates.values()}
    for owner, parts in by_owner.items():
        attach(modules[owner], parts, owner)
    return result


def _holds_table(candidate: Candidate) -> bool:
    return any(is_table(candidate.module, p) for p in candidate.axes)


class _Draw:
    """Draws the parts of one layer after another; those of a tied weight once.

    Args:
        dense: what has too few entries for the kind's parts gets a fixed part in every entry.
    """

    def __init__(
        self, kind: Kind, sigma: float, fixed: float, preserve_scale: bool, generator: Generator, *, dense: bool
    ) -> None:
        self.kind, self.sigma, self.fixed, self.preserve_scale = kind, sigma, fixed, preserve_scale
        self.generator, self.dense = generator, dense
        self.drawn: dict[int, Parts] = {}
        self.read: set[int] = set()
        """Identities of parameters that a layer multiplies with."""

    def parts(self, candidate: Candidate) -> dict[str, Parts]:
        """Parts of one layer's parameters, or of one bare table."""
        module = candidate.module
        if isinstance(module, Asymmetric):
            raise MergeidError("it is asymmetric already")
        out: dict[str, Parts] = {}
        for name, axis in candidate.axes.items():
            weight = _parameter(module, name)
            if id(weight) not in self.drawn:
                made = self._made(weight, axis)
                if self.preserve_scale:
                    inputs = self._inputs(module, name, weight, axis)
                    made = made.scaled(_scale(inputs, made))
                    _brought_down(weight, inputs)
                self.drawn[id(weight)] = _like(_without_padding(made, module), weight)
            out[name] = self.drawn[id(weight)]
            bias_name = name.replace("weight", "bias")
            bias = module._parameters.get(bias_name) if bias_name != name else None
            if self.kind.biases and bias is not None:
                if id(bias) not in self.drawn:
                    made = self._made(bias, 0)
                    first = out[name].mask
                    # the factor of the weight: the whole output is scaled, not a part of it
                    factor = 1.0 if first is None else float(first.max())
                    self.drawn[id(bias)] = _like(made.scaled(factor) if self.preserve_scale else made, bias)
                out[bias_name] = self.drawn[id(bias)]
        return out

    def _inputs(self, module: nn.Module, name: str, weight: Tensor, axis: int) -> int:
        """What a layer sums over: a row of a table is taken as it is, and where an output layer reads the table, that
        layer sums over its neurons."""
        neurons = weight.shape[axis]
        if not is_table(module, name):
            return weight.numel() // neurons
        return neurons if id(weight) in self.read else 1

    def _made(self, parameter: Tensor, axis: int) -> Parts:
        try:
            return self.kind.make(
                parameter.detach(), axis, sigma=self.sigma, fixed=self.fixed, generator=self.generator
            )
        except MergeidError:
            # a token has one entry per neuron: there is no choice of masks to speak of
            if not self.dense and parameter.numel() > parameter.shape[axis]:
                raise
            return Parts(self.sigma * torch.randn(parameter.shape, generator=self.generator))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    found = module._parameters[name]
    assert found is not None
    return found


def _like(parts: Parts, parameter: Tensor) -> Parts:
    """In the parameter's dtype and on its device, once for all layers that share them."""
    data = parameter.detach()
    return Parts(parts.fixed.to(data), None if parts.mask is None else parts.mask.to(data))


def _without_padding(parts: Parts, module: nn.Module) -> Parts:
    """The row of an embedding's padding token is 0 and stays so."""
    row = getattr(module, "padding_idx", None)
    if not isinstance(module, nn.Embedding) or row is None:
        return parts
    fixed = parts.fixed.clone()
    fixed[row] = 0
    return Parts(fixed, parts.mask)


def _brought_down(weight: nn.Parameter, inputs: int) -> None:
    """Weights that start with a variance clearly above 1/inputs start with that one: beside larger ones the fixed part
    would be less than was asked for."""
    with torch.no_grad():
        size = float(weight.double().square().mean().sqrt()) * sqrt(inputs)
        if size > CLEAR:
            weight.div_(size)


def _scale(inputs: int, parts: Parts) -> float:
    """The factor that makes weights over that many inputs of norm 1 in the root mean square, if W is of norm 1.

    It depends on F and D only, not on how W was drawn, so that networks of any seed have the same F and D."""
    free = 1.0 if parts.mask is None else float(parts.mask.double().mean())
    return 1 / sqrt(float(parts.fixed.double().square().mean()) * inputs + free)
