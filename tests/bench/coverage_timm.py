"""timm's models for the coverage table, by name, at the smallest image size that each runs at."""

from __future__ import annotations

from typing import Any

from coverage_check import Batch, Case

from mergeid.plugins import get_adapter

SHRINK_ABOVE = 1_000_000_000
"""Parameters above which a shallower model of the same code is built: this machine has 24 GB."""


def names() -> list[str]:
    import timm

    return timm.list_models()


def families() -> dict[str, str]:
    """Name -> module of timm that defines it."""
    import timm.models

    return {n: timm.models.model_entrypoint(n).__module__.rpartition(".")[2] for n in names()}


def make(name: str) -> Case:
    import torch

    adapter: Any = get_adapter("timm")
    arch = adapter.resolve(name, None, None)
    with torch.device("meta"):
        import timm

        size = sum(p.numel() for p in timm.create_model(name).parameters())
    torch.manual_seed(0)
    note = ""
    if size > SHRINK_ABOVE:
        arch, note = _shallower(adapter, arch, size)
    model = adapter.build(arch)

    def another(generator: torch.Generator, batch_size: int) -> Batch:
        batch = adapter.example_inputs(arch, model, generator, batch_size)
        batch.pop("labels", None)
        return batch

    return Case(model, another(torch.Generator().manual_seed(0), 2), adapter.forward, another, note)


def _shallower(adapter: Any, arch: Any, size: int) -> tuple[Any, str]:
    """The architecture with fewer blocks of the same width."""
    from dataclasses import replace

    for options in ({"depth": 4}, {"depths": (1, 1, 2, 1)}, {"layers": (1, 1, 2, 1)}):
        smaller = replace(arch, options={**arch.options, **options})
        try:
            adapter.build(smaller, device="meta")
        except Exception:
            continue
        key, value = next(iter(options.items()))
        return smaller, f"{size / 1e9:.1f}B parameters, checked with {key}={value}"
    return arch, ""
