"""How well mergeid's predictor does on what it has not seen: validation.md.

    python examples/zoo/validation.py

Nothing is trained or run: a family (or a data set) is left out altogether, the predictor fitted and its intervals made
from the rest, and asked about what was left out. All pairs take part, also those that the coefficients that ship were
not fitted to.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fit import HERE, LEAST, MODES, Case, both_zoos, design, of
from midpoints import FEW
from rivals import RIVALS, rival_scores

from mergeid.prediction.fitting import area_under_curve, fit, ranks_agree
from mergeid.prediction.labels import Measured, corrected
from mergeid.prediction.model import WAYS, Interval, start

BAD = {"direct": 0.05, "matched": 0.05, "repaired": 0.05, "solved": 0.01, "leaning": 0.01}
"""A merge is bad that loses more nats, of this way by itself; all ways together by 0.05."""
TOLERATED = (0.01, 0.05)
LEVEL = 0.9
CLASSES = 10
"""Good and bad pairs that an AUROC is of at least."""


@dataclass(frozen=True)
class Said:
    """What was said of one case by a predictor that had not seen its like.

    Attributes:
        within: chances of at most the losses of `TOLERATED`.
    """

    case: Case
    interval: Interval
    within: tuple[float, ...]

    @property
    def held(self) -> bool:
        return self.interval.low - 1e-9 <= self.case.nats <= self.interval.high + 1e-9


def said(found: Sequence[Case], mode: str, by: str) -> list[Said]:
    """Every way by itself, every family (or data set) left out in turn."""
    out = []
    for way in WAYS:
        chosen = of(found, mode, "nats", way)
        if len(chosen) < LEAST:
            continue
        rows = [c.row("nats") for c in chosen]
        for name in sorted({c.pair[by] for c in chosen}):
            model = fit(design(mode, "nats"), [r for r, c in zip(rows, chosen, strict=True) if c.pair[by] != name])
            for case in chosen:
                if case.pair[by] == name:
                    each = [model.predict(case.features, level=LEVEL, tolerated=t) for t in TOLERATED]
                    out.append(Said(case, each[0], tuple(0.0 if i.within is None else i.within for i in each)))
    return out


def p_of(rows: Sequence[Said], level: float = LEVEL) -> float:
    """Two-sided p of the coverage being `level`, with pairs that share a model counted as dependent (variance of
    Aronow, Samii and Assenova 2015, never below that of independent pairs)."""
    from scipy.stats import norm

    e = np.array([r.held for r in rows], float) - level
    models = [{r.case.pair["model_a"], r.case.pair["model_b"]} for r in rows]
    shared = np.array([[bool(x & y) for y in models] for x in models], float)
    variance = max(float(e @ shared @ e), len(e) * level * (1 - level))
    return float(2 * norm.sf(abs(e.sum()) / variance**0.5))


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected after Holm (1979)."""
    out, largest = {}, 0.0
    for k, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(values) - k) * p))
        out[name] = largest
    return out


def figures(rows: Sequence[Said], limit: float) -> list[str]:
    """Cells of one row of the table."""
    truth, scores = [r.case.nats for r in rows], [r.interval.score for r in rows]
    both = [r.case.halves for r in rows if r.case.halves is not None]
    ceiling = ranks_agree([h[0] for h in both], [h[1] for h in both]) if len(both) > 2 else math.nan
    bad = [t > limit for t in truth]
    enough = min(sum(bad), len(bad) - sum(bad)) >= CLASSES
    errors = [abs(r.interval.expected - r.case.nats) for r in rows if r.case.nats < 0.5]
    return [
        str(len(rows)),
        *map(show, (ranks_agree(scores, truth), ceiling, area_under_curve(scores, bad) if enough else math.nan)),
        f"{np.mean([r.held for r in rows]):.3f}",
        f"{p_of(rows):.3f}",
        show(float(np.median(errors)) if errors else math.nan),
        f"{np.mean([not r.interval.trusted for r in rows]):.3f}",
    ]


def limit_of(name: str) -> float:
    """Nats beyond which a merge of this part is bad."""
    return next((BAD[w] for w in WAYS if f"way {w}" in name), 0.05)


HEADER = ("", "n", "Spearman", "its ceiling", "AUROC", "coverage", "p(90 %)", "median error < 0.5", "untrusted")


