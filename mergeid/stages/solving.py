"""Is the nearest merge worth solving, when nobody has asked for it?

Solving imitates the mean of what the models say. That is right about inputs that the models agree on; where each is
sure of something else (fine-tunes on different tasks, each asked about the other's inputs) the mean is no more right
than any of them, and to come nearer to it is no gain. So a solved merge has to be nearer by more than a share of what
the models differ by (`DOUBT`), and by more than chance makes (one standard error of the paired difference).

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
from mergeid.stages.repair import SOLVE

if TYPE_CHECKING:
    from mergeid.evaluate.nearness import Far, Panel
    from mergeid.stages.members import Members

NEAR = 0.005
"""Distance of a merge that is near enough as it is."""
OFF = 0.05
"""Distance beyond which the merge with every space matched is solved as well, where another is the nearest."""
DOUBT = 0.15
"""Share of the models' disagreement (nats) that a solved merge must be nearer by."""
LEAST = 64
"""Examples that a merge is solved with at least."""
LARGE = 300_000_000
"""Parameters from which on a merge is solved only where that is asked for."""

Tried = Callable[["Panel", "Members", Sequence[str]], Iterator[tuple[str, dict[str, "Far"]]]]


@dataclass(frozen=True)
class Solved:
    """Attributes:
    merge: the one to solve.
    far: how far it is then, by the outputs' names.
    distances: of all that were solved, by merge.
    """

    merge: str
    far: Mapping[str, Far]
    distances: dict[str, float]


def can_be_solved(members: Members) -> bool:
    """By itself, without being asked for: shares of models, in memory, with examples that lie side by side."""
    size = sum(p.numel() for p in members.first.model.parameters())
    kept = members.settings.method.weights == "shares" and members.base is None
    return kept and size <= LARGE and not members.given.whole and len(members.given) >= LEAST


def solved_if_nearer(
    panel: Panel, merges: Mapping[str, Members], nearest: tuple[str, str], tried: Tried, tie: float
) -> Solved | None:
    """The merge to solve; None where none is worth it.

    Args:
        panel: with two parts.
        merges: that may be solved.
        nearest: merge and repair that are to be beaten.
        tried: (panel, merge, repairs) -> repair and how far the merge is with it.
        tie: what is no difference.
    """
    rows: dict[tuple[str, str], dict[str, Far]] = {}
    for name, merge in merges.items():
        kinds = [nearest[1], SOLVE] if name == nearest[0] else [SOLVE]
        try:
            for kind, far in tried(panel, merge, kinds):
                rows[name, kind] = far
        except MergeidError:  # what cannot be solved stays as it is
            continue
    own = rows.get(nearest)
    solved = {name: far for (name, kind), far in rows.items() if kind == SOLVE}
    if own is None or not solved:
        return None
    means = {name: sum(f.distance for f in far.values()) / len(far) for name, far in solved.items()}
    best = min(means, key=lambda name: (means[name], name != nearest[0]))
    gap = torch.stack([own[n].nearest - solved[best][n].nearest for n in own]).mean(0)
    error = float(gap.std()) / sqrt(len(gap)) if len(gap) > 1 else 0.0
    enough = max(tie, error, DOUBT * panel.disagreement)
    return Solved(best, solved[best], means) if float(gap.mean()) > enough else None
