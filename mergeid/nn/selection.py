"""Which parameters of a model are made asymmetric: what the user chose, or all that can be but the task head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Union

from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.nn.layers import bare_tables, is_table, neuron_axes

Layers = Union[str, Sequence[str], Callable[[str, nn.Module], bool]]


@dataclass(frozen=True)
class Candidate:
    """A layer with the parameters that can have fixed parts, or one table that a module holds beside its layers.

    Attributes:
        owner: name of the module; axes: parameter name -> axis of its neurons.
    """

    owner: str
    module: nn.Module
    axes: dict[str, int]

    def full(self, parameter: str) -> str:
        """The parameter's name in the whole network."""
        return f"{self.owner}.{parameter}" if self.owner else parameter


def choose(model: nn.Module, layers: Layers | None) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The chosen layers and bare tables by name, and why others are left out.

    Raises `MergeidError` where `layers` matches nothing, or one of several layers that share a weight."""
    candidates = _candidates(model)
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


def users(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Identity of a parameter -> (module name, module, parameter name) of everything that uses it; more than one where
    it is tied."""
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((name, module, key))
    return found


def _candidates(model: nn.Module) -> dict[str, Candidate]:
    """By the name of the module for layers and embeddings, of the parameter for bare tables."""
    found: dict[str, Candidate] = {}
    for name, module in model.named_modules():
        if axes := neuron_axes(module):
            found[name] = Candidate(name, module, axes)
        for key, axis in bare_tables(module).items():
            found[f"{name}.{key}" if name else key] = Candidate(name, module, {key: axis})
    return found


def _explicit(candidates: dict[str, Candidate], layers: Layers) -> list[str]:
    wanted = selector(layers)
    # a predicate asks about modules: a bare table is none
    names = [n for n, c in candidates.items() if n == c.owner or not callable(layers)]
    chosen = [n for n in names if wanted(n, candidates[n].module)]
    if not chosen:
        raise MergeidError(
            f"layers={layers!r} matches no linear or convolutional layer, embedding or table; "
            f"the first are {', '.join(list(candidates)[:5])}"
        )
    return chosen


def _default(model: nn.Module, candidates: dict[str, Candidate], skipped: dict[str, str]) -> list[str]:
    heads = set(_heads(model, candidates))
    by_weight = users(model)
    for name, candidate in candidates.items():
        if name in heads and _reads_embedding(candidate, by_weight):
            heads.discard(name)  # what anchors the network is the same tensor
        elif name in heads:
            skipped[name] = "task head"
        elif not any(_parameter(candidate, p).requires_grad for p in candidate.axes):
            skipped[name] = "it is not trained"
        elif name != candidate.owner and all(_constant(_parameter(candidate, p)) for p in candidate.axes):
            skipped[name] = "all its values are equal before training, so it is a gain or an offset and no table"
    return [n for n in candidates if n not in skipped]


def _reads_embedding(candidate: Candidate, by_weight: dict[int, list[tuple[str, nn.Module, str]]]) -> bool:
    """Whether a head is tied to an embedding."""
    tied = [by_weight[id(candidate.module._parameters[p])] for p in candidate.axes]
    return any(isinstance(m, nn.Embedding) for group in tied for _, m, _ in group)


def _parameter(candidate: Candidate, name: str) -> nn.Parameter:
    found = candidate.module._parameters[name]
    assert found is not None
    return found


def _constant(parameter: Tensor) -> bool:
    return not parameter.is_meta and bool((parameter == parameter.reshape(-1)[0]).all())


def _heads(model: nn.Module, candidates: dict[str, Candidate]) -> Iterator[str]:
    """Output layers of the task heads: the last layer of what the model says is its classifier or output embedding, and
    of every part outside its base model (the conventions of timm and transformers); else the last layer of all."""
    layers = {n: c.module for n, c in candidates.items() if n == c.owner and not isinstance(c.module, nn.Embedding)}
    groups: list[list[str]] = []
    for getter in ("get_classifier", "get_output_embeddings"):
        found = getattr(model, getter)() if hasattr(model, getter) else None
        for part in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(part, nn.Module):
                inside = {id(m) for m in part.modules()}
                groups.append([n for n, m in layers.items() if id(m) in inside])
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(m) for m in base.modules()}
        for part in model.children():
            of_part = {id(m) for m in part.modules()} - inside
            groups.append([n for n, m in layers.items() if id(m) in of_part])
    if not hasattr(model, "get_classifier") and not isinstance(base, nn.Module):
        groups.append(list(layers))
    yield from dict.fromkeys(group[-1] for group in groups if group)


def _refuse_partly_tied(
    model: nn.Module, candidates: dict[str, Candidate], chosen: list[str], skipped: dict[str, str], explicit: bool
) -> None:
    """A tied weight is converted in all layers that use it, or in none. Its neurons lie along one axis, but in a table
    that an output layer reads they are the layer's inputs."""
    by_weight = users(model)
    for name in list(chosen):
        mine = candidates[name]
        for key, axis in mine.axes.items():
            inside = {
                (candidates[n].owner, k): a if not is_table(candidates[n].module, k) else None
                for n in chosen
                for k, a in candidates[n].axes.items()
            }
            group = [(owner, k) for owner, _, k in by_weight[id(mine.module._parameters[key])]]
            table = any(u in inside and inside[u] is None for u in group)
            others = [u for u in group if u not in inside or (inside[u] != axis and not table)]
            if others:
                other = ".".join(filter(None, others[0]))
                why = f"its {key} is tied to {other}, which is not converted alike"
                if explicit:
                    raise MergeidError(f"layer {name!r} cannot be converted: {why}; choose both or neither in `layers`")
                skipped[name] = why
                chosen.remove(name)
                break
