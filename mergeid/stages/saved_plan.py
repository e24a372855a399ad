"""A plan that was written to a file (``mergeid plan --output``), taken as it is: which models it was made for, and what
it decided."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.evidence.decide import SpaceEvidence
from mergeid.io.plans import read_plan
from mergeid.neuron_graph.group import NoImage
from mergeid.neuron_graph.neuron_graph import Element
from mergeid.request.request import BOTH
from mergeid.stages.open import Pair

SAMPLE = 8
"""Positions of a tensor's first dimension, and of all others together, at which its fingerprint looks."""


@dataclass(frozen=True)
class SavedPlan:
    """What a file says was decided.

    Attributes:
        match: how neurons were to be matched; evidence: what spoke; examples: calibration examples that were run.
        element: permutations of B, space id -> int array.
        records: one per space, without structural margins.
    """

    match: str
    evidence: str
    examples: int
    element: Element
    records: list[SpaceEvidence]


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and shapes of all tensors and of up to `SAMPLE`² numbers of each, in float64."""
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach()
        found.update(f"{name} {tuple(value.shape)}\n".encode())
        if value.dim() and value.numel():
            value = value.index_select(0, _spread(len(value), value.device)).flatten()
            value = value.index_select(0, _spread(len(value), value.device, SAMPLE**2))
        if value.is_complex():
            value = torch.view_as_real(value)
        found.update(value.to("cpu", torch.float64).numpy().tobytes())
    return found.hexdigest()


def _spread(size: int, device: torch.device, count: int = SAMPLE) -> Tensor:
    """Up to so many positions, the first and the last among them."""
    return torch.from_numpy(np.unique(np.linspace(0, size - 1, count).astype(np.int64))).to(device)


def saved_plan(pair: Pair, path: str | os.PathLike[str], prints: tuple[str, str]) -> SavedPlan:
    """What a file decides about a pair.

    Args:
        prints: the fingerprints of both models.

    Raises `MergeidError` where the file is no plan, or one of other models."""
    file, told = os.fspath(path), read_plan(path)
    graph, again = pair.graph, f"make one with mergeid plan A B --force --output {file}"
    if len(told.fingerprints) != 2:
        raise MergeidError(f"{file} does not say which weights it was made for; {again}")
    heads = None if pair.a.joined is None else BOTH
    if (of_plan := told.settings.get("heads")) != heads:
        made = f"without --heads {heads}" if heads else f"with --heads {of_plan}, which is not asked for here"
        raise MergeidError(f"{file} was made {made}; {again}{f' --heads {heads}' if heads else ''}")
    for loaded, own, known in zip((pair.a, pair.b), prints, told.fingerprints, strict=True):
        if own != known:
            raise MergeidError(f"{file} was made for other weights than those of {loaded.source}; {again}")
    if [(s.id, s.size) for s in told.spaces] not in ([], [(s.id, s.size) for s in graph.spaces]):
        raise MergeidError(f"{file} was made for other spaces of neurons than these models have; {again}")
    element = graph.identity()
    for name, perm in told.permutations.items():
        if name not in element:
            raise MergeidError(f"{file} permutes {name}, which these models do not have; {again}")
        element[name] = np.asarray(perm, np.int64)
    if not _fits(pair, element):
        raise MergeidError(f"{file} holds permutations that would change what the model computes; {again}")
    records = [
        SpaceEvidence(**{**dict(s), "parents": tuple(s.parents), "structure": None, "certificate": None})
        for s in told.spaces
    ]
    return SavedPlan(told.match, told.evidence, told.examples, element, records)


def _fits(pair: Pair, element: Element) -> bool:
    """Whether the permutations are an element of the graph's group."""
    try:
        return all(len(element[s.id]) == s.size for s in pair.graph.spaces) and pair.graph.contains(element)
    except NoImage:
        return False
