"""Which spaces the structure identifies: the chain of fixed parts from the network's inputs on.

How firmly fixed parts hold a space (`mergeid.evidence.hold`) presumes that what they read corresponds. So a space is
*identified* only where the chain is anchored: the fixed parts of writers that read network inputs or identified spaces
hold it in place by themselves, and so do those of all its writers together. That is the least fixed point from the
inputs on: a residual stream, which most of its writers also read, is anchored by its embedding or not at all. Else a
space that is held in place is *identified if the inputs correspond*.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mergeid.evidence.hold import LOOSE, WIDEST, Fixed, Hold, hold
from mergeid.evidence.writers import Writer, writers_of
from mergeid.neuron_graph.neuron_graph import NeuronGraph, Space

IDENTIFIED, IF_INPUTS, NOT = "identified", "identified if the inputs correspond", "not identified"


@dataclass(frozen=True)
class Certificate:
    """What the structure says of one space.

    Attributes:
        says: "identified", "identified if the inputs correspond" or "not identified"; why: one line.
        angle_a, angle_b: degrees, see the module; None where no fixed part writes the space.
        breaks: ids of the spaces where the chain from the inputs to this one breaks; gap: why, where it breaks here.
    """

    space: str
    says: str
    why: str
    angle_a: float | None = None
    angle_b: float | None = None
    breaks: tuple[str, ...] = ()
    gap: str = ""


class _Chain:
    def __init__(self, graph: NeuronGraph, writers: Mapping[str, Sequence[Writer]], fixed: Fixed) -> None:
        self.graph, self.writers, self.fixed = graph, writers, fixed
        self.below = {s.id: _descendants(graph, s) for s in graph.spaces}
        self.known: dict[tuple[str, frozenset[str]], Hold] = {}

    def sources(self, space: Space) -> list[Writer]:
        """Its own writers, and those of what lies in it."""
        return [w for s in (space, *self.below[space.id]) for w in self.writers[s.id]]

    def hold(self, space: Space, ready: Callable[[Writer], bool] | None = None) -> Hold:
        """How firmly the space is held by all its writers, or by those that are ready. What lies in it moves with it,
        so that its neurons are told apart by theirs, too."""
        chosen = {s.id: [w for w in self.writers[s.id] if ready is None or ready(w)] for s in self._with(space)}
        key = space.id, frozenset(w.tensor for group in chosen.values() for w in group)
        if key not in self.known:
            found: Hold | None = None
            for s in self._with(space):
                own = s is space
                some = any(self.fixed.has(s.id, w.tensor) for w in chosen[s.id])
                if not chosen[s.id] or (own and not some and self.below[space.id]):
                    continue
                one = hold(self.fixed, s, chosen[s.id], across=not own)
                found = one if found is None else found & one
            self.known[key] = found or LOOSE
        return self.known[key]

    def _with(self, space: Space) -> list[Space]:
        return [space, *self.below[space.id]]

    def anchored(self, allowed: Callable[[Space], bool]) -> set[str]:
        """The least fixed point from the network's inputs on."""
        found: set[str] = set()
        while True:
            reached = frozenset(found)
            new = {s.id for s in self.graph.spaces if s.id not in reached and allowed(s) and self._enters(s, reached)}
            if not new:
                return found
            found |= new

    def _enters(self, space: Space, reached: frozenset[str]) -> bool:
        if not reached.issuperset(space.parents):
            return False
        if space.members == 1 and space.parents:
            return True  # nothing of its own to trade: it follows
        return self.hold(space).firm and self.hold(space, lambda w: w.unknown is None and w.reads <= reached).firm

    def gap(self, space: Space, reached: set[str]) -> str:
        """Why the chain breaks at a space that fixed parts hold if its inputs correspond."""
        sources = self.sources(space)
        ready = [w for w in sources if w.unknown is None and w.reads <= reached]
        if ready:
            return f"{ready[0].tensor} has no fixed part that holds the neurons on its own"
        return next((w.unknown for w in sources if w.unknown is not None), "it is not known what writes them")

    def breaks(self, space: Space, reached: set[str]) -> tuple[str, ...]:
        """Where the chain to a space breaks: spaces whose own inputs are all there, and which are not held by what
        reads these; else the space itself."""
        seen: dict[str, None] = {}
        found: dict[str, None] = {}
        queue = [space.id]
        while queue:
            at = queue.pop(0)
            if at in seen or at in reached:
                continue
            seen[at] = None
            one = self.graph.by_id[at]
            sources = self.sources(one)
            needs = [i for i in dict.fromkeys((*one.parents, *(r for w in sources for r in sorted(w.reads))))]
            entries = [w for w in sources if w.unknown is not None or w.reads <= reached]
            if (entries or not sources) and reached.issuperset(one.parents):
                found[at] = None
            else:
                queue += needs
        return tuple(found) or (space.id,)


