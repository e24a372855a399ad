"""Figures from the table alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import falsify
import matplotlib.pyplot as plt
import numpy as np
from grid import DIMENSIONS, MLP_VARIANTS, RESNET_VARIANTS, TURNS
from table import Row, barriers, numbers

COLOURS = {"unaligned": "#c44e52", "aligned": "#4c72b0"}
PANELS = (
    ("mnist", "mnist", "MLP, MNIST", MLP_VARIANTS),
    ("fashion", "fashion", "MLP, Fashion-MNIST", MLP_VARIANTS),
    ("resnet", "fashion", "ResNet, Fashion-MNIST", RESNET_VARIANTS),
)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """All figures for which there are rows."""
    makers = {
        "barriers": _barriers,
        "curves": _curves,
        "objectives": _objectives,
        "subspace": _subspace,
        "falsification": _falsification,
    }
    written = []
    for name, make in makers.items():
        figure = make(rows)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120)
            written.append(path)
            plt.close(figure)
    return written


def label(variant: str) -> str:
    """A variant's name on an axis."""
    return variant.replace(" ", ", σ=")


def _present(rows: Sequence[Row]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """The panels with the variants that have rows."""
    found = []
    for experiment, data, title, variants in PANELS:
        measured = tuple(v for v in variants if len(barriers(rows, experiment, data, v, "unaligned")))
        if measured:
            found.append((experiment, data, title, measured))
    return found


def _barriers(rows: Sequence[Row]) -> plt.Figure | None:
    """Barrier of every pair by variant, unaligned and aligned."""
    panels = _present(rows)
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (experiment, data, title, variants) in zip(axes[0], panels, strict=True):
        for shift, merge in ((-0.17, "unaligned"), (0.17, "aligned")):
            for i, variant in enumerate(variants):
                values = barriers(rows, experiment, data, variant, merge)
                if len(values):
                    axis.bar(i + shift, values.mean(), 0.32, color=COLOURS[merge], alpha=0.75)
                    axis.plot(np.full(len(values), i + shift), values, ".", color="black", markersize=3)
        axis.set_xticks(range(len(variants)), [label(v) for v in variants], rotation=30, ha="right")
        axis.set_title(title)
        axis.set_ylabel("barrier (nats)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c, alpha=0.75) for c in COLOURS.values()]
    axes[0][0].legend(handles, list(COLOURS))
    return figure


def _curves(rows: Sequence[Row]) -> plt.Figure | None:
    """Mean test loss along the line, by variant."""
    panels = _present(rows)
    if not panels:
        return None
    shape = {"figsize": (4.6 * len(panels), 6.4), "squeeze": False, "layout": "constrained", "sharex": True}
    figure, axes = plt.subplots(2, len(panels), **shape)
    for column, (experiment, data, title, variants) in enumerate(panels):
        for axis, merge in zip(axes[:, column], COLOURS, strict=True):
            for variant in variants:
                wanted = {"experiment": experiment, "data": data, "variant": variant, "merge": merge}
                lines = [numbers(r["losses"]) for r in rows if all(r[k] == v for k, v in wanted.items())]
                if lines:
                    mean = np.mean(lines, 0)
                    axis.plot(np.linspace(0, 1, len(mean)), mean, label=label(variant))
            axis.set_title(f"{title}, {merge}")
            axis.set_ylabel("test loss (nats)")
        axes[-1, column].set_xlabel("λ")
    axes[0][0].legend()
    return figure


def _objectives(rows: Sequence[Row]) -> plt.Figure | None:
    """Mean correlation of paired neurons by depth: as they lie, best assignment, at random."""
    panels = _present(rows)
    if not panels:
        return None
    most = max(len(p[3]) for p in panels)
    shape = {"figsize": (2.5 * most, 2.4 * len(panels)), "squeeze": False, "layout": "constrained", "sharey": True}
    figure, axes = plt.subplots(len(panels), most, **shape)
    styles = {
        "j_optimal": ("optimal", "-", "#55a868"),
        "j_identity": ("identity", "-", "#c44e52"),
        "j_random": ("random", ":", "grey"),
    }
    for line, (experiment, data, title, variants) in zip(axes, panels, strict=True):
        for axis in line[len(variants) :]:
            axis.set_axis_off()
        for axis, variant in zip(line, variants, strict=False):
            wanted = {"experiment": experiment, "data": data, "variant": variant, "merge": "unaligned"}
            chosen = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
            for name, (text, style, colour) in styles.items():
                if chosen:
                    mean = np.mean([numbers(r[name]) for r in chosen], 0)
                    axis.plot(range(1, len(mean) + 1), mean, style, color=colour, marker=".", label=text)
                    axis.set_xticks(range(1, len(mean) + 1))
            axis.set_title(f"{title}\n{label(variant)}", fontsize=8)
            axis.set_ylim(-0.05, 1.05)
            axis.set_xlabel("layer", fontsize=8)
        line[0].set_ylabel("mean correlation")
    axes[0][0].legend(fontsize=7)
    return figure


def _subspace(rows: Sequence[Row]) -> plt.Figure | None:
    """Unaligned barrier on Gaussian inputs: over the intrinsic dimension, and over the coherence of the subspace."""
    from data import coherence, subspace

    if not any(r["experiment"] in ("dimension", "coherence") for r in rows):
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for variant, colour in (("standard", "grey"), ("W 1", COLOURS["unaligned"])):
        points = [(k, barriers(rows, "dimension", f"gauss-{k}", variant, "unaligned")) for k in DIMENSIONS]
        _points(left, [p for p in points if len(p[1])], label(variant), colour)
    left.set_xscale("log", base=2)
    left.set_xlabel("intrinsic dimension k of the inputs")
    points = [
        (coherence(subspace(8, t)), barriers(rows, "coherence", f"gauss-8-{t:g}", "W 1", "unaligned")) for t in TURNS
    ]
    _points(right, [p for p in points if len(p[1])], label("W 1"), COLOURS["unaligned"])
    right.set_xlabel("coherence ν(U), k = 8")
    for axis in (left, right):
        axis.set_ylabel("unaligned barrier (nats)")
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    if left.lines:
        left.legend()
    return figure


def _falsification(rows: Sequence[Row]) -> plt.Figure | None:
    return falsify.draw(falsify.cases(rows)) if rows else None


def _points(axis: plt.Axes, points: list[tuple[float, np.ndarray]], text: str, colour: str) -> None:
    if points:
        axis.plot([x for x, _ in points], [v.mean() for _, v in points], "-", color=colour, label=text)
        for x, values in points:
            axis.plot(np.full(len(values), x), values, ".", color=colour)
