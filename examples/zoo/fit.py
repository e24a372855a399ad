"""Fit mergeid's predictor to the zoo.

    python examples/zoo/fit.py

reads pairs.csv, features.csv and midpoints.csv, here and in `wider/`, and writes the coefficients that ship with the
package (mergeid/prediction/coefficients.json). Nothing is trained or run. `validation.py` says how well it does on what
it has not seen.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pairs_table as table
from measuring import excess
from tasks import shape
from trials import ABOUT, LOST

from mergeid.prediction.fitting import Design, Row, fit
from mergeid.prediction.model import FILE, WAYS, Predictor, Term
from mergeid.prediction.worth import Shares

HERE = Path(__file__).parent
VERSION = "10"
WIDER, FROM_WIDER = HERE / "wider", 1000
"""The wider zoo, and how many of its pairs are fitted, in the order they were made; later ones are fresh."""
NATS, POINTS = 0.02, 1.0
"""Scales of the targets: differences far below them do not matter."""
MODES = ("inputs", "weights", "sketches", "trial")
GAINS = {"inputs": 0.0, "sketches": 0.0, "trial": 0.5, "weights": 0.0}
"""How much what is gained counts beside what is lost: a barrier tells nothing of it. Chosen with the terms: of trials a
half ranked gains and losses best (Spearman 0.937; 0.933 by 1, 0.905 by 0), and losses alone nearly as well as 0 (0.909,
0.911) on the 1,437 pairs tried first."""
LEAST = 30
"""Rows that a way is fitted to at least."""
COLLAPSED = {"inputs": 0.02, "sketches": 0.02, "trial": 0.02, "weights": 1e-4}
"""What a network tells of its inputs at least, of the most that it could: on random inputs trained ones say little."""
APART_LEAST = 1e-3
"""Nats that both networks together differ by at least from either, where their gain is looked at."""
WAY = {"direct": "direct", "match": "matched"}
REPAIRED = {"direct_repair": "repaired", "match_repair": "repaired"}
TRIED = {**WAY, **REPAIRED, "solved": "solved", "leaning": "leaning"}
"""Way in trials.csv -> way of merging."""

LINEAR = 10.0
"""Scale of a feature, of the order of 1, that enters as it is."""
EXCESS, SHIFT, SHARP = Term("excess", NATS, capped=True), Term("shift", None), Term("shift_sharp", NATS)
UNSURE, APART, COSINE = Term("own_entropy", NATS), Term("divergence", NATS), Term("cosine", LINEAR, sign=-1)
AVERAGED, FAR = Term("excess_averaged", 10 * NATS, sign=-1), Term("distance_worst", LINEAR)
CAPPED_SHIFT, MOVED = Term("shift", NATS, capped=True), Term("shift", NATS)
COARSE, GAP, DROP = Term("excess", 10 * NATS, capped=True), Term("gap", LINEAR), Term("drop", 0.01)
GAINED = Term("excess_averaged", LINEAR, sign=-1)
FAR_APART = Term("divergence", 10 * NATS)
HARD, SOFT = Term("hard", 5 * NATS), Term("soft", NATS / 4)
WITH_INPUTS, FROM_WEIGHTS = (EXCESS, SHIFT, AVERAGED, UNSURE, COSINE), (EXCESS, CAPPED_SHIFT, FAR)
TERMS = {
    ("inputs", "nats"): (WITH_INPUTS, (SHARP,)),
    ("inputs", "points"): (WITH_INPUTS, (SHARP,)),
    ("weights", "nats"): (FROM_WEIGHTS, (APART,)),
    ("weights", "points"): (FROM_WEIGHTS, (APART,)),
    ("trial", "nats"): ((*WITH_INPUTS, HARD, SOFT), (SHARP, FAR_APART)),
    ("sketches", "nats"): ((COARSE, GAP, GAINED), (MOVED,)),
    ("sketches", "points"): ((COARSE, DROP, GAP, GAINED), (MOVED,)),
}
"""(mode, unit) -> terms of the prediction and of the scale of its error. Chosen among thousands of combinations by
Spearman and AUROC on families left out (of the first 1,005 pairs), so that what they reach there flatters them. Every
way has weights of its own."""


@dataclass(frozen=True)
class Case:
    """One pair of the zoo under one assignment and repair, in one mode.

    Attributes:
        way: of `mergeid.prediction.model.WAYS`.
        nats: at most what a uniform guess loses, beyond which nothing is predicted; of solved merges the loss at the
            midpoint beyond the mean of both models'; after a trial so of all, negative where it is less.
        halves, half_points: the same on two halves of the test set; None where they were not measured.
    """

    pair: Mapping[str, str]
    mode: str
    assignment: str
    repaired: bool
    way: str
    features: Mapping[str, float]
    nats: float
    points: float
    halves: tuple[float, float] | None
    half_points: tuple[float, float] | None

    def row(self, unit: str) -> Row:
        """Grouped by architecture: what is exchangeable with a new kind of network."""
        return Row(self.features, self.nats if unit == "nats" else self.points, self.pair["family"])


def design(mode: str, unit: str) -> Design:
    return Design(unit, NATS if unit == "nats" else POINTS, *TERMS[mode, unit], COLLAPSED[mode], GAINS[mode])


def cases(folder: Path) -> list[Case]:
    """Everything that is both measured and described."""
    measured = {r["pair"]: r for r in table.read(folder / "pairs.csv")}
    found = []
    for record in table.read(folder / "features.csv"):
        pair = measured.get(record["pair"])
        if pair is None:
            continue
        mode, assignment, repaired = record["mode"], record["assignment"], record["repaired"] == "1"
        if repaired and (pair["repair"] != "bn" or mode == "weights"):
            continue
        values = {k: float(v) for k, v in list(record.items())[4:] if v}
        most = values["uniform"] = math.log(shape(pair["data"]).classes)
        curve = assignment + ("_repair" if repaired else "")
        if mode == "weights" and assignment == "match":
            # the match without data was measured at the midpoint alone
            ends, middles = table.numbers(pair["loss_direct"]), float(pair["none_match"])
            nats, points, halves, split = max(0.0, middles - (ends[0] + ends[-1]) / 2), math.nan, None, None
        else:
            nats, points = float(pair[f"barrier_{curve}"]), float(pair[f"points_{curve}"])
            halves, split = table.halves(pair, curve), _half_points(pair, curve)
        way = "repaired" if repaired else WAY[assignment]
        found.append(Case(pair, mode, assignment, repaired, way, values, min(nats, most), points, halves, split))
    return found + _solved(found, table.read(folder / "midpoints.csv")) + _tried(folder, measured)


@dataclass(frozen=True)
class Known:
    """Cases, and rows of midpoints.csv."""

    cases: list[Case]
    midpoints: list[dict[str, str]]


def known() -> Known:
    """All that is fitted: the zoo, and the first pairs of the wider one."""
    return both_zoos(FROM_WIDER)


def both_zoos(wider: int | None = None) -> Known:
    """The zoo and the wider one, or that many of its first pairs."""
    first = {r["pair"] for r in table.read(WIDER / "pairs.csv")[:wider]}
    midpoints = [r for r in table.read(WIDER / "midpoints.csv") if r["pair"] in first]
    wider = [c for c in cases(WIDER) if c.pair["pair"] in first]
    return Known(cases(HERE) + wider, table.read(HERE / "midpoints.csv") + midpoints)


def _solved(found: Sequence[Case], midpoints: Sequence[Mapping[str, str]]) -> list[Case]:
    """Solved merges, described as the way that looks best is."""
    known: dict[tuple[str, str], list[Case]] = {}
    for c in found:
        if c.mode != "weights":
            known.setdefault((c.pair["pair"], c.mode), []).append(c)
    out = []
    for row in midpoints:
        for mode in ("inputs", "sketches"):
            ways = known.get((row["pair"], mode))
            if ways and row["loss_solved"]:
                best = min(ways, key=lambda c: c.features["excess"])
                nats, points, *halves = (
                    max(0.0, float(row[f"{k}_solved"])) for k in ("loss", "points", "half", "other")
                )
                nats = min(nats, best.features["uniform"])
                new = replace(best, way="solved", nats=nats, points=points, half_points=None)
                out.append(replace(new, halves=(halves[0], halves[1])))
    return out


def _tried(folder: Path, measured: Mapping[str, Mapping[str, str]]) -> list[Case]:
    """Merges that were made and run, and what they lose at the midpoint."""
    out = []
    for row in table.read(folder / "trials.csv"):
        if row["way"] not in TRIED or row["pair"] not in measured:
            continue
        features = {k: float(v) for k, v in list(row.items())[len(ABOUT + LOST) :] if v}
        most = features["uniform"]
        truth, half, other = (min(max(-most, float(row[k])), most) for k in ("loss", "half", "other"))
        way = row["best" if TRIED[row["way"]] in ("solved", "leaning") else "way"]
        assignment, repaired = way.removesuffix("_repair"), way.endswith("_repair")
        pair, kind = measured[row["pair"]], TRIED[row["way"]]
        out.append(Case(pair, "trial", assignment, repaired, kind, features, truth, math.nan, (half, other), None))
    return out


def _half_points(pair: Mapping[str, str], curve: str) -> tuple[float, float]:
    whole, half = table.numbers(pair[f"accuracy_{curve}"]), table.numbers(pair[f"accuracy_half_{curve}"])
    one, two = (100 * excess(-values) for values in (half, 2 * whole - half))
    return one, two


def of(found: Sequence[Case], mode: str, unit: str, way: str | None = None) -> list[Case]:
    return [
        c for c in found if c.mode == mode and way in (None, c.way) and not (unit == "points" and math.isnan(c.points))
    ]


def fitted(found: Sequence[Case], midpoints: Sequence[Mapping[str, str]]) -> Predictor:
    """The predictor of all modes and ways, fitted on everything; its intervals come from networks left out."""
    models = {}
    for mode in MODES:
        for unit in ("nats", "points"):
            for way in WAYS:
                chosen = of(found, mode, unit, way)
                if len(chosen) >= LEAST:
                    models[mode, unit, way] = fit(design(mode, unit), [c.row(unit) for c in chosen])
    about = {
        "pairs": len({c.pair["pair"] for c in found}),
        "families": sorted({c.pair["family"] for c in found}),
        "data": sorted({c.pair["data"] for c in found}),
    }
    return Predictor(VERSION, about, models, ensemble(midpoints))


def ensemble(midpoints: Sequence[Mapping[str, str]]) -> Shares:
    """What running both networks gained over the better one, over what they say without labels: quantiles."""
    ratios = []
    for row in midpoints:
        told = min(float(row["apart_a"]), float(row["apart_b"]))
        if told > APART_LEAST:
            ratios.append((min(float(row["loss_a"]), float(row["loss_b"])) - float(row["loss_both"])) / told)
    if len(ratios) < LEAST:
        return Shares()
    low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    return Shares(float(middle), float(low), float(high))


def text_of(predictor: Predictor) -> str:
    """JSON with one line for a list of numbers."""
    plain = json.dumps(predictor.to_json(), indent=1)
    return re.sub(r"\[[-\d.,e\s]+\]", lambda found: re.sub(r"\s+", "", found[0]), plain) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coefficients", type=Path, default=HERE.parents[1] / "mergeid" / "prediction" / FILE)
    options = parser.parse_args()
    rows = known()
    options.coefficients.write_text(text_of(fitted(rows.cases, rows.midpoints)), encoding="utf-8")


if __name__ == "__main__":
    main()
