"""Git Re-Basin's straight-through estimator (Ainsworth et al. 2023, section 3.3 and algorithm 3).

A free copy of A's weights, θ, is trained: each step the permuted B that is nearest to θ is averaged with A, the loss of
that midpoint on a batch is differentiated, and the gradient passes the assignment as if the permuted B were θ. The
element with the lowest midpoint loss over all the data is returned. BatchNorm layers take each batch's own statistics
meanwhile, as those of an average mean nothing.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergeid.basics.state import evaluating
from mergeid.errors import MergeidError
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.protocol import MatchTask, Needs, Training
from mergeid.matchers.weight import good_start, weight_matching
from mergeid.neuron_graph.neuron_graph import Element


def straight_through(task: MatchTask, *, epochs: int = 5, rate: float = 1e-2, passes: int = 5) -> Element:
    """The element of the lowest midpoint loss that training met, weight matching's own included.

    Args:
        epochs: passes over the data.
        rate: Adam's, relative to the root mean square of each tensor.
        passes: most passes of weight matching in a step.

    Raises `MergeidError` without labelled data or a loss.
    """
    training = task.training
    if training is None:
        raise MergeidError("matcher 'straight_through' trains on a loss; give labelled examples with --data")
    graph = task.graph
    model = _workspace(training.model)
    trained = {k for k, p in model.named_parameters() if p.is_floating_point()} & set(task.a)
    if any(p.is_complex() for p in model.parameters()):
        raise MergeidError(
            "matcher 'straight_through' trains real weights, and these models have complex ones; take another matcher"
        )
    theta = {k: v.detach().clone() for k, v in task.a.items()}
    free = {k: theta[k].requires_grad_() for k in sorted(trained)}
    groups = [{"params": [p], "lr": rate * max(float(p.detach().square().mean().sqrt()), 1e-3)} for p in free.values()]
    optimiser = torch.optim.Adam(groups)
    weights = WeightSimilarity(graph, task.a, task.b)
    element = weight_matching(weights, generator=task.generator, element=good_start(weights))
    best, lowest = element, _mean_loss(training, model, task, element)
    for _ in range(epochs):
        for batch in training.batches():
            moved = graph.apply_state(element, task.b)
            # the value is the permuted B, the gradient θ's
            middle = {k: (task.a[k].detach() + moved[k] + (p - p.detach())) / 2 for k, p in free.items()}
            loss = _loss(training, model, middle, batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            plain = {k: v.detach() for k, v in theta.items()}
            element = weight_matching(
                WeightSimilarity(graph, plain, task.b), generator=task.generator, element=element, max_passes=passes
            )
        reached = _mean_loss(training, model, task, element)
        if reached < lowest:
            best, lowest = element, reached
    return best


def _workspace(model: nn.Module) -> nn.Module:
    work = evaluating(copy.deepcopy(model))
    for module in work.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    return work


def _loss(training: Training, model: nn.Module, weights: dict[str, Tensor], batch: dict[str, object]) -> Tensor:
    """Mean loss of the model with these parameters; its buffers are its own, in a copy that a step may change."""
    from torch.nn.utils import stateless

    with stateless._reparametrize_module(model, weights):
        found = training.loss(training.forward(model, batch), batch)
    if found is None:
        raise MergeidError(
            "matcher 'straight_through' trains on a loss, and this model or its data gives none; expected --data with "
            "labels and a model with a task head"
        )
    return found


def _mean_loss(training: Training, model: nn.Module, task: MatchTask, element: Element) -> float:
    moved = task.graph.apply_state(element, task.b)
    names = [k for k, p in model.named_parameters() if k in moved and p.is_floating_point()]
    middle = {k: (task.a[k].detach() + moved[k]) / 2 for k in names}
    with torch.no_grad():
        losses = [float(_loss(training, model, middle, batch)) for batch in training.batches()]
    return sum(losses) / max(len(losses), 1)


class StraightThroughMatcher:
    """`straight_through` as a matcher."""

    name = "straight_through"
    needs: Needs = "labels"

    def match(self, task: MatchTask) -> Element:
        return straight_through(task)
