"""Soups: averages of many fine-tunes, chosen on validation data (Wortsman et al. 2022, arXiv:2203.05482), and
coefficients learned without labels (AdaMerging, Yang et al. 2024, arXiv:2310.02575)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from mergeid.basics.aliases import tied_groups
from mergeid.basics.casting import holds_numbers
from mergeid.basics.state import load_weights
from mergeid.errors import MergeidError
from mergeid.evaluate.measure import Metrics, evaluate_loaded
from mergeid.methods.settings import ByName, MethodRequest
from mergeid.models.examples import Examples
from mergeid.request.request import Run
from mergeid.stages.members import Members, skipped_in

Measure = Callable[[Sequence[int]], Metrics]
"""Numbers of models -> what their average does on the validation data."""
RATE, BEGIN = 1e-3, 0.3
"""Step of Adam, and the coefficients that AdaMerging begins with, as in its paper. On fine-tunes of different
classes of one head it may collapse: one class for every input is sure, too."""
LEAST = -1e4
"""Log-probabilities count as no lower: a class that is ruled out has −∞, and 0 times that is no number."""


def better(a: Metrics, b: Metrics) -> bool:
    """Whether one is at least as good as the other: by accuracy, where there is one, else by loss."""
    if a.accuracy is None and b.accuracy is None:
        return a.loss <= b.loss
    return (a.accuracy or 0.0) >= (b.accuracy or 0.0)  # none: not one prediction was right


def measuring(members: Members, labelled: Examples, skip: Sequence[str], run: Run) -> Measure:
    """Averages are made in memory and run on the validation data."""
    averaged = replace(members.first, model=copy.deepcopy(members.first.model))

    def measure(chosen: Sequence[int]) -> Metrics:
        settings = MethodRequest(members.settings.method, shares(len(members.models), chosen)).over(
            len(members.models), members.settings.depth
        )
        load_weights(averaged.model, replace(members, settings=settings).merged_state(skip))
        return evaluate_loaded(averaged, labelled, run)

    return measure


def shares(count: int, chosen: Sequence[int]) -> list[float]:
    """Weights of the average of some of so many models."""
    return [(i in chosen) / len(chosen) for i in range(count)]


def greedy(count: int, measure: Measure, run: Run) -> tuple[list[int], list[Metrics], Metrics]:
    """The best model, and every further one, in the order of how good each is alone, with which the average is not
    worse.

    Returns:
        Numbers of the chosen models, what each does alone, and what their average does.
    """
    alone = []
    for i in range(count):
        run.tell("measuring", i, 2 * count)
        alone.append(measure([i]))
    order = sorted(range(count), key=lambda i: (-(alone[i].accuracy or 0.0), alone[i].loss))
    chosen, best = order[:1], alone[order[0]]
    for step, i in enumerate(order[1:], count):
        run.tell("measuring", step, 2 * count)
        found = measure([*chosen, i])
        if better(found, best):
            chosen, best = [*chosen, i], found
    return chosen, alone, best


@dataclass(frozen=True)
class Learned:
    """Coefficients of task vectors.

    Attributes:
        by_name: per model, name of a tensor -> its coefficient.
        entropy: mean entropy of the predictions before and after, in nats.
    """

    by_name: list[ByName]
    entropy: tuple[float, float]


def adamerging(members: Members, examples: Examples, skip: Sequence[str], steps: int, run: Run) -> Learned:
    """A coefficient for every task vector and tensor, so that the predictions on unlabelled examples are sure: the mean
    entropy is minimised by Adam. Statistics of BatchNorm are averaged.

    Args:
        members: with a base; what is learned is for task arithmetic.
        examples: of all tasks, or every model's own. Then a step takes a batch of each, as in the paper, and runs it
            with what `skip` names, the task's head, as it is in that model.

    Raises:
        MergeidError: outputs that are no logits, or heads of models whose neurons were moved.
    """
    assert members.base is not None
    model, names, device = copy.deepcopy(members.first.model).to(run.place), members.names(), torch.device(run.place)
    trained = {k for k, _ in model.named_parameters()}
    tied = _apart(members)
    floats = [k for k in tied if holds_numbers(members.models[0].state[k])]
    skipped = skipped_in(members.models[0].state, names, skip) & set(floats)
    keys = [k for k in floats if k not in skipped]
    tasks = examples.by_owner()
    heads = _heads(members, skipped, run.place) if len(tasks) > 1 else [{}]
    kinds = {k: members.models[0].state[k].dtype for k in keys}  # what the network computes in
    origin = {k: members.base.tensor(k).to(device, kinds[k]) for k in keys}
    vectors = {k: torch.stack([m.tensor(k).to(device, kinds[k]) for m in members.models]) - origin[k] for k in keys}
    count = len(members.models)
    learned = {
        k: torch.full((count,), BEGIN if k in trained else 1 / count, requires_grad=k in trained, device=device)
        for k in keys
    }
    optimiser = torch.optim.Adam([v for k, v in learned.items() if k in trained], lr=RATE)

    def entropy(batches: Sequence[object]) -> Tensor:
        """Of one batch of each task, the mean over tasks."""
        state = {k: origin[k] + torch.tensordot(learned[k].to(v.dtype), v, 1) for k, v in vectors.items()}
        found = []
        for batch, head in zip(batches, heads, strict=True):
            values = {f"model.{k}": t for k, t in {**state, **head}.items()}
            logits: Tensor = functional_call(_Forward(model, members), values, (batch,))
            if logits.dim() < 2 or logits.shape[-1] < 2:
                raise MergeidError(
                    f"{members.first.source} does not return logits; expected a classifier for --how adamerging"
                )
            chances = logits.float().log_softmax(-1)
            found.append(-(chances.exp() * chances.clamp(min=LEAST)).sum(-1).mean())
        return torch.stack(found).mean()

    def batches() -> Iterator[tuple[object, ...]]:
        """One pass over the largest task; smaller ones begin again."""
        longest = max(map(len, tasks))
        return zip(*(again(task, -(-longest // len(task))) for task in tasks), strict=False)

    def again(task: Examples, passes: int) -> Iterator[object]:
        for _ in range(passes):
            yield from task.unlabelled(run.batch_size, members.first, device)

    def mean() -> float:
        with torch.no_grad():
            each = [entropy(b).item() for b in batches()]
        return math.fsum(each) / len(each)

    before, done = mean(), 0
    while done < steps:
        for given in batches():
            if done == steps:
                break
            run.tell("learning coefficients", done, steps)
            optimiser.zero_grad()
            entropy(given).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                for value in learned.values():
                    value.clamp_(0, 1)
            done += 1
    made_of = members.first.made_of
    of_name: dict[str, list[Tensor]] = {}  # several where the library splits one tensor of the files
    for key, value in learned.items():
        for name in {name for k in tied[key] for name in made_of.get(k, ())}:
            of_name.setdefault(name, []).append(value.detach())
    means = {name: torch.stack(values).mean(0) for name, values in of_name.items()}
    found = [ByName({name: float(v[i]) for name, v in means.items()}) for i in range(count)]
    return Learned(found, (before, mean()))


def _apart(members: Members) -> dict[str, tuple[str, ...]]:
    """One key of the state dict for each tensor -> all of its keys."""
    return {keys[0]: keys for keys in tied_groups(members.first.model) if keys[0] in members.models[0].state}


def _heads(members: Members, skipped: Collection[str], device: str) -> list[dict[str, Tensor]]:
    """Every model's own tensors, which are not merged."""
    moved = next((m.loaded.source for m in members.models if m.plan is not None and m.plan.moves), None)
    if skipped and moved is not None:
        raise MergeidError(
            f"the neurons of {moved} were matched, and its own head (--skip) would not fit; give --match never"
        )
    like = members.models[0].state
    return [{k: m.state[k].to(device, like[k].dtype) for k in skipped} for m in members.models]


class _Forward(torch.nn.Module):
    """The task output of a network as its forward."""

    def __init__(self, model: torch.nn.Module, members: Members) -> None:
        super().__init__()
        self.model, self._run = model, members.first.forward

    def forward(self, batch: dict[str, object]) -> Tensor:
        return self._run(self.model, batch)
