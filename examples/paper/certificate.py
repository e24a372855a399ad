"""Does the structure hold every neuron in its place? The exact margins of each network, layer by layer.

A network is certified in a layer where the identity is the unique cheapest assignment: giving its neurons' functions to
the function classes (of the fixed part that all networks of the variant share) in any other order costs at least the
margin more, in squared norm of the trainable weights. A pair is certified where both networks are, in every layer. Each
network is judged on its own inputs, on the calibration examples, and with all neurons as they lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from nets import VARIANTS, make
from torch import nn
from train import Setting, file_of, stored

import mergeid
from mergeid.evidence.inputs import Looks, before_batchnorm, supports
from mergeid.evidence.layers import space_records
from mergeid.neuron_graph.neuron_graph import NeuronGraph

POSITIONS = 32
"""Most places of an image that count as inputs of a convolution."""
BATCH = 128


@dataclass(frozen=True)
class Margins:
    """By depth: `margin`, min_{π≠id} Δ_π (at most 0 where the identity is not optimal), and `swap`, the median cost of
    exchanging two neurons, as a scale."""

    margin: list[float]
    swap: list[float]


def margins(setting: Setting, seeds: tuple[int, int], folder: Path, count: int) -> tuple[Margins, Margins] | None:
    """Of two networks of one cell, on the first `count` training examples; None for standard networks, which have no
    fixed part: there every assignment costs the same. Kept beside the networks."""
    if VARIANTS[setting.variant].kind is None:
        return None
    paths = [file_of(setting, seed, folder).with_suffix(f".margins-{count}.json") for seed in seeds]
    if not all(path.exists() for path in paths):
        for path, found in zip(paths, _computed(setting, seeds, folder, count), strict=True):
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(found)))
            partial.replace(path)
    a, b = (Margins(**json.loads(path.read_text())) for path in paths)
    return a, b


def _computed(setting: Setting, seeds: tuple[int, int], folder: Path, count: int) -> Iterator[Margins]:
    x = setting.split().x[:count]
    models = []
    for seed in seeds:
        model = make(setting.net, setting.inputs, setting.budget.width, VARIANTS[setting.variant], seed).eval()
        model.load_state_dict(stored(setting, seed, folder))
        models.append(model)
    graph = _graph(setting)

    def forward(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        return model(batch["x"])

    normed = before_batchnorm(models[0], {"x": x[:2]}, forward)
    found = [
        supports(
            model,
            ({"x": part} for part in x.split(BATCH)),
            forward,
            centred=dict.fromkeys(normed, True),
            reading=Looks(POSITIONS),
        )
        for model in models
    ]
    records = space_records(
        graph,
        models[0],
        models[0].state_dict(),
        models[1].state_dict(),
        (found[0], found[1]),
        before_batchnorm=normed,
        certify=False,
    )
    for side in ("a", "b"):
        ordered = [getattr(records[s.id], side) for s in graph.spaces]
        yield Margins([r.margin for r in ordered], [r.median_swap for r in ordered])


@cache
def _graph(setting: Setting) -> NeuronGraph:
    """Of the asymmetric network, the same for all seeds."""
    model = make(setting.net, setting.inputs, setting.budget.width, VARIANTS[setting.variant], 0).eval()
    return mergeid.graph(model, setting.split().x[:2])
