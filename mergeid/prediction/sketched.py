"""Features of two models from their sketches alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.evidence.evidence import _positions, _same_copy
from mergeid.matchers.activation import activation_matching
from mergeid.models.configs import disagreement
from mergeid.neuron_graph.neuron_graph import Element
from mergeid.prediction.features import EndSums, Features, LayerDeviation
from mergeid.prediction.sketch import LEVELS, Sketch


def check_alike(a: Sketch, b: Sketch) -> None:
    """Raises `MergeidError` where two sketches do not compare."""
    if a.arch != b.arch or [(s.id, s.size, s.blocks) for s in a.spaces] != [(s.id, s.size, s.blocks) for s in b.spaces]:
        raise MergeidError(
            f"the sketches of {a.source} ({a.arch}) and {b.source} ({b.arch}) are of different architectures"
        )
    differ = disagreement((a.source, a.config), (b.source, b.config))
    if differ is not None:
        raise MergeidError(
            f"{differ}, which changes what the network computes; make both sketches with the config that counts "
            "(--arch path/to/config.json)"
        )
    if a.inputs != b.inputs:
        raise MergeidError(
            f"the sketches of {a.source} and {b.source} were made on different inputs; make both with the same --data"
        )
    if _kept(a) != _kept(b):
        raise MergeidError(
            f"the sketches of {a.source} and {b.source} hold different activations or outputs; make both with the "
            f"same version"
        )


def _kept(sketch: Sketch) -> tuple[object, ...]:
    return (sketch.logits.shape, {s: (v.shape, sketch.members[s].tolist()) for s, v in sketch.activations.items()})


class Standard:
    """A sketch with its activations standardised, once for all its partners."""

    def __init__(self, sketch: Sketch) -> None:
        self.sketch = sketch
        self.z = {k: _standardised(v) for k, v in sketch.activations.items()}


def match(a: Standard, b: Standard) -> Element:
    """B's assignment to A by the correlations of their activations."""
    scores = {}
    for s in a.sketch.spaces:
        if s.id not in a.z or s.id not in b.z:
            continue
        members = a.sketch.members[s.id].numpy()
        found = (a.z[s.id].T @ b.z[s.id]).double().numpy() / len(a.z[s.id])
        if len(members) == s.size and np.array_equal(members, np.arange(s.size)):
            scores[s.id] = found
            continue
        same = _same_copy(members)
        total, count = np.zeros((s.size, s.size)), np.zeros((s.size, s.size))
        np.add.at(total, (members[:, None], members[None]), found * same)
        np.add.at(count, (members[:, None], members[None]), same)
        scores[s.id] = np.divide(total, count, out=total, where=count > 0)
    return activation_matching(a.sketch.graph, scores)


def output_features(a: Standard, b: Standard) -> Features:
    """What the two models' own outputs say, under any assignment."""
    outputs = EndSums()
    outputs.add(a.sketch.logits, b.sketch.logits, None)
    return outputs.features()


def sketch_features(
    a: Standard, b: Standard, element: Element, outputs: Features, *, repaired: bool
) -> tuple[Features, list[LayerDeviation]]:
    """Features under an assignment of B, and what every space loses.

    Args:
        outputs: `output_features` of the two."""
    one, two = a.sketch, b.sketch
    found = dict(outputs)
    layers = []
    for s in one.spaces:
        if s.id not in a.z or s.id not in b.z:
            continue
        positions = torch.from_numpy(_positions(one.members[s.id].numpy(), element[s.id]))
        za, zb = a.z[s.id], b.z[s.id][:, positions]
        live = (za.square().sum(0) > 0) & (zb.square().sum(0) > 0)
        rho = float((za * zb).mean(0)[live].double().mean()) if bool(live.any()) else 1.0
        layers.append(LayerDeviation(s.label or s.id, (1 - rho) / 2, (1 - rho) / 2, max(0.0, (1 - rho) / 2)))
    gaps = [min(2 * x.lost, 1.0) for x in layers]
    gap = sum(gaps) / max(len(gaps), 1)
    nats, right = (_responses(one, two, gap, repaired, k) for k in range(2))
    found["excess"] = nats + found["excess_averaged"]
    found["shift"] = nats
    found["drop"] = right
    found["gap"] = gap
    found["deviation"] = gap
    found["hash_distance"] = _distance(one, two)
    return found, layers


def _responses(a: Sketch, b: Sketch, gap: float, repaired: bool, which: int) -> float:
    """Both models' rise of the loss (0) or loss of accuracy (1) at 1 - ρ = gap, the mean, between measured levels."""
    values = [float(np.interp(gap, LEVELS, s.response[:, int(repaired), which].numpy())) for s in (a, b)]
    return sum(values) / 2


def _distance(a: Sketch, b: Sketch) -> float:
    """Estimated distance of all matrices as they lie over their root mean square length."""
    if a.names != b.names or not len(a.hashes):
        return 0.0
    x, y = a.hashes.double(), b.hashes.double()
    own = float(x.square().sum() + y.square().sum()) / 2
    return float((x - y).square().sum() / own) ** 0.5 if own > 0 else 0.0


def _standardised(x: Tensor) -> Tensor:
    x = x.float()
    x = x - x.mean(0)
    std = x.square().mean(0).sqrt()
    return torch.where(std > 1e-6 * std.max().clamp(min=1e-30), x / std.clamp(min=1e-30), torch.zeros(()))


def as_elements(a: Standard, b: Standard) -> Mapping[str, Element]:
    """The identity, and the match where it moves anything."""
    found = {"direct": a.sketch.graph.identity()}
    matched = match(a, b)
    if any((p != np.arange(len(p))).any() for p in matched.values()):
        found["matched"] = matched
    return found
