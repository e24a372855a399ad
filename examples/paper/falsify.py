"""What would settle it: pairs that the theory certifies and that have a barrier all the same, and the reverse.

Two statements are held against every measured pair. *Certified* (by structure): in every layer of both networks the
identity is the unique cheapest assignment, see `certificate`. *Decided direct* (from activations): mergeid would leave
every space as it lies. Either is contradicted by a pair whose direct merge has a barrier, above all by a
barrier that aligning the neurons removes: then their order was the cause. The reverse are pairs about which the
statement is not made and that have no barrier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isinf, nan

import matplotlib.pyplot as plt
import numpy as np
from table import KEY, Row, numbers

BARRIER = 0.05
"""Nats above which a barrier counts, and above which aligning has lowered it."""


@dataclass(frozen=True)
class Case:
    """One pair.

    Attributes:
        cell: experiment, data and variant.
        direct, aligned: barriers in nats.
        margin: least margin of a layer of either network, over the size of its median swap cost (1 or -1 where most
            swaps cannot be realized at all); None: no fixed part, and then every assignment costs the same.
        iota: least lower end of its interval over the layers.
        verdict: "direct", "match" or "will not merge", of mergeid's plan.
    """

    cell: tuple[str, str, str]
    direct: float
    aligned: float
    margin: float | None
    iota: float
    verdict: str

    @property
    def certified(self) -> bool:
        return self.margin is not None and self.margin > 0

    @property
    def barrier(self) -> bool:
        return self.direct > BARRIER

    @property
    def order(self) -> bool:
        """Whether the neurons' order costs something: aligning them lowers the barrier."""
        return self.direct - self.aligned > BARRIER


def cases(rows: Iterable[Row]) -> list[Case]:
    """All measured pairs."""
    pairs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault(tuple(row[c] for c in KEY), {})[row["merge"]] = row
    found = []
    for both in pairs.values():
        row = both["unaligned"]
        ratios = [
            np.sign(margin) if isinf(margin) or isinf(swap) or swap == 0 else margin / abs(swap)
            for s in ("a", "b")
            for margin, swap in zip(numbers(row[f"margins_{s}"]), numbers(row[f"swaps_{s}"]), strict=True)
        ]
        found.append(
            Case(
                (row["experiment"], row["data"], row["variant"]),
                float(row["barrier"]),
                float(both["aligned"]["barrier"]),
                float(min(ratios)) if ratios else None,
                min((v for v in numbers(row["iota_low"]) if v == v), default=nan),
                row["verdict"],
            )
        )
    return found


STATEMENTS: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    ("certified by structure", lambda c: c.certified),
    ("fixed parts, not certified", lambda c: c.margin is not None and not c.certified),
    ("no fixed part, structure says nothing", lambda c: c.margin is None),
    ("decided direct", lambda c: c.verdict == "direct"),
    ("decided match", lambda c: c.verdict == "match"),
    ("decided: will not merge", lambda c: c.verdict == "will not merge"),
)


def counted(found: Sequence[Case]) -> list[list[str]]:
    """Statement, pairs, without a barrier, with one that aligning does not lower, with one that it lowers."""
    body = []
    for name, says in STATEMENTS:
        chosen = [c for c in found if says(c)]
        still = sum(c.barrier and not c.order for c in chosen)
        order = sum(c.order for c in chosen)
        body.append([name, *map(str, (len(chosen), len(chosen) - still - order, still, order))])
    return body


def contradictions(found: Sequence[Case]) -> list[list[str]]:
    """By kind of contradiction and cell: how many pairs, and their mean barriers."""
    kinds: tuple[tuple[str, Callable[[Case], bool]], ...] = (
        ("certified, barrier from the order", lambda c: c.certified and c.order),
        ("certified, barrier that aligning leaves", lambda c: c.certified and c.barrier and not c.order),
        ("certified, yet decided match", lambda c: c.certified and c.verdict == "match"),
        ("not certified, no barrier", lambda c: c.margin is not None and not c.certified and not c.barrier),
        ("nothing fixed, no barrier", lambda c: c.margin is None and not c.barrier),
        ("decided direct, barrier from the order", lambda c: c.verdict == "direct" and c.order),
        (
            "decided direct, barrier that aligning leaves",
            lambda c: c.verdict == "direct" and c.barrier and not c.order,
        ),
        ("decided match, no barrier", lambda c: c.verdict == "match" and not c.barrier),
    )
    totals = Counter(c.cell for c in found)
    body = []
    for name, is_one in kinds:
        by_cell: dict[tuple[str, str, str], list[Case]] = {}
        for c in found:
            if is_one(c):
                by_cell.setdefault(c.cell, []).append(c)
        for cell, chosen in by_cell.items():
            direct, aligned = (float(np.mean([getattr(c, n) for c in chosen])) for n in ("direct", "aligned"))
            count = f"{len(chosen)} of {totals[cell]}"
            body.append([name, " ".join(cell), count, f"{direct:.3f}", f"{aligned:.3f}"])
        if not by_cell:
            body.append([name, "", "0", "", ""])
    return body


def draw(found: Sequence[Case]) -> plt.Figure:
    """Barrier over the least relative margin, and what aligning gains over the least ι; contradictions are shaded."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    variants = list(dict.fromkeys(c.cell[2] for c in found))
    colours = dict(zip(variants, plt.get_cmap("tab10").colors, strict=False))
    markers = {"mnist": "o", "fashion": "s", "resnet": "^", "dimension": "D", "coherence": "v"}
    for c in found:
        style = {"color": colours[c.cell[2]], "marker": markers[c.cell[0]], "s": 26, "alpha": 0.7, "linewidths": 0}
        left.scatter(0.0 if c.margin is None else c.margin, max(c.direct, 1e-4), **style)
        ring = {"edgecolors": "black", "linewidths": 0.8} if c.verdict == "direct" else {}
        right.scatter(c.iota, c.direct - c.aligned, **{**style, **ring})
    left.set_xscale("symlog", linthresh=0.1)
    left.set_yscale("log")
    left.axhline(BARRIER, color="grey", lw=0.8, ls="--")
    left.axvline(0, color="grey", lw=0.8, ls="--")
    (low, high), top = left.get_xlim(), left.get_ylim()[1]
    left.fill_between([0, high], BARRIER, top, color="#c44e52", alpha=0.1)
    left.set_xlim(low, high)
    left.set_ylim(top=top)
    left.set_xlabel("least margin of a layer / median swap cost (0: nothing fixed)")
    left.set_ylabel("barrier as they lie (nats; 0 is drawn at 0.0001)")
    right.axhline(BARRIER, color="grey", lw=0.8, ls="--")
    right.set_yscale("symlog", linthresh=0.05)
    right.set_xlabel("least lower end of ι over the layers (black rings: decided direct)")
    right.set_ylabel("barrier as they lie − aligned (nats)")
    handles = [plt.Line2D([], [], marker="o", ls="", color=v, label=k) for k, v in colours.items()]
    shown = {c.cell[0] for c in found}
    handles += [plt.Line2D([], [], marker=m, ls="", color="grey", label=k) for k, m in markers.items() if k in shown]
    right.legend(handles=handles, fontsize=7, ncols=2)
    return figure
