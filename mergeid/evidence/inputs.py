"""What a layer multiplies its weights with: its inputs as rows, one per position, read by hooks.

Linear layers (also the transposed ones with ``nf`` outputs), convolutions of any dimension with their own padding,
stride, dilation and groups, and embeddings, whose rows are token ids. `weight_rows` lays a weight out to match: one
neuron per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergeid.basics.hooks import listening
from mergeid.errors import MergeidError
from mergeid.evidence.support import InputMoments, Support, TokenCounts

EXACT = 4096
"""Widest input whose covariance is kept whole (134 MB in float64)."""
COLUMNS = 1024
"""Columns of the sketch of wider inputs."""
ROW_VALUES = 1 << 24
"""Values of unfolded inputs that are made at once."""

Forward = Callable[[nn.Module, Any], Any]
Moments = InputMoments | TokenCounts


def kind_of(module: nn.Module) -> str | None:
    """ "linear", "transposed linear", "convolution", "embedding", or None for a module that is none of these, as
    those with complex weights are."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_complex():
        return None
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.modules.conv._ConvNd):
        return None if module.transposed else "convolution"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(weight, Tensor) and weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1]:
        return "transposed linear"
    return None


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers whose inputs can be read, by module name."""
    return {name: m for name, m in model.named_modules() if kind_of(m) is not None}


def weight_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as rows [neurons, inputs of one group].

    Raises `MergeidError` where its shape is not that of the layer's weight."""
    own = module.weight
    assert isinstance(own, Tensor)
    expected = tuple(own.shape)
    if tuple(weight.shape) != expected:
        raise MergeidError(f"a weight of shape {tuple(weight.shape)} does not fit a layer that expects {expected}")
    kind = kind_of(module)
    if kind in ("transposed linear", "embedding"):
        return weight.T
    return weight.reshape(len(weight), -1)


