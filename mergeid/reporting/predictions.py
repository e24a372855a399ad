"""Tables of what is predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mergeid.reporting.tables import Column, make_table

if TYPE_CHECKING:
    from rich.table import Table

    from mergeid.prediction.model import Interval
    from mergeid.results.prediction import Outlook, PredictionMatrix, PredictResult
    from mergeid.results.ranking import Ranking

WIDEST = 12
"""Models that a matrix is shown of in the terminal."""


def prediction_table(result: PredictResult, *, width: int) -> Table:
    """One row per way to merge the pair."""
    columns = [
        Column("merge"),
        Column("nats lost", "right"),
        Column("90 % interval", "right"),
        Column("points", "right"),
        Column("points, 90 %", "right", optional=1),
        Column(f"≤ {result.tolerated:g} nats", "right"),
        Column("layers responsible", shrink=True, min_width=12, optional=2),
    ]
    rows: list[Sequence[Any]] = []
    for o in result.outlooks:
        sure = o.nats.trusted
        points = o.points if o.points is not None and o.points.trusted else None
        rows.append(
            [
                o.label,
                _number(o.nats.expected) if sure else "cannot tell",
                _span(o.nats) if sure else "",
                _points(points.expected) if points else "",
                _span(points, _points) if points else "",
                f"{o.nats.within:.2f}" if sure and o.nats.within is not None else "",
                ", ".join(x.layer.removesuffix(".weight") for x in o.layers) or "none",
            ]
        )
    run = {"inputs": "inputs", "weights": "random inputs", "sketches": "inputs (sketched)"}[result.mode]
    title = f"{result.a} and {result.b}, by {result.examples} {run}"
    return make_table(
        columns, rows, width=width, title=title, caption=_legend(result.outlooks, result.tolerated, points=True)
    )


def trials_table(result: PredictResult, *, width: int) -> Table:
    """One row per merge that was made and run: what is expected of it, by labels where there are some, and what it said
    of the inputs."""
    labelled = any(t.labelled for t in result.trials)
    told = labelled or any(t.trusted for t in result.trials)
    last = "by labels" if labelled else f"≤ {result.tolerated:g} nats"
    expected = [Column(name, "right") for name in ("nats lost", "90 % interval", last)] if told else []
    columns = [
        Column("trial"),
        *expected,
        Column("hard", "right", optional=int(told)),
        Column("soft", "right", optional=int(told)),
        Column("missed", "right", optional=2),
    ]
    rows: list[Sequence[Any]] = []
    for t in result.trials:
        nats, known = t.trusted, t.labelled
        row = [""] * len(expected)
        if known is not None:
            span = f"{_number(known.corrected_low)} to {_number(known.corrected_high)}"
            row = [_number(known.corrected), span, _number(known.nats)]
        elif nats is not None:
            row = [_number(nats.expected), _span(nats), "" if nats.within is None else f"{nats.within:.2f}"]
        rows.append([t.label, *row, _number(t.hard), _number(t.soft), f"{round(100 * t.missed, 1) + 0.0:.1f} %"])
    by = "labels" if labelled else "trial"
    title = f"trials on {result.trials[0].examples} inputs: nats lost against the models' mean"
    caption = f"nats lost: expected on other inputs, by {by} and prediction together; negative where gained. " * told
    caption += "hard: the class that both models together find most probable counts as the truth. soft: their mean "
    caption += "prediction does."
    return make_table(columns, rows, width=width, title=title, caption=caption)


def interference_table(result: PredictResult, *, width: int, most: int = 5) -> Table:
    """The tensors in which two fine-tunes of one base cancel most."""
    columns = [
        Column("task vectors of", shrink=True, min_width=12),
        Column("cosine", "right"),
        Column("cancelled", "right"),
        Column("share of the change", "right", optional=1),
    ]
    rows = [[i.layer, f"{i.cosine:.2f}", f"{i.against:.0%}", f"{i.share:.1%}"] for i in result.interference[:most]]
    title = "interference: where averaging the fine-tunes cancels most"
    caption = "cancelled: the share of what both changed that points apart. cosine: 1 where they changed alike."
    return make_table(columns, rows, width=width, title=title, caption=caption)


def ranking_table(ranking: Ranking, *, width: int) -> Table:
    """One row per candidate, best first."""
    tried = any(p.tried is not None for p in ranking.partners)
    told = any(p.beyond is not None for p in ranking.partners)
    columns = [
        Column("", "right"),
        Column("candidate", shrink=True, min_width=8),
        Column("merge"),
        *([Column("beyond A", "right")] if told else []),
        Column("nats lost", "right"),
        Column("90 % interval", "right", optional=1),
        Column(f"≤ {ranking.tolerated:g} nats", "right"),
        *([Column("in a trial", "right")] if tried else []),
    ]
    rows: list[Sequence[Any]] = []
    for place, p in enumerate(ranking.partners, 1):
        way, sure = p.way, p.way.nats.trusted
        row = [str(place), p.name, p.label if tried else way.label]
        row += ["" if p.beyond is None else f"{p.beyond:+.3f}"] if told else []
        row += [
            _number(way.nats.expected) if sure else "cannot tell",
            _span(way.nats) if sure else "",
            f"{way.nats.within:.2f}" if sure and way.nats.within is not None else "",
        ]
        rows.append([*row, *([f"{p.tried:.3f}" if p.tried is not None else ""] if tried else [])])
    caption = "beyond A: expected loss above that of A alone. " * told
    caption += _legend([p.way for p in ranking.partners], ranking.tolerated)
    return make_table(columns, rows, width=width, title=f"partners for {ranking.model}, best first", caption=caption)


def matrix_table(matrix: PredictionMatrix, *, width: int) -> Table:
    """Expected nats of every pair under its best assignment; a list of pairs where there are many models."""
    n = len(matrix.names)
    title = "expected barrier in nats, best way to merge"
    if n <= WIDEST:
        values = matrix.expected()
        columns = [Column("", shrink=True, min_width=8), *(Column(str(k + 1), "right") for k in range(n))]
        rows = [
            [f"{i + 1} {matrix.names[i]}", *("" if i == j else _number(values[i][j]) for j in range(n))]
            for i in range(n)
        ]
        return make_table(columns, rows, width=width, title=title)
    ordered = sorted(matrix.pairs.values(), key=lambda r: r.best.nats.expected)
    columns = [
        Column("A", shrink=True, min_width=8),
        Column("B", shrink=True, min_width=8),
        Column("nats lost", "right"),
        Column("merge"),
    ]
    shown = [[r.a, r.b, _number(r.best.nats.expected), r.best.label] for r in ordered[:20]]
    return make_table(columns, shown, width=width, title=f"the {len(shown)} easiest of {len(ordered)} pairs")


def _legend(outlooks: Sequence[Outlook], tolerated: float, *, points: bool = False) -> str:
    """What the columns mean, as far as they are filled; `points`: whether there is one of accuracy."""
    known = [o for o in outlooks if o.nats.trusted]
    if not known:
        return ""
    text = f"nats lost: loss above the models' own. ≤ {tolerated:g} nats: probability of losing no more."
    text += " points: accuracy lost." * (points and any(o.points is not None for o in known))
    return text + (" +: may lose more than a guess." if any(o.nats.open for o in known) else "")


def _number(value: float) -> str:
    digits = 3 if value < 10 else 1
    return f"{round(value, digits) + 0.0:.{digits}f}" if math.isfinite(value) else "–"  # no minus before zeros


def _points(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "–"


def _span(value: Interval, shown: Callable[[float], str] = _number) -> str:
    high = "∞" if math.isinf(value.high) else shown(value.high)
    return f"{shown(value.low)} to {high}{'+' if value.open else ''}"
