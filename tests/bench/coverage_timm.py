"""timm's models for the coverage table, by name, at the smallest image size that each runs at."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

from coverage_check import Batch, Case

from mergeid.plugins import MergeidError, get_adapter

SHRINK_ABOVE = 1_000_000_000
"""Parameters above which a shallower model of the same code is built: this machine has 24 GB."""
SMALL_IMAGE_ABOVE = 20_000_000
"""Parameters above which a model that can be built for smaller images is: passes in float64 take most of the time."""
IMAGES = (56, 64, 96, 112, 128, 160, 192)


@cache
def sizes() -> dict[str, int]:
    """Parameters by name, from the adapter's shipped index."""
    from mergeid_timm.index import _full_tables

    tables = _full_tables()
    return {n: sum(prod(d for d in shape if isinstance(d, int)) for shape in t.values()) for n, t in tables.items()}


def names() -> list[str]:
    """Small models first, so that a table that grows says most soonest."""
    import timm

    get_adapter("timm").resolve("resnet18", None, None)  # loads what the forked processes share
    return sorted(timm.list_models(), key=lambda n: (sizes().get(n, 0), n))


def families() -> dict[str, str]:
    """Name -> module of timm that defines it."""
    import timm.models

    return {n: timm.models.model_entrypoint(n).__module__.rpartition(".")[2] for n in names()}


def structure(name: str) -> str:
    """Equal for names of one config: the same modules with the same settings, for the same images."""
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(name)
    facts = [str(model), str((model.pretrained_cfg or {}).get("input_size"))]
    for module in model.modules():
        plain = {k: v for k, v in sorted(vars(module).items()) if isinstance(v, (int, float, str, tuple))}
        facts.append(f"{type(module).__qualname__} {plain}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def make(name: str, native: bool = False) -> Case:
    """`native`: at the size of the name's own config."""
    import torch

    adapter: Any = get_adapter("timm")
    arch = adapter.resolve(name, None, None)
    size = sizes().get(name, 0)
    torch.manual_seed(0)
    note = ""
    if size > SHRINK_ABOVE:
        try:
            arch = adapter.shrink(arch)
            note = f"{size / 1e9:.1f}B parameters, checked with fewer blocks"
        except MergeidError:  # its class has no depth to set
            note = f"{size / 1e9:.1f}B parameters, checked whole"
    if size > SMALL_IMAGE_ABOVE and not native:
        smaller, image = _smaller_image(adapter, arch)
        if image and _runs(adapter, smaller):
            arch, note = smaller, "; ".join(x for x in (note, image) if x)
    model = adapter.build(arch)

    def another(generator: torch.Generator, batch_size: int) -> Batch:
        batch = adapter.example_inputs(arch, model, generator, batch_size)
        batch.pop("labels", None)
        return batch

    return Case(model, another(torch.Generator().manual_seed(0), 2), adapter.outputs, another, note)


def _smaller_image(adapter: Any, arch: Any) -> tuple[Any, str]:
    """The architecture for the smallest image that its class can be built for and runs at."""
    import torch

    _, height, _ = adapter._input_size(arch, adapter.build(arch, device="meta"))
    for size in IMAGES:
        if size > 0.7 * height:
            break
        smaller = replace(arch, options={**arch.options, "img_size": size})
        try:
            model = adapter.build(smaller, device="meta")
            model(torch.zeros(1, int(arch.options.get("in_chans", 3)), size, size, device="meta"))
        except Exception:  # this class takes no image size, or not this one
            continue
        return smaller, f"images of {size}"
    return arch, ""


def _runs(adapter: Any, arch: Any) -> bool:
    """Also with values: tables of relative positions can be too small for the image that they were built for."""
    import torch

    model = adapter.build(arch)
    try:
        with torch.no_grad():
            adapter.forward(model, adapter.example_inputs(arch, model, torch.Generator().manual_seed(0), 1))
    except Exception:
        return False
    return True
