"""Common order: more than two models brought into one order at once, where the matcher can."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from mergeid.matchers.protocol import JointMatcher, get_matcher
from mergeid.matchers.universe import relative
from mergeid.models.examples import Examples
from mergeid.neuron_graph.reals import in_reals
from mergeid.request.request import Run
from mergeid.stages.gather import evidence_of
from mergeid.stages.judge import judge_of
from mergeid.stages.open import Pair

if TYPE_CHECKING:
    from mergeid.neuron_graph.neuron_graph import Element


def common_order(
    pairs: Sequence[Pair], matcher: str, run: Run, examples: Examples | None = None
) -> list[Element] | None:
    """The elements that bring the other models into the first one's order through an order common to all.

    Args:
        pairs: the first model with each of the others.
        matcher: name in the registry.

    Returns:
        One element per pair; None where the matcher only knows pairs.
    """
    found = get_matcher(matcher)
    if not isinstance(found, JointMatcher):
        return None
    graph = pairs[0].graph
    loaded = [pairs[0].a, *(pair.b for pair in pairs)]
    correlations = judge = None
    if examples is not None:
        correlations = {
            (p, q): evidence_of(Pair(loaded[p], loaded[q], graph), examples, run, judged=False).correlations()
            for p, q in combinations(range(len(loaded)), 2)
        }
        judge = judge_of(graph, loaded, examples, run)
    real, states = in_reals(graph, *(x.state() for x in loaded))
    universe = found.match_all(real, states, run.generator(), correlations, judge)
    return [relative(universe, 0, i) for i in range(1, len(loaded))]
