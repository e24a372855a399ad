"""Is the nearest merge worth solving, when nobody has asked for it?

Solving imitates the mean of what the models say. That is right about inputs that the models agree on; where each is
sure of something else (fine-tunes on different tasks, each asked about the other's inputs) the mean is no more right
than any of them, and to come nearer to it is no gain. So a solved merge has to be nearer by more than a share of what
the models differ by (`DOUBT`), and by more than chance makes (one standard error of the paired difference).

Where the networks' neurons hardly correspond, no layer can answer as their mean does, and what is off adds up from
layer to layer. A merge whose hidden layers lean to one model (`mergeid.stages.imitated.LEAN`) loses less: only its
last layer imitates the mean in full. It is taken where the solved merge is left too far from the models (`LEFT`), and
where it is nearer to their mean, by as much more. That is asked of the mean alone: what leans to one model is near to
that one whatever it says.

Models of one start that are sure of different answers (`DISJOINT`) stay as they are: their plain average often is more
right than the mean of what they say, and nothing that is measured without labels tells when. In the zoo, where one of
two fine-tunes knows half of the inputs alone, solved merges lose between 0.22 nats more and 0.17 less than the plain
average, and merges that lean to one of them up to 0.84 more. Each with data of its own, they are solved.

On inputs of another kind than the training's a solved merge comes near to the models too, and is wrong on what they
know: no distance measured there can tell. It shows in the models, which stay sure and name different classes
(`mergeid.evaluate.agreement`). Merges are then solved only so that they lean to one model. On 21 sets of inputs that
are found out (noise, digits, other images, turned ones; 13 pairs), leaning merges lose 0.18 nats on average, those
that are not solved 0.63, and solved ones 0.63.

It is judged on inputs that it was not solved on: the calibration inputs are dealt out to two halves, and the merge that
is looked at on one is solved on the other. What is written is solved on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import torch

from mergeid.errors import MergeidError
from mergeid.prediction.features import weight_features
from mergeid.prediction.model import SHARED_START, start
from mergeid.stages.repair import SOLVE

if TYPE_CHECKING:
    from mergeid.evaluate.nearness import Far
    from mergeid.stages.members import Members

NEAR = 0.005
"""Distance of a merge that is near enough as it is."""
OFF = 0.05
"""Distance beyond which the merge with every space matched is solved as well, where another is the nearest."""
LEFT = 0.02
"""Distance of a solved merge that is near enough for no model to be leaned to."""
DOUBT = 0.15
"""Share of the models' disagreement (nats) that a solved merge must be nearer by."""
DISJOINT = 0.15
"""Nats that models of one start, which are sure of different answers, differ by from their mean."""
LEAST = 64
"""Examples that a merge is solved with at least."""
LARGE = 300_000_000
"""Parameters from which on a merge is solved only where that is asked for."""

Tried = Callable[["Members", Sequence[str]], Iterator[tuple[str, Sequence[Mapping[str, "Far"]]]]]
"""(merge, repairs) -> repair, and how far the merge is with it from the models and, last, from their mean alone."""


@dataclass(frozen=True)
class Solved:
    """Attributes:
    merge: the one to solve; repair: how.
    far: how far it is then, by the outputs' names. mean: how far from the mean alone.
    distances: of all that were tried, by merge and repair.
    """

    merge: str
    repair: str
    far: Mapping[str, Far]
    mean: Mapping[str, Far]
    distances: dict[tuple[str, str], float]


def can_be_solved(members: Members) -> bool:
    """By itself, without being asked for: shares of models, in memory, with examples that lie side by side."""
    size = sum(p.numel() for p in members.first.model.parameters())
    kept = members.settings.method.weights == "shares" and members.base is None
    return kept and size <= LARGE and not members.given.whole and len(members.given) >= LEAST


def of_one_start(members: Members) -> bool:
    """Whether all models were trained from the same weights, as those say in the first one's order."""
    states = (member.aligned() for member in members.models)
    first = next(states)
    return all(start(weight_features(first, other)) == SHARED_START for other in states)


def solved_if_nearer(
    merges: Mapping[str, Members],
    nearest: tuple[str, str],
    tried: Tried,
    *,
    disagreement: float,
    tie: float,
    refits: Sequence[str] = (SOLVE,),
) -> Solved | None:
    """The merge to solve; None where none is worth it.

    Args:
        merges: that may be solved.
        nearest: merge and repair that are to be beaten.
        tried: makes and looks at a merge.
        disagreement: of the models, as `Panel.disagreement`.
        tie: what is no difference.
        refits: repairs that give layers new weights, the one that is preferred last.
    """
    rows: dict[tuple[str, str], Sequence[Mapping[str, Far]]] = {}
    for name, merge in merges.items():
        kinds = [nearest[1], *refits] if name == nearest[0] else refits
        try:
            for kind, far in tried(merge, kinds):
                rows[name, kind] = far
        except MergeidError:  # what cannot be solved stays as it is
            continue
    own = rows.get(nearest)
    solved = {key: far for key, far in rows.items() if key[1] in refits}
    if own is None or not solved:
        return None
    means = {key: sum(f.distance for f in far.values()) / len(far) for key, (far, _) in solved.items()}
    order = sorted(means, key=lambda key: (means[key], key[0] != nearest[0]))
    best = next((key for key in order if key[1] == refits[-1] and means[key] <= means[order[0]] + tie), order[0])
    from_models, from_mean = solved[best]
    found = Solved(*best, from_models, from_mean, means)
    return found if nearer(own[0], found.far, disagreement=disagreement, tie=tie) else None


def nearer(one: Mapping[str, Far], other: Mapping[str, Far], *, disagreement: float, tie: float) -> bool:
    """Whether the other is nearer by more than chance and the models' doubts make."""
    gap = torch.stack([one[n].nearest - other[n].nearest for n in one]).mean(0)
    error = float(gap.std()) / sqrt(len(gap)) if len(gap) > 1 else 0.0
    return float(gap.mean()) > max(tie, error, DOUBT * disagreement)
