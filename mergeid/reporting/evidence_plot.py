"""The evidence of a plan by depth: what the activations, the chords and the structure say of every space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.evidence.hold import WIDEST
from mergeid.reporting.plots import COLOURS, MARKERS, save_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mergeid.evidence.decide import SpaceEvidence
    from mergeid.results.plan import Plan

DECISIONS = {"direct": ("o", "#009E73"), "match": ("s", "#E69F00"), "will not merge": ("X", "#D55E00")}
LABEL = 34
"""Characters of a space's label on the axis."""


def plot_evidence(plan: Plan, path: str | Path) -> Path:
    """One panel each for ι, J, chord deviations, structural margins and angles, as far as they are known; spaces in the
    order of the graph, which is that of depth.

    Raises `MergeidError` where the plan has no evidence, or for a path that cannot be written."""
    spaces = plan.spaces
    if not spaces:
        raise MergeidError(
            f"there is no evidence to plot: --match {plan.match} decides nothing; use --match auto with --plot"
        )
    panels = [p for p in (_iota, _gains, _correlations, _chords, _structure, _angles) if p(None, spaces)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            panel(axis, spaces)
            axis.grid(axis="y", color="0.9", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(y=0.12)
            # beside the axes, where no line runs through it
            axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
        every = math.ceil(len(spaces) / 60)
        names = [_named(s) for s in spaces][::every]
        axes[-1].set_xticks(range(0, len(spaces), every), names, rotation=90, fontsize=7)
        axes[-1].set_xlim(-0.6, len(spaces) - 0.4)
        width = min(16.0, max(7.0, 4.0 + 0.2 * len(spaces)))
        figure.set_size_inches(width, 1.9 * len(panels) + 2.2)

    return save_plot(draw, path, f"{plan.arch}: evidence by depth; {plan.verdict}")


def _named(space: SpaceEvidence) -> str:
    label = space.label if len(space.label) <= LABEL else "…" + space.label[1 - LABEL :]
    return f"{label} ({space.id})"


def _values(spaces: Sequence[SpaceEvidence], name: str) -> list[float]:
    return [math.nan if (v := getattr(s, name)) is None else float(v) for s in spaces]


def _known(values: Sequence[float]) -> bool:
    return any(math.isfinite(v) for v in values)


def _lines(axis: Any, series: dict[str, list[float]]) -> None:
    for k, (label, values) in enumerate(series.items()):
        # gaps break the lines, and a value between two gaps shows by its marker
        # the first is broader, so that it shows around one that lies on it
        size = {"linewidth": 3.6, "markersize": 7} if k == 0 else {"linewidth": 1.2, "markersize": 4}
        axis.plot(values, label=label, color=COLOURS[k], marker=MARKERS[k], **size)


def _marked(axis: Any, spaces: Sequence[SpaceEvidence], values: Sequence[float]) -> None:
    """Points in the look of each space's decision."""
    for decision, (marker, colour) in DECISIONS.items():
        at = [i for i, s in enumerate(spaces) if s.decision == decision]
        if at:
            axis.scatter(at, [values[i] for i in at], label=decision, marker=marker, color=colour, s=26, zorder=3)


def _iota(axis: Any, spaces: Sequence[SpaceEvidence]) -> bool:
    values = _values(spaces, "iota")
    if axis is not None:
        for i, s in enumerate(spaces):
            if s.iota_low is not None and s.iota_high is not None:
                axis.vlines(i, s.iota_low, s.iota_high, color="0.4", linewidth=1.2)
        _marked(axis, spaces, values)
        low, high = axis.get_ylim()
        axis.set_ylim(min(-0.1, low - 0.06), max(1.15, high))
        axis.set_ylabel("ι [95 %]")
    return _known(values)


def _gains(axis: Any, spaces: Sequence[SpaceEvidence]) -> bool:
    """Of weight evidence, where nothing else is known."""
    values = _values(spaces, "gain")
    if axis is not None:
        _marked(axis, spaces, values)
        axis.set_ylabel("gain of the match")
    return _known(values) and all(s.evidence != "activations" for s in spaces)


def _correlations(axis: Any, spaces: Sequence[SpaceEvidence]) -> bool:
    names = {"as is": "j_identity", "match": "j_match", "random": "j_random"}
    series = {label: _values(spaces, name) for label, name in names.items()}
    if axis is not None:
        _lines(axis, series)
        axis.set_ylabel("J")
    return any(map(_known, series.values()))


def _chords(axis: Any, spaces: Sequence[SpaceEvidence]) -> bool:
    names = {"as is": "chord_identity", "match": "chord_match"}
    series = {label: _values(spaces, name) for label, name in names.items()}
    if axis is not None:
        _lines(axis, series)
        axis.set_ylabel("chord deviation")
        axis.set_ylim(bottom=0)
    return any(map(_known, series.values()))


def _structure(axis: Any, spaces: Sequence[SpaceEvidence]) -> bool:
    series: dict[str, list[float]] = {"A": [], "B": []}
    for s in spaces:
        for label, record in zip("AB", (s.structure.a, s.structure.b) if s.structure else (None, None), strict=True):
            series[label].append(math.nan if record is None or math.isinf(record.margin) else record.margin)
    if axis is not None:
        _lines(axis, series)
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set_ylabel("structural\nmargin")
        # margins spread over decades; those of swapped neurons are negative
        largest = max((abs(v) for values in series.values() for v in values if math.isfinite(v)), default=0.0)
        axis.set_yscale("symlog", linthresh=1e-2 * largest or 1.0)
    return any(map(_known, series.values()))


def _angles(axis: Any, spaces: Sequence[SpaceEvidence]) -> bool:
    """Only where nothing is known of the calibration inputs: else the margins say more."""
    found = [s.certificate for s in spaces]
    series = {
        side: [math.nan if c is None or (v := getattr(c, name)) is None else v for c in found]
        for side, name in (("A", "angle_a"), ("B", "angle_b"))
    }
    if axis is not None:
        _lines(axis, series)
        axis.axhline(WIDEST, color="0.5", linewidth=0.8)
        axis.set_ylabel("angle to the\nfixed parts (°)")
        axis.set_ylim(bottom=0)
    return any(map(_known, series.values())) and all(s.structure is None for s in spaces)
