"""Which layers of a model are made asymmetric: what the user chose, or all that can be but the task head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Union

from torch import nn

from mergeid.errors import MergeidError
from mergeid.nn.layers import neuron_axes

Layers = Union[str, Sequence[str], Callable[[str, nn.Module], bool]]


def choose(model: nn.Module, layers: Layers | None) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The chosen layers by name, and why others are left out.

    Raises `MergeidError` where `layers` matches nothing, or one of several layers that share a weight."""
    candidates = {n: m for n, m in model.named_modules() if neuron_axes(m)}
    skipped: dict[str, str] = {}
    chosen = _explicit(candidates, layers) if layers is not None else _default(model, candidates, skipped)
    _refuse_partly_tied(model, candidates, chosen, skipped, explicit=layers is not None)
    return {n: candidates[n] for n in chosen}, skipped


def selector(layers: Layers) -> Callable[[str, nn.Module], bool]:
    """A predicate of (name, module) for globs, or the predicate itself."""
    if callable(layers):
        return layers
    patterns = [layers] if isinstance(layers, str) else list(layers)
    return lambda name, module: any(fnmatchcase(name, p) for p in patterns)


def _explicit(candidates: dict[str, nn.Module], layers: Layers) -> list[str]:
    wanted = selector(layers)
    chosen = [n for n, m in candidates.items() if wanted(n, m)]
    if not chosen:
        raise MergeidError(
            f"layers={layers!r} matches no linear or convolutional layer; "
            f"the first are {', '.join(list(candidates)[:5])}"
        )
    return chosen


def _default(model: nn.Module, candidates: dict[str, nn.Module], skipped: dict[str, str]) -> list[str]:
    heads = set(_heads(model, candidates))
    for name in candidates:
        if name in heads:
            skipped[name] = "task head"
    return [n for n in candidates if n not in heads]


def _heads(model: nn.Module, candidates: dict[str, nn.Module]) -> Iterator[str]:
    """Layers of the task head: what the model says is its classifier or output embedding, or lies outside its base
    model (the conventions of timm and transformers); else the last layer."""
    own: set[int] = set()
    for getter in ("get_classifier", "get_output_embeddings"):
        found = getattr(model, getter)() if hasattr(model, getter) else None
        for part in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(part, nn.Module):
                own |= {id(m) for m in part.modules()}
    base = getattr(model, "base_model", None)
    told = hasattr(model, "get_classifier") or isinstance(base, nn.Module)
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(m) for m in base.modules()}
        own |= {id(m) for m in candidates.values() if id(m) not in inside}
    if not told:
        own |= {id(m) for m in list(candidates.values())[-1:]}
    yield from (n for n, m in candidates.items() if id(m) in own)


def _refuse_partly_tied(
    model: nn.Module, candidates: dict[str, nn.Module], chosen: list[str], skipped: dict[str, str], explicit: bool
) -> None:
    """A tied weight is converted in all layers that use it, or in none."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    for name in list(chosen):
        axes = neuron_axes(candidates[name])
        for key in axes:
            inside = {f"{n}.{k}" if n else k: a for n in chosen for k, a in neuron_axes(candidates[n]).items()}
            mine = f"{name}.{key}" if name else key
            others = [
                u for u in users[id(candidates[name]._parameters[key])] if u != mine and inside.get(u) != axes[key]
            ]
            if others:
                why = f"its {key} is tied to {others[0]}, which is not converted alike"
                if explicit:
                    raise MergeidError(f"layer {name!r} cannot be converted: {why}; choose both or neither in `layers`")
                skipped[name] = why
                chosen.remove(name)
                break
