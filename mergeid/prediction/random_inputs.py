"""Inputs that no data is needed for: an adapter's example inputs, or noise like the example inputs of a live module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergeid.basics.nested import mapped, named_tensors
from mergeid.data.batches import WholeInputs, input_dtype, to_model
from mergeid.models.examples import Examples
from mergeid.models.loaded import Loaded
from mergeid.models.running import eval_mode
from mergeid.plugins import Batch
from mergeid.prediction.probe import EXAMPLES, LEAST

TRIED = 3
"""Examples that are run to see whether a model takes its inputs by examples."""


def random_examples(loaded: Loaded, seed: int = 0) -> Examples:
    """Examples that are put into batches where the model takes such; else whole inputs: a graph's nodes and edges, an
    image without a batch, sequences that come in order of length."""
    items = RandomInputs(loaded, seed=seed)
    found = Examples(items, items.collate)
    return found if _runs(loaded, found) else Examples(WholeInputs(_Whole(loaded, seed)))


def _runs(loaded: Loaded, examples: Examples) -> bool:
    """Whether the model runs on some examples in one batch, and says something of each."""
    device = next((p.device for p in loaded.model.parameters()), torch.device("cpu"))
    try:
        batch = to_model(examples.taken(range(TRIED)).batches(TRIED)[0], device, input_dtype(loaded.model))
        with torch.no_grad(), eval_mode(loaded.model):
            out = loaded.forward(loaded.model, batch)
    except Exception:  # whatever a foreign forward does with what is no input of its own
        return False
    return out.dim() > 0 and len(out) % TRIED == 0


class RandomInputs(Sequence[int]):
    """Examples by their numbers, of which `collate` makes batches. What is no tensor, or not as long as the first one,
    is the same for all of them: a time, a switch, a table."""

    def __init__(self, loaded: Loaded, count: int = EXAMPLES, seed: int = 0) -> None:
        self.length = count
        generator = torch.Generator().manual_seed(seed)
        if loaded.adapter.name == "torch":
            own = loaded.inputs
            size = next((len(t) for t in named_tensors(own).values() if t.dim()), 0)
            self.batch = mapped(own, lambda t: _noise(t, count, generator) if _is_long(t, size) else t)
            of_each = [k for k, t in named_tensors(own).items() if _is_long(t, size)]
        else:
            made = loaded.inputs_of(loaded.adapter.example_inputs(loaded.arch, loaded.model, generator, count))
            self.batch = mapped(made, lambda t: t.cpu())
            of_each = [k for k, t in named_tensors(made).items() if _is_long(t, count)]
        found = named_tensors(self.batch)
        self._of_each = {id(found[k]) for k in of_each}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return index

    def collate(self, items: Sequence[int]) -> Batch:
        """Those of some numbers."""
        chosen = torch.tensor(items)
        return mapped(self.batch, lambda t: t[chosen] if id(t) in self._of_each else t)


class _Whole(Sequence[Batch]):
    """Inputs that are never cut or stacked."""

    def __init__(self, loaded: Loaded, seed: int) -> None:
        self.loaded, self.seed = loaded, seed

    def __len__(self) -> int:
        return LEAST

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < LEAST:
            raise IndexError(index)
        loaded, generator = self.loaded, torch.Generator().manual_seed(self.seed + index)
        if loaded.adapter.name != "torch":
            made = loaded.adapter.example_inputs(loaded.arch, loaded.model, generator)
            return mapped(loaded.inputs_of(made), lambda t: t.cpu())
        return mapped(loaded.inputs, lambda t: _like(t, t.shape, generator) if t.is_floating_point() else t)


def _is_long(value: Tensor, size: int) -> bool:
    return value.layout == torch.strided and value.dim() > 0 and len(value) == size


def _noise(value: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` examples like those of a tensor: normal of its mean and spread, its own integers at random, or masks."""
    shape = (count, *value.shape[1:])
    if value.is_floating_point():
        return _like(value, shape, generator)
    own = value.detach().cpu()
    pool = own if value.dtype == torch.bool else own.reshape(-1)  # a mask hides some positions, and never all
    drawn = pool[torch.randint(len(pool), shape[:1] if pool is own else shape, generator=generator)]
    return drawn.reshape(shape)


def _like(value: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal, with a tensor's mean and spread; a sparse one, and what is not finite, stays as it is."""
    wide = value.detach().cpu().float()
    if value.layout != torch.strided or not wide.isfinite().all():
        return value if tuple(value.shape) == tuple(shape) else wide[:1].expand(*shape).to(value.dtype)
    spread = wide.std() if wide.numel() > 1 else torch.ones(())
    return (wide.mean() + spread * torch.randn(shape, generator=generator)).to(value.dtype)
