"""Fit mergeid's predictor to the zoo and say how well it does on what it has not seen.

    python examples/zoo/fit.py

reads pairs.csv and features.csv, writes the coefficients that ship with the package
(mergeid/prediction/coefficients.json) and the tables of validation.md. Nothing is trained or run, so that it takes a
minute.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pairs_table as table
from measuring import excess
from rivals import RIVALS, rival_scores

from mergeid.prediction.fitting import Design, Row, area_under_curve, coverage, fit, left_out, ranks_agree
from mergeid.prediction.model import FILE, Interval, Predictor, Term, lift

HERE = Path(__file__).parent
VERSION = "3"
NATS, POINTS = 0.02, 1.0
"""Scales of the targets: differences far below them do not matter."""
MODES = ("inputs", "weights", "sketches")
BAD_NATS, BAD_POINTS = 0.05, 1.0
"""A merge is bad that loses more than either."""

EXCESS, SHIFT, SHARP = Term("excess", NATS), Term("shift", NATS), Term("shift_sharp", NATS)
UNSURE, APART, DROP = Term("own_entropy", NATS), Term("divergence", NATS), Term("drop", 0.01)
FAR, GAP, HASHED = Term("distance_worst", None), Term("gap", None), Term("hash_distance", None)
TERMS = {
    ("inputs", "nats"): ((EXCESS, SHARP, UNSURE, FAR), (SHARP,)),
    ("inputs", "points"): ((EXCESS, SHARP, UNSURE, FAR), (SHARP,)),
    ("weights", "nats"): ((EXCESS, SHIFT, FAR), (APART,)),
    ("weights", "points"): ((EXCESS, SHIFT, FAR), (APART,)),
    ("sketches", "nats"): ((EXCESS, GAP, HASHED), (SHIFT,)),
    ("sketches", "points"): ((EXCESS, DROP, GAP, HASHED), (SHIFT,)),
}
"""(mode, unit) -> terms of the prediction and of the scale of its error. Chosen among a few dozen combinations by what
they reach on families left out, at first on 53 pairs and then on all of them."""
DESIGNS = {
    (mode, unit): Design(unit, scale, *TERMS[mode, unit])
    for mode in MODES
    for unit, scale in (("nats", NATS), ("points", POINTS))
}


@dataclass(frozen=True)
class Case:
    """One pair of the zoo under one assignment and repair, in one mode.

    Attributes:
        halves, half_points: barriers on two halves of the test set; None where only a midpoint is known.
    """

    pair: Mapping[str, str]
    mode: str
    assignment: str
    repaired: bool
    features: Mapping[str, float]
    nats: float
    points: float
    halves: tuple[float, float] | None
    half_points: tuple[float, float] | None

    @property
    def bad(self) -> bool:
        return is_bad(self.nats, self.points)

    def row(self, unit: str, by: str) -> Row:
        return Row(self.features, self.nats if unit == "nats" else self.points, self.pair[by])


def cases(pairs: Path, features: Path) -> list[Case]:
    """Everything that is both measured and described."""
    measured = {r["pair"]: r for r in table.read(pairs)}
    found = []
    for record in table.read(features):
        pair = measured.get(record["pair"])
        if pair is None:
            continue
        mode, assignment, repaired = record["mode"], record["assignment"], record["repaired"] == "1"
        values = {k: float(v) for k, v in list(record.items())[4:] if v}
        curve = assignment + ("_repair" if repaired else "")
        if repaired and (pair["repair"] != "bn" or mode == "weights"):
            continue
        if mode == "weights" and assignment == "match":
            # the match without data was measured at the midpoint alone
            ends, middles = table.numbers(pair["loss_direct"]), float(pair["none_match"])
            nats, points, halves, split = max(0.0, middles - (ends[0] + ends[-1]) / 2), math.nan, None, None
        else:
            nats, points = float(pair[f"barrier_{curve}"]), float(pair[f"points_{curve}"])
            halves, split = table.halves(pair, curve), _half_points(pair, curve)
        found.append(Case(pair, mode, assignment, repaired, values, nats, points, halves, split))
    return found


def _half_points(pair: Mapping[str, str], curve: str) -> tuple[float, float]:
    whole, half = table.numbers(pair[f"accuracy_{curve}"]), table.numbers(pair[f"accuracy_half_{curve}"])
    one, two = (100 * excess(-values) for values in (half, 2 * whole - half))
    return one, two


def is_bad(nats: float, points: float) -> bool:
    return nats > BAD_NATS or points > BAD_POINTS


def of(found: Sequence[Case], mode: str, unit: str) -> list[Case]:
    return [c for c in found if c.mode == mode and not (unit == "points" and math.isnan(c.points))]


def fitted(found: Sequence[Case]) -> Predictor:
    """The predictor of all modes, fitted on everything; its intervals come from families left out."""
    models = {}
    for (mode, unit), design in DESIGNS.items():
        chosen = of(found, mode, unit)
        models[mode, unit] = fit(design, [c.row(unit, "family") for c in chosen])
    pairs = {c.pair["pair"] for c in found}
    about = {
        "pairs": len(pairs),
        "families": sorted({c.pair["family"] for c in found}),
        "data": sorted({c.pair["data"] for c in found}),
    }
    return Predictor(VERSION, about, models)


# -- validation ---------------------------------------------------------------------------------------------


def predicted(found: Sequence[Case], unit: str, by: str) -> list[Interval]:
    design = DESIGNS[found[0].mode, unit]
    return left_out(design, [c.row(unit, by) for c in found])


def verdict_scores(found: Sequence[Case], nats: Sequence[Interval], by: str) -> list[float]:
    """What says that a merge is bad: the larger of the two predictions, each less its limit, on their scales."""
    known = [c for c in found if not math.isnan(c.points)]
    return worse_of(found, [i.score for i in nats], [i.score for i in predicted(known, "points", by)])


def worse_of(found: Sequence[Case], nats: Sequence[float], points: Sequence[float]) -> list[float]:
    """The larger of two scores, each less its limit; `points` are those of the cases whose points are known."""
    left = iter(points)
    limits = float(lift(BAD_NATS, NATS)), float(lift(BAD_POINTS, POINTS))
    return [
        s - limits[0] if math.isnan(c.points) else max(s - limits[0], next(left) - limits[1])
        for c, s in zip(found, nats, strict=True)
    ]


def inside(case: Case, interval: Interval) -> bool:
    return interval.low - 1e-9 <= case.nats <= interval.high + 1e-9


def clustered(found: Sequence[Case], hits: Sequence[bool], level: float = 0.9) -> float:
    """Two-sided p of the coverage being `level`, with pairs that share a model counted as dependent (variance of
    Aronow, Samii and Assenova 2015, never below that of independent pairs)."""
    from scipy.stats import norm

    e = np.array(hits, float) - level
    models = [{c.pair["model_a"], c.pair["model_b"]} for c in found]
    shared = np.array([[bool(x & y) for y in models] for x in models], float)
    variance = max(float(e @ shared @ e), len(e) * level * (1 - level))
    return float(2 * norm.sf(abs(e.sum()) / variance**0.5))


def ceiling_of_auroc(found: Sequence[Case]) -> float:
    """How well the losses on one half of the test set tell whether the pair is bad on the other half."""
    both = [(c.halves, c.half_points) for c in found if c.halves is not None and c.half_points is not None]
    worst = [max(n[0] / BAD_NATS, p[0] / BAD_POINTS) for n, p in both]
    return area_under_curve(worst, [is_bad(n[1], p[1]) for n, p in both])


def figures(
    found: Sequence[Case],
    scores: Sequence[float],
    intervals: Sequence[Interval] | None,
    verdicts: Sequence[float] | None = None,
) -> list[str]:
    """Cells of one row: pairs, Spearman, its ceiling, AUROC and its ceiling, coverage, median error below 0.5 nats.

    Args:
        verdicts: what the AUROC is of, where it is not `scores`."""
    y, bad = [c.nats for c in found], [c.bad for c in found]
    both = [(c.halves, s) for c, s in zip(found, scores, strict=True) if c.halves is not None]
    ceiling = ranks_agree([h[0] for h, _ in both], [h[1] for h, _ in both]) if len(both) > 2 else math.nan
    enough = min(sum(bad), len(bad) - sum(bad)) >= 10
    auroc, most = (
        (area_under_curve(verdicts or scores, bad), ceiling_of_auroc(found)) if enough else (math.nan, math.nan)
    )
    costly = [v > BAD_NATS for v in y]
    nats = area_under_curve(scores, costly) if min(sum(costly), len(y) - sum(costly)) >= 10 else math.nan
    cells = [str(len(found)), *map(_show, (ranks_agree(scores, y), ceiling, auroc, most, nats))]
    if intervals is not None:
        hits = [inside(c, i) for c, i in zip(found, intervals, strict=True)]
        errors = [abs(i.expected - c.nats) for c, i in zip(found, intervals, strict=True) if c.nats < 0.5]
        cells += [
            f"{np.mean(hits):.3f}",
            f"{clustered(found, hits):.3f}",
            _show(float(np.median(errors)) if errors else math.nan),
            f"{np.mean([i.trusted for i in intervals]):.2f}",
        ]
    return cells


def _show(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


HEADER = (
    *("pairs", "Spearman", "its ceiling", "AUROC", "its ceiling", "AUROC, nats alone"),
    *("coverage", "p(90 %)", "median error < 0.5", "trusted"),
)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(r)} |" for r in rows)])


def parts(found: Sequence[Case]) -> dict[str, list[int]]:
    """Name -> rows: everything, families, data sets, kinds, and ways to merge."""
    out: dict[str, list[int]] = {"all": list(range(len(found)))}
    for name in ("family", "data", "kind"):
        for value in sorted({c.pair[name] for c in found}):
            out[f"{name} {value}"] = [i for i, c in enumerate(found) if c.pair[name] == value]
    for way in ("direct", "match"):
        out[f"way {way}"] = [i for i, c in enumerate(found) if c.assignment == way]
    out["repaired"] = [i for i, c in enumerate(found) if c.repaired]
    return {k: v for k, v in out.items() if len(v) >= 3}


def validation(found: Sequence[Case]) -> str:
    """All tables, as markdown."""
    text = [
        "# How well the predictor does on what it has not seen\n",
        f"{len({c.pair['pair'] for c in found})} pairs, each as it lies and matched (with BatchNorm also repaired), of "
        f"{len({c.pair['family'] for c in found})} families and {len({c.pair['data'] for c in found})} data sets. "
        "Written by `fit.py`. A family (or a data set) is left out altogether, the predictor fitted and its intervals "
        "made from the rest, and asked about the family left out.\n",
        "Ceiling: Spearman's correlation of the barriers on two halves of the test set; that of AUROC: one half's "
        f"losses against the other half's verdict. AUROC: for a loss of more than {BAD_NATS:g} nats or {BAD_POINTS:g} "
        f"point, where each class has 10, by the larger of the two predictions relative to its limit (nats alone: for "
        f"more than {BAD_NATS:g} nats, by the prediction in nats). p: of a coverage of 90 %, "
        "pairs that share a model counted as dependent. Trusted: share of rows that are not refused as unlike all "
        "others; refused ones count in every figure. In the mode weights the match is that of weights alone, measured "
        "at the midpoint; in the mode sketches it is that of the sketches, and the target mergeid's own.\n",
    ]
    for mode in MODES:
        chosen = of(found, mode, "nats")
        for by in ("family", "data"):
            intervals = predicted(chosen, "nats", by)
            every = [i.score for i in intervals], intervals, verdict_scores(chosen, intervals, by)
            rows = [
                [name, *figures([chosen[i] for i in at], *([of_all[i] for i in at] for of_all in every))]
                for name, at in parts(chosen).items()
            ]
            text += [f"\n## Mode {mode}, every {by.replace('data', 'data set')} left out in turn\n"]
            text += [markdown(("", *HEADER), rows)]
        text += ["\n" + _points(of(found, mode, "points"))]
    text += ["\n## Beside others, every family left out in turn\n", _rivals(found)]
    return "\n".join(text) + "\n"


def _points(chosen: Sequence[Case]) -> str:
    intervals = predicted(chosen, "points", "family")
    inside_share = coverage([c.row("points", "family") for c in chosen], intervals)
    agreed = ranks_agree([i.score for i in intervals], [c.points for c in chosen])
    error = np.median([abs(i.expected - c.points) for c, i in zip(chosen, intervals, strict=True)])
    return (
        f"Accuracy points ({chosen[0].mode}, by family): Spearman {agreed:.3f}, coverage {inside_share:.3f}, median "
        f"error {error:.2f} points."
    )


def _rivals(found: Sequence[Case]) -> str:
    chosen = of(found, "inputs", "nats")
    intervals = predicted(chosen, "nats", "family")
    everyone = {
        "mergeid, inputs": ([i.score for i in intervals], verdict_scores(chosen, intervals, "family")),
    }
    for name in RIVALS:
        nats, points = (rival_scores(name, chosen, unit) for unit in ("nats", "points"))
        everyone[name] = nats, worse_of(chosen, nats, points)
    groups = {k: v for k, v in parts(chosen).items() if k.split()[0] in ("all", "kind", "way")}
    rows = []
    folds = [
        [i for i, c in enumerate(chosen) if c.pair["family"] == f] for f in sorted({c.pair["family"] for c in chosen})
    ]
    for name, (scores, verdicts) in everyone.items():
        by_fold = [ranks_agree([scores[i] for i in at], [chosen[i].nats for i in at]) for at in folds if len(at) >= 5]
        cells = [name, _show(float(np.nanmean(by_fold)) if by_fold else math.nan)]
        for at in groups.values():
            part = figures([chosen[i] for i in at], [scores[i] for i in at], None, [verdicts[i] for i in at])
            cells.append(f"{part[1]} / {part[3]}")
        rows.append(cells)
    return (
        "Spearman / AUROC, rivals fitted alike; by fold: the mean over families of Spearman inside each.\n\n"
        + markdown(("", "by fold", *groups), rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=HERE / "pairs.csv")
    parser.add_argument("--features", type=Path, default=HERE / "features.csv")
    parser.add_argument("--out", type=Path, default=HERE / "validation.md")
    parser.add_argument("--coefficients", type=Path, default=HERE.parents[1] / "mergeid" / "predict" / FILE)
    options = parser.parse_args()
    found = cases(options.pairs, options.features)
    options.coefficients.write_text(json.dumps(fitted(found).to_json(), indent=1) + "\n", encoding="utf-8")
    text = validation(found)
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
