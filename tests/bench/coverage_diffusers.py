"""diffusers' models for the coverage table, from small configurations.

``coverage_diffusers.json`` holds a configuration and the shapes of the inputs for each, most of them as diffusers' own
tests have them (Apache-2.0). ``n`` stands for the number of examples; whatever is not drawn (time steps, positions,
masks) is given by its values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from coverage_live import Live

DTYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}


@cache
def _models() -> dict[str, dict[str, Any]]:
    return dict(json.loads(Path(__file__).with_suffix(".json").read_text()))


def names() -> list[str]:
    import diffusers  # before the bench forks

    assert diffusers.UNet2DConditionModel
    return list(_models())


def families() -> dict[str, str]:
    import diffusers

    return {n: getattr(diffusers, n.partition("/")[0]).__module__.split(".")[2] for n in _models()}


def make(name: str) -> Live:
    import diffusers

    spec = _models()[name]
    torch.manual_seed(0)
    kind, config = getattr(diffusers, name.partition("/")[0]), spec["config"]
    try:
        model = kind(**config)
    except TypeError:  # JSON has no tuples
        model = kind(**{k: _tuples(v) for k, v in config.items()})
    return Live(model, lambda g, n: {k: drawn(v, g, n) for k, v in spec["inputs"].items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def drawn(spec: Any, generator: torch.Generator, n: int) -> Any:
    """An input for n examples."""
    if not isinstance(spec, Mapping):
        return spec
    if "repeat" in spec:
        return [drawn(spec["repeat"], generator, n) for _ in range(n)]
    if "list" in spec or "tuple" in spec:
        parts = [drawn(s, generator, n) for s in spec.get("list", spec.get("tuple"))]
        return parts if "list" in spec else tuple(parts)
    if "dict" in spec:
        return {k: drawn(v, generator, n) for k, v in spec["dict"].items()}
    (kind, shape) = next((k, v) for k, v in spec.items() if k not in ("value", "values"))
    size = [n if d == "n" else d for d in shape]
    if kind == "normal":
        return torch.randn(size, generator=generator)
    if "value" in spec:
        return torch.full(size, spec["value"], dtype=DTYPES[kind])
    values = torch.tensor(spec["values"], dtype=DTYPES[kind])
    for d, length in enumerate(size):  # further examples take the first ones' values again
        values = values.index_select(d, torch.arange(length) % values.shape[d])
    return values
