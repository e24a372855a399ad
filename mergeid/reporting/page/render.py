"""From a `Report` to HTML: one file that asks for nothing else, every value escaped."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import visible
from mergeid.io.publish import write_whole
from mergeid.reporting.page import chart, network, verdict
from mergeid.reporting.show_merge import repair_line
from mergeid.reporting.tables import NOTHING
from mergeid.reporting.terms import TERMS

if TYPE_CHECKING:
    from jinja2 import Template

    from mergeid.reporting.page.content import Report

OF_THE_PAGE = ("space", "J", "ι", "direct", "match", "will not merge", "barrier", "nat", "λ", "solved", "repaired")
"""Terms that the page explains at its end."""
KINDS = {"direct": "direct", "match": "match", "will not merge": "wont"}
"""Decision to its class in the style sheet."""
FITTED = (
    "So the weights were computed from the calibration inputs too, not from the models' weights alone. Test the merged "
    "network on other inputs before you use it."
)
SCALED = "Apart from that, the weights were computed from the models' weights alone."


def render(report: Report) -> str:
    """The page, as text. The same report gives the same text."""
    tone, sentence = verdict.sentence(report)
    drawn = network.draw(report.plan) if report.plan is not None and report.plan.spaces else None
    charts = [chart.loss_chart(report.curves, report.solved)] if report.curves else []
    if report.curves and (accuracy := chart.accuracy_chart(report.curves, report.solved)) is not None:
        charts.insert(0, accuracy)
    spans, axis = chart.ranges(report.prediction, report.curves) if report.prediction is not None else ((), ())
    return _template().render(
        report=report,
        tone=tone,
        sentence=sentence,
        ends=verdict.ends(report),
        merges=verdict.merges(report),
        charts=charts,
        network=drawn,
        counts=_counts(report),
        spans=spans,
        axis=axis,
        **_looked(report),
        repaired=_repaired(report),
        terms=[t for name in OF_THE_PAGE for t in TERMS if t.name == name],
        style=_text("style.css"),
        script=_text("script.js"),
    )


def write_page(report: Report, path: Path, option: str = "-o") -> Path:
    """Write the page whole or not at all. Raises `MergeidError` where it cannot be written."""
    write_whole(path, render(report), option)
    return path


def _looked(report: Report) -> dict[str, Any]:
    """The merges that were at hand, nearest first, with the width of their bars."""
    comparison = report.merge.comparison if report.merge is not None else None
    if comparison is None:
        return {"looked": [], "looked_best": "", "looked_unit": ""}
    found = sorted(comparison["distances"].items(), key=lambda item: inf if item[1] is None else item[1])
    most = max([v for _, v in found if v is not None], default=0.0) or 1.0
    rows = [(name, value, 100.0 if value is None else max(0.0, 100 * value / most)) for name, value in found]
    unit = {"nats": "in nats", "relative": "as a share of the outputs' variance"}
    best = comparison["chosen"] + ("" if comparison["repair"] == "none" else f"+{comparison['repair']}")
    return {"looked": rows, "looked_best": best, "looked_unit": unit.get(comparison["unit"], "mean of all outputs")}


def _repaired(report: Report) -> tuple[str, ...]:
    """What was done to the averaged weights, and what that means for whoever uses them."""
    repair = report.merge.repair if report.merge is not None else None
    if repair is None:
        return ()
    return repair_line(repair), FITTED if verdict.fitted(repair) else SCALED


def _counts(report: Report) -> dict[str, int]:
    spaces = report.plan.spaces if report.plan is not None else []
    return {decision: sum(s.decision == decision for s in spaces) for decision in KINDS}


def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.finalize = _plain
    page.filters.update(
        kind=lambda decision: KINDS.get(decision, "direct"),
        fixed=fixed,
        bar=lambda value: f"{max(0.0, min(1.0, value or 0.0)) * 100:.1f}",
        size=_size,
        raw=Markup,
    )
    return page.from_string(_text("page.html"))


def _plain(value: Any) -> Any:
    """Names from files may hold control characters, which are shown as escapes."""
    return visible(value) if type(value) is str else value


def fixed(value: float | None) -> str:
    """Two decimals; a dash where nothing was measured."""
    return NOTHING if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""