def show(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(r)} |" for r in rows)])


def parts(rows: Sequence[Said]) -> dict[str, list[Said]]:
    """Name -> rows: everything, ways, ways by start, kinds, families and data sets."""
    out = {"all": list(rows)}
    for way in WAYS:
        own = [r for r in rows if r.case.way == way]
        out[f"way {way}"] = own
        for kind in ("shared", "apart"):
            out[f"way {way}, {kind} start"] = [r for r in own if start(r.case.features) == kind]
    for name in ("kind", "family", "data"):
        for value in sorted({r.case.pair[name] for r in rows}):
            out[f"{name} {value}"] = [r for r in rows if r.case.pair[name] == value]
    return {k: v for k, v in out.items() if len(v) >= 3}


def rejected(rows: Sequence[Said], by: str) -> str:
    """Which of the families (data sets) left out are covered by other than 90 %, way by way and together."""
    lines = []
    for way in (*WAYS, "all ways"):
        chosen = [r for r in rows if way in (r.case.way, "all ways")]
        names = sorted({r.case.pair[by] for r in chosen})
        if not names:
            continue
        p = holm({n: p_of([r for r in chosen if r.case.pair[by] == n]) for n in names})
        least = min(p, key=lambda n: p[n])
        lines.append(f"{way}: {sum(v < 0.05 for v in p.values())} of {len(names)} (least {p[least]:.3f}, {least})")
    return f"Rejected at 0.05 after Holm: {'; '.join(lines)}."


def reliability(rows: Sequence[Said], by: str) -> str:
    """What `within` says and how often it is so, in fifths."""
    head = ("within", *(f"{k / 5:g} to {(k + 1) / 5:g}" for k in range(5)))
    cells = []
    for at, limit in enumerate(TOLERATED):
        for way in (*WAYS, "all ways"):
            own = [r for r in rows if way in (r.case.way, "all ways")]
            if own:
                bins = [[r for r in own if min(int(5 * r.within[at]), 4) == k] for k in range(5)]
                cells.append([f"{limit:g} nats, {way}", *(_bin(b, at, limit, by) for b in bins)])
    return markdown(head, cells)


def _bin(rows: Sequence[Said], at: int, limit: float, by: str) -> str:
    if not rows:
        return "–"
    true = [r.case.nats <= limit for r in rows]
    groups = [np.mean([t for t, r in zip(true, rows, strict=True) if r.case.pair[by] == g])
              for g in sorted({r.case.pair[by] for r in rows})]  # fmt: skip
    return f"{np.mean([r.within[at] for r in rows]):.2f} / {np.mean(true):.2f} / {np.mean(groups):.2f} ({len(rows)})"


PARTNERS, REGRET = 4, 0.01
"""Partners that a model has at least to be ranked, and nats that the one predicted best may lose more than the best."""


def ranking(rows: Sequence[Said]) -> str:
    """Of the partners of one model, how much more the one that is predicted best loses than the one that is best, each
    merged in the way that is predicted (or is) best."""
    known: dict[str, dict[str, list[Said]]] = {}
    for r in rows:
        if r.case.way not in ("solved", "leaning"):
            a, b = (f"{r.case.pair['model_a']}", f"{r.case.pair['model_b']}*{r.case.pair['scramble']}")
            known.setdefault(a, {}).setdefault(b, []).append(r)
            known.setdefault(b, {}).setdefault(a, []).append(r)
    lost, shared, families = [], [], set()
    for partners in known.values():
        if len(partners) < PARTNERS:
            continue
        each = [min(own, key=lambda r: r.interval.score) for own in partners.values()]
        best = min(r.case.nats for own in partners.values() for r in own)
        chosen = min(each, key=lambda r: r.interval.score)
        lost.append(chosen.case.nats - best)
        families.add(chosen.case.pair["family"])
        near = [r for r in each if start(r.case.features) == "shared"]
        if len(near) >= PARTNERS:
            least = min(r.case.nats for r in near)
            shared.append(min(near, key=lambda r: r.interval.score).case.nats - least)
    if not lost:
        return ""
    text = (
        f"Ranking the partners of one model ({PARTNERS} or more; {len(lost)} models of {len(families)} families): the "
    )
    text += f"one predicted best loses at most {REGRET:g} nats more than the best one in {_share(lost)}"
    return text + (f", of partners from one start alone in {_share(shared)} of {len(shared)}." if shared else ".")


