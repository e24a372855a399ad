"""In place: models whose neurons lie where the first one's do, seen in one pass over the files.

Most merges are of fine-tunes of one base. Where every row fits its own place, the decision is direct, with that
evidence, and neither a model nor a graph is built. Where some do not, only the spaces that they lie on are planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergeid.combine.in_place import OTHERS, InPlace, in_place
from mergeid.request.request import Matching
from mergeid.stages.open import Met

if TYPE_CHECKING:
    from mergeid.stages.open import Pair


@dataclass(frozen=True)
class Places:
    """What was seen of every further model and, last, the base.

    Attributes:
        found: the source's name -> its rows beside the first model's.
    """

    found: Mapping[str, InPlace] = field(default_factory=dict)

    @property
    def speaks(self) -> bool:
        """Whether all tensors of all models were compared, and most rows fit, and are no multiples."""
        return bool(self.found) and all(f.whole and not f.rescaled for f in self.found.values())

    @property
    def all_fit(self) -> bool:
        return self.speaks and not any(f.astray for f in self.found.values())

    def note(self) -> str:
        """What was seen, in a sentence."""
        rows = sum(f.rows for f in self.found.values())
        axes = sum(len(f.axes) for f in self.found.values())
        ratio = max(f.ratio for f in self.found.values())
        return (
            f"each of {rows:,} rows, on {axes:,} axes of weight matrices, lies nearer to its own place in the first "
            f"model than to {OTHERS} others drawn at random (at most {ratio:.2f} of their distance), so no matching "
            f"was needed and no model was built"
        )

    def to_json(self) -> dict[str, Any] | None:
        """As it stands in a record; None: nothing was decided by it."""
        return {name: f.to_json() for name, f in self.found.items()} if self.speaks else None


def seen_in_files(met: Met, matching: Matching) -> tuple[Matching, list[str], Places | None]:
    """How neurons are still to be matched, what to say of it, and the rows that were compared (None: adapters on one
    base, which share its neurons)."""
    from mergeid.io.lora_forming import shared_base

    on = shared_base([*met.agreed.models, *([met.agreed.base] if met.agreed.base is not None else [])])
    if on is not None:
        note = f"all are adapters on {on.source} and share its neurons, so no matching is needed"
        return replace(matching, mode="never"), [note], None
    if matching.matcher is not None:
        return matching, [], None
    places = places_of(met)
    return (replace(matching, mode="never"), [places.note()], places) if places.all_fit else (matching, [], places)


def places_of(met: Met) -> Places:
    """Compare every further model, and the base, with the first. Reads headers first: shapes fit already."""
    run = met.bench.run
    first, *others = met.everyone
    found: dict[str, InPlace] = {}
    for i, other in enumerate(others):
        run.tell("comparing rows in place", i, len(others))
        found[f"{i + 1}: {other.source}"] = seen = in_place(first, other, met.float_names, run.seed)
        if not seen.whole:
            break
    return Places(found)


def on_astray(pair: Pair, seen: InPlace) -> tuple[Pair, str | None]:
    """The pair with a graph of those spaces only on which rows are astray (with what lies in them, or holds them), and
    what is said of the others."""
    graph = pair.graph
    keys = {place for name, axis in seen.astray for place in pair.a.places(name, axis)}
    wanted = {s.id for s in graph.spaces if any((a.tensor, a.axis) in keys for a in s.axes)}
    while True:
        family = {p for s in graph.spaces if s.id in wanted for p in s.parents}
        family |= {s.id for s in graph.spaces if wanted & set(s.parents)}
        if family <= wanted:
            break
        wanted |= family
    left = [s.id for s in graph.spaces if s.id not in wanted]
    if not left:
        return pair, None
    rows = sum(len(found) for found in seen.astray.values())
    near = f"{seen.rows - rows:,} of {seen.rows:,} rows of the weights are nearest to the same row of the first model"
    where = f", so {len(left)} spaces are in its order already; the {len(wanted)} others were planned"
    note = near + (where if wanted else ", so all spaces are in its order already")
    return replace(pair, graph=graph.without(left, "every row is in its own place")), note