def input_rows(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """The layer's input as rows [examples, positions, groups, inputs]; token ids [examples, positions] for embeddings.

    Args:
        x, output: the module's input and output, examples first. The output's size tells a padding that the layer adds
            by itself.

    Convolutions: ``rows[e, p, g] @ weight_rows[neurons of group g].T`` is the output at position p, without bias.
    """
    kind = kind_of(module)
    if kind == "embedding":
        return x.reshape(len(x), -1)
    if kind == "convolution":
        assert isinstance(module, nn.modules.conv._ConvNd)
        return _patches(module, x, output)
    return x.reshape(len(x), -1, 1, x.shape[-1])


def _batched(module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output with examples in dimension 0, which a single example may lack."""
    kind = kind_of(module)
    least = 1 if kind == "embedding" else 2
    if kind == "convolution":
        least = len(module.kernel_size) + 2  # type: ignore[arg-type]
    return (x[None], output[None]) if x.dim() < least else (x, output)


def _values_per_example(module: nn.Module, x: Tensor, output: Tensor) -> int:
    if kind_of(module) != "convolution":
        return x[0].numel()
    return output[0, 0].numel() * module.weight[0].numel() * module.groups  # type: ignore[index,operator,union-attr,return-value]


def _patches(module: nn.modules.conv._ConvNd, x: Tensor, output: Tensor) -> Tensor:
    spatial = len(module.kernel_size)
    spans = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    sizes = zip(x.shape[2:], output.shape[2:], spans, module.stride, strict=True)
    needed = [max((n - 1) * stride + span - have, 0) for have, n, span, stride in sizes]
    # "same" pads what its outputs need
    pads = [0] * spatial if isinstance(module.padding, str) else [2 * p for p in module.padding]
    amounts: list[int] = []
    for i in reversed(range(spatial)):
        total = pads[i]
        made = (x.shape[2 + i] + total - spans[i]) // module.stride[i] + 1
        if made != output.shape[2 + i]:
            # a layer that pads in its own forward pass, to ceil(size / stride) outputs, the odd one at the end
            total = needed[i]
        amounts += [total // 2, total - total // 2]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, amounts, mode=mode) if any(amounts) else x
    for i in range(spatial):
        x = x.unfold(2 + i, spans[i], module.stride[i])[..., :: module.dilation[i]]
    if x.shape[2 : 2 + spatial] != output.shape[2:]:
        raise MergeidError(
            f"a convolution gave {tuple(output.shape[2:])} positions where its padding and stride make "
            f"{tuple(x.shape[2 : 2 + spatial])}; leave this layer out"
        )
    groups = module.groups
    x = x.reshape(len(x), groups, x.shape[1] // groups, *x.shape[2:])
    x = x.movedim(list(range(3, 3 + spatial)), list(range(1, 1 + spatial)))
    positions = int(np.prod(x.shape[1 : 1 + spatial]))
    return x.reshape(len(x), positions, groups, -1)


class InputReader:
    """Hooks on layers that hand their input rows on, slice by slice of a batch.

    Args:
        take: called with the layer's name and rows [N, groups, inputs], or token ids [N].
        positions: most positions of an example that are read, drawn once per number of positions; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[str],
        take: Callable[[str, Tensor], None],
        *,
        positions: int | None = None,
        seed: int = 0,
    ) -> None:
        self.modules = {name: _named(model, name) for name in modules}
        self.take, self.positions, self.seed = take, positions, seed
        self.mask: Tensor | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hooks are there inside of the context."""
        handles = [m.register_forward_hook(self._hook(name)) for name, m in self.modules.items()]
        try:
            yield
        finally:
            for h in handles:
                h.remove()

    def __call__(self, model: nn.Module, batch: Any, forward: Forward) -> None:
        """One batch. A 2-D ``attention_mask`` in it says which tokens are real: the others are not read."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        with self.reading(), torch.no_grad():
            forward(model, batch)

    def _hook(self, name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            x = args[0] if args else None
            if not isinstance(x, Tensor):
                raise MergeidError(f"layer {name!r} was called without a tensor as its first argument; leave it out")
            x, output = _batched(module, x, output)
            values = _values_per_example(module, x, output)
            each = max(ROW_VALUES // max(values, 1), 1)
            # a mask over tokens says nothing of an image's positions
            mask = None if self.mask is None or len(getattr(module, "kernel_size", ())) > 1 else self.mask
            for start in range(0, len(x), each):
                part = slice(start, start + each)
                rows = input_rows(module, x[part], output[part])
                if mask is not None and rows.shape[:2] == mask[part].shape:
                    keep = mask[part].to(rows.device)
                    rows = torch.cat([self._some(r[m]) for r, m in zip(rows, keep, strict=True)])
                else:
                    rows = self._some(rows.transpose(0, 1)).transpose(0, 1).flatten(0, 1)
                self.take(name, rows)

        return read

    def _some(self, rows: Tensor) -> Tensor:
        """At most `positions` of the first dimension."""
        if self.positions is None or len(rows) <= self.positions:
            return rows
        rng = np.random.default_rng([self.seed, len(rows)])
        at = np.sort(rng.choice(len(rows), self.positions, replace=False))
        return rows[torch.from_numpy(at).to(rows.device)]


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise MergeidError(f"the model has no module {name!r}; module names are those of named_modules()") from error
    if kind_of(module) is None:
        raise MergeidError(
            f"module {name!r} is a {type(module).__name__}; supports are known for linear layers, convolutions and "
            "embeddings"
        )
    return module


def layer_inputs(model: nn.Module, batch: Any, forward: Forward, modules: Sequence[str]) -> dict[str, Tensor]:
    """The input rows [N, groups, inputs] (token ids [N]) of some layers on one batch, all calls one after another."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    InputReader(model, modules, lambda name, rows: found[name].append(rows.clone()))(model, batch, forward)
    missing = [name for name, parts in found.items() if not parts]
    if missing:
        raise MergeidError(f"layer {missing[0]!r} was not called as a module on this batch; leave it out")
    return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class Looks:
    """How much of the inputs is looked at.

    Attributes:
        positions: most of an example, see `InputReader`; depends on their number only, never on the batch.
        exact: widest input without a sketch; columns: of the sketch beyond.
        seed: of the sketch and of the positions.
    """

    positions: int | None = None
    exact: int = EXACT
    columns: int = COLUMNS
    seed: int = 0


def input_moments(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    modules: Sequence[str] | None = None,
    *,
    reading: Looks | None = None,
) -> dict[str, tuple[Moments, ...]]:
    """One pass over the data: moments of every layer's inputs, one per group of a grouped convolution.

    Args:
        modules: names of the layers; default: all of `layers`. One that never runs gets no entry.
        reading: how much of the inputs is looked at; default: all of it.
    """
    how = reading or Looks()
    names = list(layers(model)) if modules is None else list(modules)
    found: dict[str, tuple[Moments, ...]] = {}

    def take(name: str, rows: Tensor) -> None:
        if rows.dim() == 1:
            if name not in found:
                found[name] = (TokenCounts(len(model.get_submodule(name).weight)),)  # type: ignore[arg-type]
            counts = found[name][0]
            assert isinstance(counts, TokenCounts)
            counts.add(rows)
            return
        groups, d = rows.shape[1:]
        if name not in found:
            sketch = how.columns if d > how.exact else None
            # one test matrix for all groups of a layer, the same on every device
            found[name] = tuple(
                InputMoments(d, sketch=sketch, generator=torch.Generator().manual_seed(how.seed)) for _ in range(groups)
            )
        for g, moments in enumerate(found[name]):
            assert isinstance(moments, InputMoments)
            moments.add(rows[:, g])

    reader = InputReader(model, names, take, positions=how.positions, seed=how.seed)
    for batch in batches:
        reader(model, batch, forward)
    return {name: found[name] for name in names if name in found}


def merge_moments(
    a: Mapping[str, tuple[Moments, ...]], b: Mapping[str, tuple[Moments, ...]]
) -> dict[str, tuple[Moments, ...]]:
    """The moments of two parts of the data together (as from two devices); `a` takes up `b`.

    Raises `MergeidError` where they are of different layers."""
    if set(a) != set(b):
        raise MergeidError("the moments are of different layers; accumulate the same modules on every device")
    return {name: tuple(x.merge(y) for x, y in zip(a[name], b[name], strict=True)) for name in a}  # type: ignore[arg-type]


def before_batchnorm(model: nn.Module, batch: Any, forward: Forward) -> set[str]:
    """Layers whose output goes straight into a BatchNorm: their mean and scale are free."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: set[str] = set()
    handles = []

    def remember(name: str) -> Callable[..., None]:
        # the tensor is kept, so that its identity is not given to another one
        return lambda module, args, output: made.__setitem__(id(output), (name, output))

    def look(module: nn.Module, args: Any) -> None:
        if args and id(args[0]) in made:
            found.add(made[id(args[0])][0])

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            handles.append(module.register_forward_pre_hook(look))
        elif kind_of(module) is not None:
            handles.append(module.register_forward_hook(remember(name)))
    with listening(handles):
        forward(model, batch)
    return found


def is_centred(module: nn.Module) -> bool:
    """Whether the layer has a bias of its own, which takes up the mean of its inputs."""
    return getattr(module, "bias", None) is not None


def supports(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    modules: Sequence[str] | None = None,
    *,
    tau: float = 0.9,
    centred: Mapping[str, bool] | None = None,
    reading: Looks | None = None,
) -> dict[str, tuple[Support, ...]]:
    """The support of every layer's inputs, one per group.

    Args:
        tau: share of the variance to explain.
        centred: layers that are (not) to be centred; default: those with a bias are. Say True for a layer whose
            output goes into a BatchNorm.
        modules, reading: as in `input_moments`.
    """
    wanted = centred or {}
    found = input_moments(model, batches, forward, modules, reading=reading)
    out: dict[str, tuple[Support, ...]] = {}
    for name, moments in found.items():
        module = model.get_submodule(name)
        centre = kind_of(module) != "embedding" and wanted.get(name, is_centred(module))
        out[name] = tuple(m.support(tau, centred=centre) for m in moments)
    return out