def _share(lost: Sequence[float]) -> str:
    return f"{np.mean([x <= REGRET for x in lost]):.1%} (mean {np.mean(lost):.4f})"


Tried = Mapping[tuple[str, str], Said]
"""(pair, way in midpoints.csv) -> what is said of it after a trial, its family left out."""


def rivals(ours: Sequence[Said], tried: Tried) -> str:
    """Spearman and AUROC (0.05 nats) beside others, every family left out in turn."""
    chosen = [r.case for r in ours if r.case.way != "solved"]
    everyone = {"mergeid, inputs": [r.interval.score for r in ours if r.case.way != "solved"]}
    everyone |= {name: rival_scores(name, chosen, "nats") for name in RIVALS}
    kinds = sorted({c.pair["kind"] for c in chosen})
    rows = [[name, *_against(chosen, scores, kinds)] for name, scores in everyone.items()]
    some = [(r, tried[key]) for r in ours if (key := (r.case.pair["pair"], _column(r.case))) in tried]
    if len(some) >= LEAST:
        same = [r.case for r, _ in some]
        scored = {
            "mergeid, inputs": [r.interval.score for r, _ in some],
            "one pass of the merge, hard pseudo-labels": [t.case.features["hard"] for _, t in some],
            "mergeid, after that pass (`--try`)": [t.interval.score for _, t in some],
        }
        rows += [[f"of {len(some)}: {name}", *_against(same, scores, kinds)] for name, scores in scored.items()]
    return markdown(("", "all", *kinds, *(f"way {w}" for w in WAYS)), rows)


def _against(found: Sequence[Case], scores: Sequence[float], kinds: Sequence[str]) -> list[str]:
    def cell(at: Sequence[int]) -> str:
        if len(at) < 3:
            return "–"
        own, truth = [scores[i] for i in at], [found[i].nats for i in at]
        return f"{show(ranks_agree(own, truth))} / {show(area_under_curve(own, [t > 0.05 for t in truth]))}"

    groups = [range(len(found)), *([i for i, c in enumerate(found) if c.pair["kind"] == k] for k in kinds)]
    groups += [[i for i, c in enumerate(found) if c.way == w] for w in WAYS]
    return [cell(g) for g in groups]


def solved_limits(rows: Sequence[Said], tried: Tried, midpoints: Sequence[Mapping[str, str]]) -> str:
    """AUROC of what can be known of a solved merge before it is measured: said without making it, and, once it is made,
    by a run of it with or without labels. The last row is what the measurement itself can tell."""
    measured = {m["pair"]: m for m in midpoints if m.get("half_solved")}
    own = [r for r in rows if r.case.pair["pair"] in measured and (r.case.pair["pair"], "solved") in tried]
    own = [r for r in own if r.case.way == "solved"]
    of_pair = [measured[r.case.pair["pair"]] for r in own]
    after = [tried[r.case.pair["pair"], "solved"] for r in own]

    def column(name: str) -> list[float]:
        return [float(m[name]) for m in of_pair]

    whole = column("loss_solved")
    known: dict[str, tuple[list[float], list[float]]] = {
        "predicted, no merge made": ([r.interval.score for r in own], whole),
        "made and run, hard pseudo-labels": ([t.case.features["hard"] for t in after], whole),
        "predicted, made and run (`--try`)": ([t.interval.score for t in after], whole),
        "made and run, 64 labels": (column("few_solved"), whole),
        "half of the test set, for the other half": (column("half_solved"), column("other_solved")),
    }
    cells = [
        [name, *(show(area_under_curve(scores, [t > limit for t in truth])) for limit in TOLERATED)]
        for name, (scores, truth) in known.items()
    ]
    return markdown((f"of {len(own)} solved merges", *(f"AUROC, {limit:g} nats" for limit in TOLERATED)), cells)


