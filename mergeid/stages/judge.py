"""Which of several common orders of many models makes the best average, judged on calibration inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

from mergeid.basics.casting import holds_numbers
from mergeid.basics.state import load_weights
from mergeid.evaluate.nearness import Panel
from mergeid.models.examples import Examples
from mergeid.models.loaded import Loaded
from mergeid.models.running import make_accelerator
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph
from mergeid.repair.batchnorm import reestimated
from mergeid.request.request import Run


def judge_of(
    graph: NeuronGraph,
    models: Sequence[Loaded],
    examples: Examples,
    run: Run,
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
        examples=examples,
        batch_size=run.batch_size,
        device=run.place,
    )

    def judge(universe: Sequence[Element]) -> float:
        moved = [graph.apply_state(e, s) for e, s in zip(universe, states, strict=True)]
        average = {
            k: torch.stack([m[k].to(torch.promote_types(v.dtype, torch.float64)) for m in moved]).mean(0).to(v.dtype)
            if holds_numbers(v)
            else v
            for k, v in moved[0].items()
        }
        work = copy.deepcopy(first.model).to(run.place)
        load_weights(work, average)
        statistics = reestimated(work, examples, first.forward, make_accelerator(run.place))
        load_weights(work, average | statistics)
        far = panel.far(work, 0).values()
        return sum(f.distance for f in far) / len(far)

    return judge
