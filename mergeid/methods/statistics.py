"""What RegMean and Fisher merging need to know of a model's behaviour on calibration data.

Both are sums over examples, kept in float64 and added up example by example in a fixed order, so that they do not
depend on the batch size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergeid.basics.hooks import heard
from mergeid.basics.nested import examples_in, mapped
from mergeid.errors import MergeidError
from mergeid.models.running import Forward, eval_mode, fits_the_model
from mergeid.plugins import Batch

CHUNK = 1024
"""Rows whose products are added at once."""


class Gram(NamedTuple):
    """Gram matrix of a linear layer's inputs.

    Attributes:
        matrix: float64 [in, in], Σ x xᵀ over all finite rows divided by their number.
        axis: the axis of the layer's weight along which the inputs lie (1 in ``nn.Linear``, 0 where it is transposed).
    """

    matrix: Tensor
    axis: int


class Affine(NamedTuple):
    """A module that computes x Wᵀ + b (`axis` 1) or x W + b (`axis` 0), recognised by what it does."""

    name: str
    module: nn.Module
    axis: int


def affine_axis(module: nn.Module, x: Tensor, out: Any) -> int | None:
    """Along which axis of ``module.weight`` the inputs lie, if `out` is that affine map of `x`; None if it is not."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not (isinstance(weight, Tensor) and weight.dim() == 2 and isinstance(out, Tensor)) or x.dim() < 1:
        return None
    if not (x.is_floating_point() and out.shape[:-1] == x.shape[:-1]):
        return None
    bias = bias if isinstance(bias, Tensor) else None
    rows, answers = x.detach().reshape(-1, x.shape[-1]), out.detach().reshape(-1, out.shape[-1])
    known = rows.isfinite().all(1).nonzero()[:4, 0]
    if not len(known):
        return None
    row, found = rows[known], answers[known]
    for axis, matrix in ((1, weight), (0, weight.T)):
        if matrix.shape == (out.shape[-1], x.shape[-1]) and (bias is None or bias.shape == out.shape[-1:]):
            expected = F.linear(row, matrix.to(row.dtype), None if bias is None else bias.to(row.dtype))
            scale = found.abs().max().clamp(min=1e-12)
            if (expected - found).abs().max() <= 1e-3 * scale:
                return axis
    return None


def real_rows(x: Tensor, batch: Batch) -> Tensor:
    """[rows, features]: without the positions that the batch's attention mask calls padding, and without rows that are
    not finite (a query that may attend to nothing)."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and x.dim() == 3 and x.shape[:2] == mask.shape:
        rows = x[mask.bool().to(x.device)]
    else:
        rows = x.reshape(-1, x.shape[-1])
    known = rows.isfinite().all(1)
    return rows if bool(known.all()) else rows[known]


def gram_matrices(model: nn.Module, batches: Iterable[Batch], *, forward: Forward) -> dict[str, Gram]:
    """Gram matrices of the inputs of every linear layer, over all positions of all examples.

    Args:
        model: any; run in eval mode.
        batches: calibration batches.
        forward: runs the model on a batch, ``adapter.forward``.

    Returns:
        State-dict key of the layer's weight -> `Gram`. Layers that are not called, and tensors that are not the
        weight of a linear layer, are left out.

    Raises:
        MergeidError: data that does not fit the model, or none.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    axes: dict[str, int | None] = {}
    current: list[Batch] = [{}]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not x.dim() or axes.get(name, 0) is None:
                return
            values = real_rows(x.detach(), current[0])
            if not len(values):
                return
            if name not in axes:
                axes[name] = affine_axis(module, x, out)
            if axes[name] is None:
                return
            if name not in sums:
                sums[name] = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
                rows[name] = 0
            for part in values.split(CHUNK):
                part = part.double()
                sums[name] += (part.T @ part).cpu()
            rows[name] += len(values)

        return hook

    with _hooked(model, watch), eval_mode(model), torch.no_grad():
        for batch in batches:
            current[0] = batch
            with fits_the_model(batch):
                forward(model, batch)
    if not current[0]:
        raise MergeidError("RegMean needs the inputs of every layer, which data give; add examples (option --data)")
    found = {}
    for name, total in sums.items():
        axis = axes[name]
        if axis is not None and rows[name]:
            found[f"{name}.weight" if name else "weight"] = Gram(total / rows[name], axis)
    return found


@contextmanager
def _hooked(model: nn.Module, watch: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    modules = [(n, m) for n, m in heard(model) if isinstance(getattr(m, "weight", None), Tensor)]
    owners = Counter(id(m.weight) for _, m in modules)
    modules = [(n, m) for n, m in modules if owners[id(m.weight)] == 1]  # a tied weight has no inputs of its own
    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fisher_diagonal(
    model: nn.Module, batches: Iterable[Batch], *, forward: Forward, generator: torch.Generator
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information: ``F = E_x E_{y ∼ p(y|x)} (∂ log p(y|x) / ∂θ)²``, element by element.

    p is the softmax of the task output's last dimension, at every position that it has; y is drawn from it, one per
    position and example (labels in the data are not looked at). Gradients are per example.

    Args:
        model: any; run in eval mode, its gradients are left as they were.
        batches: calibration batches; they are taken apart into single examples.
        forward: task output of a batch, ``adapter.forward``.
        generator: of the labels y.

    Returns:
        State-dict key of every parameter -> float64 tensor of its shape, the mean over examples.

    Raises:
        MergeidError: data that does not fit the model, or none.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    squares = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in parameters.items()}
    required = {n: p.requires_grad for n, p in parameters.items()}
    count = 0
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with eval_mode(model), torch.enable_grad():
            for batch in batches:
                for example in single_examples(batch):
                    with fits_the_model(example):
                        output = forward(model, example)
                    likelihood = _drawn_log_likelihood(output, generator)
                    gradients = torch.autograd.grad(likelihood, list(parameters.values()), allow_unused=True)
                    for name, gradient in zip(parameters, gradients, strict=True):
                        if gradient is not None:
                            squares[name] += gradient.detach().cpu().double().square()
                    count += 1
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
    if count == 0:
        raise MergeidError("Fisher information needs gradients on examples; give some (option --data)")
    first = {id(p): n for n, p in parameters.items()}
    aliases = {n: first.get(id(p)) for n, p in model.named_parameters(remove_duplicate=False)}
    return {n: squares[origin] / count for n, origin in aliases.items() if origin is not None}


def _drawn_log_likelihood(output: Tensor, generator: torch.Generator) -> Tensor:
    """Σ over positions of log p(y), y drawn from p = softmax(output)."""
    logits = F.log_softmax(output.double().reshape(-1, output.shape[-1]), dim=-1)
    drawn = torch.multinomial(logits.detach().exp().cpu(), 1, generator=generator).to(logits.device)
    return logits.gather(1, drawn).sum()


def single_examples(batch: Batch) -> Iterator[Batch]:
    """The examples of a batch, each as a batch of one; text without its padding."""
    size = examples_in(batch)

    def one(i: int, value: Tensor) -> Tensor:
        return value[i : i + 1] if value.dim() and len(value) == size else value

    def shown(keep: Tensor, value: Tensor) -> Tensor:
        return value[:, keep] if value.dim() == 2 and value.shape[1] == len(keep) else value

    for i in range(size):
        example = mapped(batch, partial(one, i))
        mask = example.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.bool().all():
            example = mapped(example, partial(shown, mask[0].bool()))
        yield example
