"""Curves and intervals as places in percent of the drawing, so that a page can stretch them to any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeid.reporting.page.verdict import midpoint, nats

if TYPE_CHECKING:
    from mergeid.reporting.page.content import Measured
    from mergeid.results.barrier import BarrierResult
    from mergeid.results.prediction import PredictResult

STYLES = ("direct", "direct, repaired", "matched", "matched, repaired", "planned", "planned, repaired", "solved")


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where, and what it says."""

    place: float
    text: str


@dataclass(frozen=True)
class Line:
    """Attributes:
    path: of an SVG of 100 by 100. points: [(x, y, λ, value)] in percent from the left and the top.
    """

    name: str
    style: int
    path: str
    points: tuple[tuple[float, float, float, float], ...]
    summary: str


@dataclass(frozen=True)
class Chart:
    """One quantity from A to B.

    Attributes:
        chord: path of the straight line between the ends. marks: networks off the line: (name, y, value as text).
        alt: what the chart shows, in words.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    chord: str
    ticks: tuple[Tick, ...]
    marks: tuple[tuple[str, float, str], ...]
    alt: str


@dataclass(frozen=True)
class Range:
    """A predicted interval beside what was measured, places in percent; `inside` is None where nothing was measured.

    An open one reaches to the right edge."""

    name: str
    low: float
    high: float
    expected: float
    measured: float | None
    text: str
    inside: bool | None
    trusted: bool
    open: bool


def nice(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= count + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def loss_chart(curves: Sequence[BarrierResult], solved: Sequence[Measured]) -> Chart:
    """Loss from A to B, every curve in one frame."""
    series = [(c, [v if math.isfinite(v) else None for v in c.losses]) for c in curves]
    marks = [(m.name, m.loss, nats(m.loss)) for m in solved if math.isfinite(m.loss)]
    alt = "; ".join(f"{c.label}: {nats(c.losses[midpoint(c)])} at the midpoint" for c in curves)
    return _chart("Loss", "nats, lower is better", series, marks, f"Loss from model A to model B. {alt}.")


def accuracy_chart(curves: Sequence[BarrierResult], solved: Sequence[Measured]) -> Chart | None:
    """Accuracy in percent; None where the task has none."""
    if any(c.accuracies is None for c in curves):
        return None
    series = [(c, [100 * v for v in c.accuracies or ()]) for c in curves]
    marks = [(m.name, 100 * m.accuracy, f"{100 * m.accuracy:.1f} %") for m in solved if m.accuracy is not None]
    alt = "; ".join(f"{c.label}: {values[midpoint(c)]:.1f} % at the midpoint" for c, values in series)
    return _chart("Accuracy", "percent, higher is better", series, marks, f"Accuracy from model A to model B. {alt}.")


def _chart(
    title: str,
    unit: str,
    series: Sequence[tuple[BarrierResult, Sequence[float | None]]],
    marks: Sequence[tuple[str, float, str]],
    alt: str,
) -> Chart:
    values = [v for _, vs in series for v in vs if v is not None] + [m[1] for m in marks]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.5
    low, high = (max(0.0, low - pad) if low >= 0 else low - pad), high + pad

    def y(value: float) -> float:
        return round(100 * (high - value) / (high - low), 3)

    lines: list[Line] = []
    chord = ""
    for curve, vs in series:
        pairs = zip(curve.lambdas, vs, strict=True)
        points = tuple((round(100 * x, 3), y(v), x, v) for x, v in pairs if v is not None)
        path = " ".join(f"{'L' if i else 'M'}{p[0]} {p[1]}" for i, p in enumerate(points))
        middle = vs[midpoint(curve)]
        summary = f"{curve.label}: {'not finite' if middle is None else _short(title, middle)} at the midpoint"
        lines.append(Line(curve.label, _style(curve.label, len(lines)), path, points, summary))
        first, last = vs[0], vs[-1]
        if not chord and first is not None and last is not None:
            chord = f"M0 {y(first)} L100 {y(last)}"
    ticks = tuple(Tick(y(v), f"{v:g}") for v in nice(low, high))
    return Chart(title, unit, tuple(lines), chord, ticks, tuple((n, y(v), t) for n, v, t in marks), alt)


def _short(title: str, value: float) -> str:
    return f"{value:.1f} %" if title == "Accuracy" else nats(value)


def _style(label: str, else_: int) -> int:
    return STYLES.index(label) if label in STYLES else else_ % len(STYLES)


def ranges(prediction: PredictResult, curves: Sequence[BarrierResult]) -> tuple[tuple[Range, ...], tuple[Tick, ...]]:
    """Each way of merging with its predicted interval and the barrier that was measured, and the axis of all."""
    measured = {c.label: c.barrier for c in curves}
    found = [(o, measured.get(o.label)) for o in prediction.outlooks]
    top = max(
        [x for o, m in found for x in (o.nats.high, o.nats.expected, m) if x is not None and math.isfinite(x)],
        default=1.0,
    )
    top = (top or 1.0) * 1.05

    def place(value: float) -> float:
        return round(100 * min(max(value, 0.0) / top, 1.0), 3)

    out = []
    for o, m in found:
        inside = None if m is None else o.nats.holds(m, 5e-4)
        said = f"predicted {o.nats.expected:.3f} nats, 90 % interval {o.nats.low:.3f} to {o.nats.high:.3f}"
        said += " or more" if o.nats.open else ""
        if not o.nats.trusted:
            said += " (unlike anything the predictor was fitted on)"
        if m is not None:
            told = f"{m:.3f} nats" if math.isfinite(m) else "a breakdown"
            said += f"; measured {told}, {'inside' if inside else 'outside'} the interval"
        values = (place(o.nats.low), 100.0 if o.nats.open else place(o.nats.high), place(o.nats.expected))
        out.append(Range(o.label, *values, None if m is None else place(m), said, inside, o.nats.trusted, o.nats.open))
    return tuple(out), tuple(Tick(place(v), f"{v:g}") for v in nice(0, top))
