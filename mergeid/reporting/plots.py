"""Plots as PNG or SVG files, drawn without a display; matplotlib is loaded when the first one is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergeid.errors import MergeidError, reason
from mergeid.io.publish import whole_file

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mergeid.reporting.page.content import Measured
    from mergeid.results.barrier import BarrierResult

# Okabe and Ito's colours, told apart by all kinds of colour vision; the markers tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SUFFIXES = (".png", ".svg")


def check_plot_path(path: str | Path) -> Path:
    """The path, if its ending is one that can be drawn; to be called before long work.

    Raises:
        MergeidError: another ending, or a folder that is not there.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise MergeidError(
            f"{path} does not end in {' or '.join(SUFFIXES)}; expected a plot file of one of these kinds"
        )
    if not path.parent.is_dir():
        raise MergeidError(f"the folder of the plot {path} does not exist; create {path.parent} or choose another path")
    return path


def plot_barriers(
    results: BarrierResult | Sequence[BarrierResult],
    path: str | Path,
    title: str = "",
    marks: Sequence[Measured] = (),
) -> Path:
    """Loss, and accuracy where there is one, along the line from a to b; one line per labelled result.

    The dotted straight line is the chord above which the loss counts as barrier. Replaces an older file at once.

    Args:
        marks: networks that were made of half of each but lie off the line, a star each at λ = 0.5.

    Raises:
        MergeidError: a path that cannot be written, or that is neither PNG nor SVG.
    """
    curves = [results] if not isinstance(results, Sequence) else list(results)

    def draw(figure: Figure) -> None:
        with_accuracy = any(curve.accuracies is not None for curve in curves)
        axes = figure.subplots(1, 2 if with_accuracy else 1, squeeze=False)[0]
        for k, curve in enumerate(curves):
            # A line that later ones lie on is broader, and shows around them.
            hidden = sum(list(map(_near, curve.losses)) == list(map(_near, later.losses)) for later in curves[k + 1 :])
            stroke = Stroke(k, 1.6 + 2.4 * hidden, 4 + 3 * hidden)
            name = curve.label or "a to b"
            stroke.draw(axes[0], curve.lambdas, curve.losses, f"{name}: barrier {_short(curve.barrier)}")
            if curve.accuracies is not None:
                drop = curve.barrier_accuracy or 0.0
                shares = [100 * accuracy for accuracy in curve.accuracies]
                stroke.draw(axes[1], curve.lambdas, shares, f"{name}: {drop:.1f} points lost")
        for k, mark in enumerate(marks, len(curves)):
            star = Stroke(k, 0, 13, "*")
            star.draw(axes[0], [0.5], [mark.loss], f"{mark.name}: loss {_short(mark.loss)}")
            if with_accuracy and mark.accuracy is not None:
                share = 100 * mark.accuracy
                star.draw(axes[1], [0.5], [share], f"{mark.name}: {share:.1f} %")
        # Matched and direct lines share their ends, so that their chords would hide one another.
        for first, last in dict.fromkeys((_near(c.losses[0]), _near(c.losses[-1])) for c in curves):
            axes[0].plot([0, 1], [first, last], color="0.5", linestyle=":", linewidth=1, zorder=1)
        axes[0].set_ylabel("loss (nats)")
        if with_accuracy:
            axes[1].set_ylabel("accuracy (%)")
            axes[1].set_ylim(bottom=0, top=None)
        for axis in axes:
            axis.set_xlabel("λ  (0: a, 1: b)")
            axis.set_xlim(-0.02, 1.02)
            _dress(axis)
        figure.set_size_inches(9.0 if with_accuracy else 5.0, 3.6 + 0.18 * len(curves))

    return save_plot(draw, path, title)


