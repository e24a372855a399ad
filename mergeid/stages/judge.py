"""Which of several common orders of many models makes the best average, judged on calibration inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mergeid.evaluate.measure import make_accelerator
from mergeid.evaluate.nearness import Panel
from mergeid.models.load import Loaded
from mergeid.models.state import load_weights
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph
from mergeid.repair.batchnorm import calibration_batches, reestimate_batchnorm


def judge_of(
    graph: NeuronGraph,
    models: Sequence[Loaded],
    dataset: Any,
    collate: Callable[[Any], Any] | None,
    *,
    batch_size: int,
    device: str,
) -> Callable[[Sequence[Element]], float]:
    """How far the average of the models, each brought into the common order by its element, is from their mean
    prediction (`mergeid.evaluate.nearness`): lower is better, infinite where the average's outputs are not finite.
    BatchNorm statistics are estimated again before; labels are not looked at."""
    first = models[0]
    states = [m.state() for m in models]
    panel = Panel(
        first,
        [m.model for m in models],
        shares=[1 / len(models)] * len(models),
        either=False,
        dataset=dataset,
        collate=collate,
        batch_size=batch_size,
        device=device,
    )

    def judge(universe: Sequence[Element]) -> float:
        moved = [graph.apply_state(e, s) for e, s in zip(universe, states, strict=True)]
        average = {
            k: torch.stack([m[k].double() for m in moved]).mean(0).to(v.dtype) if v.is_floating_point() else v
            for k, v in moved[0].items()
        }
        work = copy.deepcopy(first.model).to(device)
        load_weights(work, average)
        accelerator = make_accelerator(device)
        batches = calibration_batches(work, dataset, forward=first.forward, collate=collate, accelerator=accelerator)
        statistics = reestimate_batchnorm(work, batches, forward=first.forward, accelerator=accelerator)
        load_weights(work, average | statistics)
        far = panel.far(work, 0).values()
        return sum(f.distance for f in far) / len(far)

    return judge
