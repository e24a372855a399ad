"""Find a model's activation modules by what they do, and give them fixed gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mergeid.nn.layers import neuron_axes
from mergeid.nn.sigma_asymmetric import fixed_gate, give_gate

_CONVOLUTION = nn.modules.conv._ConvNd
_ALONG_THE_LAST = (nn.RNNBase, nn.Bilinear)
"""Layers whose neurons lie on the last axis, beside those that can be converted."""


@dataclass
class _Seen:
    """Uses of one module in the example's forward pass: (neurons, spatial axes) each, and whether it is elementwise."""

    uses: set[tuple[int, int]]
    elementwise: bool


def convert_activations(
    model: nn.Module,
    example_inputs: Any,
    chosen: Callable[[str, nn.Module], bool],
    *,
    sigma: float,
    generator: Generator,
) -> tuple[list[str], dict[str, str]]:
    """Make elementwise, parameter-free activation modules σ-asymmetric, in place.

    Neurons lie before the spatial axes after a convolution, on the last axis after a linear layer. Returns
    (names converted, name -> why it was skipped). Activations that are called as functions are not seen."""
    found = _watch(model, example_inputs)
    converted: list[str] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        seen = found.get(id(module))
        if seen is None or not seen.elementwise or not chosen(name, module):
            continue
        if len(seen.uses) != 1:
            sizes = ", ".join(str(n) for n, _ in sorted(seen.uses))
            skipped[name] = f"it is used on several spaces of neurons (widths {sizes})"
            continue
        width, places = next(iter(seen.uses))
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        give_gate(module, fixed_gate(width, places, sigma=sigma, generator=generator).to(like), name)
        converted.append(name)
    return converted, skipped


def _watch(model: nn.Module, example_inputs: Any) -> dict[int, _Seen]:
    found: dict[int, _Seen] = {}
    convolved: tuple[int, int] | None = None
    probing = False

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal convolved, probing
        if probing:
            return
        if isinstance(module, _CONVOLUTION):
            convolved = module.weight.dim() - 2, output.dim()
            return
        if neuron_axes(module) or isinstance(module, _ALONG_THE_LAST):
            convolved = None
            return
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.shape != output.shape or x.dim() < 2:
            return
        places = _spatial_axes(x.dim(), convolved)
        use = (x.shape[-1 - places], places)
        seen = found.setdefault(id(module), _Seen(set(), True))
        seen.uses.add(use)
        probing = True
        seen.elementwise &= _elementwise(module, x)
        probing = False

    was = {m: m.training for m in model.modules()}
    model.eval()
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            bare = not any(True for _ in module.children()) and not module._parameters and not module._buffers
            if bare or neuron_axes(module) or isinstance(module, (_CONVOLUTION, *_ALONG_THE_LAST)):
                stack.callback(module.register_forward_hook(after).remove)
        if isinstance(example_inputs, Mapping):
            model(**example_inputs)
        else:
            model(*(example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)))
    for module, mode in was.items():
        module.training = mode
    return found


def _spatial_axes(dims: int, convolved: tuple[int, int] | None) -> int:
    """How many axes follow that of the neurons.

    Args:
        convolved: spatial axes of the last convolution and dimensions of its output (one example may come without a
            batch); None: a layer whose neurons lie on the last axis came after it, or there was none.
    """
    if convolved is None:
        return 0
    places, of_output = convolved
    if dims == of_output:
        return places
    # flattened over space: [examples, channels, places]
    return dims - 2 if of_output == places + 2 and dims in (3, 4) else 0


def _elementwise(module: nn.Module, x: Tensor) -> bool:
    """Whether the module maps every element on its own and alike, and not to itself: shuffled inputs give shuffled
    outputs, and a change of one input changes that output alone."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(x.numel(), generator=generator).to(x)
    order = torch.randperm(x.numel(), generator=generator).to(x.device)
    changed = values.clone()
    changed[0] += 1

    def run(flat: Tensor) -> Tensor:
        answer: Tensor = module(flat.reshape(x.shape).clone()).reshape(-1)
        return answer

    plain = run(values)
    alike = torch.allclose(run(values[order]), plain[order]) and torch.equal(run(changed)[1:], plain[1:])
    return alike and not torch.allclose(plain, values)