def with_labels(rows: Sequence[Said], midpoints: Sequence[Mapping[str, str]]) -> str:
    """Spearman of what a merge loses or gains at the midpoint, on all test examples but `FEW`: of what is predicted, of
    what the labels of these few say, and of both together (`mergeid.prediction.labels`); of all, by kind and by way."""
    measured = {m["pair"]: m for m in midpoints}
    kinds: dict[str, list[tuple[float, float, float, float, float, float]]] = {}
    for r in rows:
        row, column = measured.get(r.case.pair["pair"], {}), _column(r.case)
        if row.get(f"few_{column}"):
            few, error, rest, half, other = (
                float(row[f"{k}_{column}"]) for k in ("few", "few_error", "rest", "half", "other")
            )
            own = r.interval
            both = corrected(
                Measured(few, error, FEW), own.expected, own.low, own.high, most=r.case.features["uniform"]
            )
            found = (rest, own.score, few, both.expected, half, other)
            for name in ("all", r.case.pair["kind"], f"{r.case.pair['kind']}, {r.case.way}"):
                kinds.setdefault(name, []).append(found)
    cells = []
    for name, values in sorted(kinds.items()):
        if len(values) >= LEAST:
            rest, score, few, both, half, other = zip(*values, strict=True)
            ceiling, reached = ranks_agree(half, other), ranks_agree(both, rest)
            alone = (ranks_agree(score, rest), ranks_agree(few, rest))
            cells.append([name, str(len(values)), *map(show, (*alone, reached, ceiling, reached / ceiling))])
    head = ("", "n", "predicted, no labels", f"{FEW} labels alone", "both", "ceiling", "both / ceiling")
    return markdown(head, cells)


def _column(case: Case) -> str:
    """Its name in midpoints.csv."""
    return case.way if case.way in ("solved", "leaning") else case.assignment + ("_repair" if case.repaired else "")


def written(found: Sequence[Case], midpoints: Sequence[Mapping[str, str]]) -> str:
    """All tables, as markdown."""
    pairs = {c.pair["pair"] for c in found}
    solved = {c.pair["pair"] for c in found if c.way == "solved"}
    text = [
        "# How well the predictor does on what it has not seen\n",
        f"{len(pairs)} pairs of {len({c.pair['family'] for c in found})} families and "
        f"{len({c.pair['data'] for c in found})} data sets, as they lie, matched, with BatchNorm repaired, and "
        f"({len(solved)} pairs so far) solved. Written by `validation.py`. A family (or a data set) is left out "
        "altogether, the predictor fitted and its intervals made from the rest, and asked about what was left out.\n",
        "Nats are of the barrier on eleven points, of solved merges of the midpoint's loss beyond the mean of both "
        "models', at most what a uniform guess loses (of 1.6 % of the merges it is more). After a trial they are of "
        "every merge's midpoint, negative where it gains. Ceiling: Spearman of two "
        "halves of the test set. AUROC: more than 0.05 nats, of solved merges by themselves more than 0.01, where each "
        f"class has {CLASSES}. p: of a coverage of 90 %, pairs that share a model counted as dependent. Untrusted rows "
        "count in every figure. `within`: said / true, every pair alike / true, every family (or set) alike (pairs).\n",
    ]
    of_mode: dict[str, list[Said]] = {}
    for mode in MODES:
        for by in ("family", "data"):
            rows = said(found, mode, by)
            tables = [[name, *figures(own, limit_of(name))] for name, own in parts(rows).items()]
            text += [f"\n## Mode {mode}, every {by.replace('data', 'data set')} left out in turn\n"]
            text += [markdown(HEADER, tables), "\n" + rejected(rows, by) + "\n", reliability(rows, by)]
            text += ["\n" + ranking(rows)]
            if by == "family":
                of_mode[mode] = rows
    tried = {(r.case.pair["pair"], _column(r.case)): r for r in of_mode["trial"]}
    beside = rivals(of_mode["inputs"], tried)
    solved_best = solved_limits(of_mode["inputs"], tried, midpoints)
    text += ["\n## Beside others, every family left out in turn\n", "Spearman / AUROC, rivals fitted alike.\n", beside]
    text += ["\n## What can be known of a solved merge\n", solved_best]
    text += [
        f"\n## With {FEW} labels, every family left out in turn\n",
        "Spearman of what a merge loses or gains at the midpoint, on all test examples but those with the labels. "
        "Ceiling: one half of the test set for the other.\n",
        with_labels(of_mode["inputs"], midpoints),
        f"\n## With {FEW} labels after a trial, every family left out in turn\n",
        with_labels(of_mode["trial"], midpoints),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "validation.md")
    options = parser.parse_args()
    rows = both_zoos()
    text = written(rows.cases, rows.midpoints)
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