def plot_by_depth(
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    path: str | Path,
    *,
    ylabel: str,
    kind: Literal["line", "bar"] = "line",
    intervals: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
    title: str = "",
) -> Path:
    """One value per layer or space, in the order of depth.

    Args:
        names: of the layers, first to last; thinned out on the axis where they would overlap.
        series: label to one value per layer; None or nan leaves a gap.
        path: PNG or SVG file.
        ylabel: what the values are, with their unit.
        kind: lines with markers, or bars side by side.
        intervals: label to (low, high) per layer, drawn as error bars.
        title: above the plot.

    Raises:
        ValueError: a series of another length than `names`.
        MergeidError: a path that cannot be written, or that is neither PNG nor SVG.
    """
    for label, values in series.items():
        if len(values) != len(names):
            raise ValueError(f"{label!r} has {len(values)} values for {len(names)} layers")

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        width = 0.8 / max(len(series), 1)
        for k, (label, raw) in enumerate(series.items()):
            values = [math.nan if value is None else value for value in raw]
            colour = COLOURS[k % len(COLOURS)]
            places = [float(i) for i in range(len(names))]
            if kind == "bar":
                places = [i + (k - (len(series) - 1) / 2) * width for i in places]
                axis.bar(places, values, width, label=label, color=colour)
            else:
                Stroke(k).draw(axis, places, values, label)
            for place, value, ends in zip(places, values, (intervals or {}).get(label, ()), strict=False):
                if ends is not None and math.isfinite(value):
                    axis.vlines(place, *ends, color="0.25" if kind == "bar" else colour, linewidth=1.2)
        every = math.ceil(len(names) / 40)
        axis.set_xticks(range(0, len(names), every), list(names)[::every], rotation=90, fontsize=7)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.set_ylabel(ylabel)
        _dress(axis, legend=len(series) > 1)
        figure.set_size_inches(min(12.0, max(5.0, 2.0 + 0.25 * len(names))), 4.2)

    return save_plot(draw, path, title)


def plot_heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: np.ndarray,
    path: str | Path,
    *,
    label: str,
    axes: tuple[str, str] = ("", ""),
    title: str = "",
    largest: float = 1.0,
) -> Path:
    """A matrix of values from 0 to `largest`, first row at the bottom.

    Args:
        rows, columns: names, thinned out on the axes where they would overlap.
        values: [rows, columns]; nan is left white.
        path: PNG or SVG file.
        label: what the values are.
        axes: what rows and columns are.
        title: above the plot.

    Raises:
        ValueError: a matrix of another shape.
        MergeidError: a path that cannot be written, or that is neither PNG nor SVG.
    """
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"a matrix {values.shape} for {len(rows)} rows and {len(columns)} columns")

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        image = axis.imshow(
            values, vmin=0, vmax=largest, cmap="magma", origin="lower", aspect="auto", interpolation="nearest"
        )
        for names, place, ticks in ((rows, axis.yaxis, axis.set_yticks), (columns, axis.xaxis, axis.set_xticks)):
            every = math.ceil(len(names) / 40)
            ticks(range(0, len(names), every), list(names)[::every], fontsize=6)
            place.set_tick_params(rotation=90 if place is axis.xaxis else 0)
        axis.set_ylabel(axes[0])
        axis.set_xlabel(axes[1])
        figure.colorbar(image, ax=axis, label=label)
        size = [min(12.0, max(4.5, 2.5 + 0.13 * len(names))) for names in (columns, rows)]
        figure.set_size_inches(size[0] + 1, size[1])

    return save_plot(draw, path, title)


def save_plot(draw: Callable[[Figure], None], path: str | Path, title: str = "") -> Path:
    """Draws into a new figure and writes it: whole or not at all, the same bytes for the same content."""
    path = check_plot_path(path)
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ValueError as error:  # of its settings, a backend that it does not know
        raise MergeidError(
            f"matplotlib cannot draw {path}: {reason(error)}; check MPLBACKEND and matplotlibrc"
        ) from error
    with rc_context({"svg.hashsalt": "mergeid", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(layout="constrained", dpi=150)
        draw(figure)
        if title:
            figure.suptitle(title, fontsize=10)
        kind = path.suffix.lower().removeprefix(".")
        with whole_file(path, "--plot") as partial:
            figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return path


@dataclass(frozen=True)
class Stroke:
    """How the k-th line of a plot is drawn; widths in points; `shape`: of its markers, else the k-th."""

    k: int
    width: float = 1.6
    marker: float = 4
    shape: str = ""

    def draw(self, axis: Axes, x: Sequence[float], y: Sequence[float], label: str) -> None:
        """Into these axes. matplotlib leaves a gap at nan, but would stretch the axis without end at inf."""
        axis.plot(
            x,
            [value if math.isfinite(value) else math.nan for value in y],
            label=label,
            color=COLOURS[self.k % len(COLOURS)],
            marker=self.shape or MARKERS[self.k % len(MARKERS)],
            linewidth=self.width,
            markersize=self.marker,
        )


def _dress(axis: Any, legend: bool = True) -> None:
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:  # above the axes, where no line runs through it
        axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _near(value: float) -> float:
    return round(value, 6) if math.isfinite(value) else math.nan


def _short(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "∞"