def _descendants(graph: NeuronGraph, space: Space) -> list[Space]:
    inside = {space.id}
    out = []
    for s in graph.spaces:  # parents come first
        if s.id not in inside and inside & set(s.parents):
            inside.add(s.id)
            out.append(s)
    return out


def certificates(
    graph: NeuronGraph,
    model: nn.Module,
    fixed: Fixed,
    entries: Collection[str],
    *,
    refused: Mapping[str, str] | None = None,
) -> dict[str, Certificate]:
    """Space id -> what the structure says of it, for every space.

    Args:
        model: of the architecture, for the kinds of its layers; the graph's tensors are its keys.
        entries: modules that read inputs of the network as they come.
        refused: spaces that are not identified for another reason (on the calibration data, say), and why.
    """
    writers = writers_of(graph, model, entries)
    chain = _Chain(graph, writers, fixed)
    no = refused or {}
    reached = chain.anchored(lambda s: s.id not in no)
    out: dict[str, Certificate] = {}
    for space in graph.spaces:
        held = chain.hold(space)
        follows = space.members == 1 and bool(space.parents)
        angles: tuple[float | None, float | None] = (held.angle_a, held.angle_b) if held.names else (None, None)
        if space.id in reached:
            why = (
                "it follows the space that it is in"
                if follows
                else f"fixed parts hold its neurons in place ({_angles(held)})"
            )
            out[space.id] = Certificate(space.id, IDENTIFIED, why, angles[0], angles[1])
            continue
        breaks = chain.breaks(space, reached)
        gap = chain.gap(space, reached) if space.id in breaks else ""
        if space.id not in no and (held.firm or follows):
            at = f": {gap}" if gap else " at " + ", ".join(graph.by_id[i].label for i in breaks[:3])
            why = (
                f"fixed parts hold its neurons in place if the inputs correspond; the chain from the inputs breaks{at}"
            )
            out[space.id] = Certificate(space.id, IF_INPUTS, why, angles[0], angles[1], breaks, gap)
        else:
            why = no.get(space.id) or _why_loose(chain, space, held)
            out[space.id] = Certificate(space.id, NOT, why, angles[0], angles[1], breaks, why)
    return out


def _why_loose(chain: _Chain, space: Space, held: Hold) -> str:
    other = [w.tensor for w in chain.sources(space) if chain.fixed.differ(space.id, w.tensor)]
    if other:
        return f"the two models have different fixed parts (first: {other[0]})"
    if not held.names:
        return "no fixed part that both models share writes it"
    if max(held.angle_a, held.angle_b) >= WIDEST:
        return f"what was trained outweighs the fixed parts ({_angles(held)})"
    a, b, _ = held.nearest
    if not (a and b):
        return f"another order of {'B' if a else 'A'}'s neurons fits the fixed parts as well"
    return "another order brings B's neurons just as near to A's"


def _angles(held: Hold) -> str:
    return f"at most {max(held.angle_a, held.angle_b):.0f}° off them; allowed: {WIDEST:.0f}°"
