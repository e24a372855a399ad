"""What the table holds, in figures: pairs by family and kind, the distribution of barriers, mergeid's decisions.

python examples/zoo/report.py        # summary.md and barriers.png from pairs.csv; nothing is trained
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pairs_table as table
from pairs_table import Row
from recipes import KINDS
from scipy.stats import spearmanr

HERE = Path(__file__).parent
HARD = (0.02, 1.0)
"""Barriers in nats between which a pair's fate is not plain."""
CLOSE = 0.01
"""Nats that two merges may differ by and count as equal."""
FLIPPED = """Test loss at the midpoint with one space's decision turned round, minus the loss with all spaces as decided
(512 inputs, before the last look), in nats. Worse, better: by more than {:g} nats."""
POOR = """Matched by activations alone on few inputs, which parts many neurons that correspond (`weak.py`). Better: by
more than {0:g} nats at the midpoint, on the test set. Always direct, always match, mergeid: share of pairs within
{0:g} nats of the better of the two."""
COLOURS = {"direct": "#c44e52", "match": "#4c72b0"}


def values(rows: Iterable[Row], column: str) -> np.ndarray:
    """The numbers of a column, rows without one left out."""
    return np.array([float(r[column]) for r in rows if r[column]])


def hard(rows: Iterable[Row]) -> float:
    """Share of pairs whose barrier lies within `HARD`, as they are or matched (unrepaired)."""
    found = [any(HARD[0] <= float(r[f"barrier_{c}"]) <= HARD[1] for c in ("direct", "match")) for r in rows]
    return float(np.mean(found)) if found else float("nan")


def ceiling(rows: Sequence[Row], curve: str) -> float:
    """Spearman correlation of the barriers on the two halves of the test sets."""
    halves = np.array([table.halves(r, curve) for r in rows if r[f"loss_{curve}"]])
    return float(spearmanr(halves[:, 0], halves[:, 1]).statistic) if len(halves) > 2 else float("nan")


def middles(row: Row, evidence: str) -> dict[str, float]:
    """Midpoint test losses (nats) of the merge as they are, matched, and of mergeid's own, as mergeid would write them.

    Args:
        evidence: "512" calibration inputs, "64", or "none".
    """
    if evidence != "512":
        return {c: float(row[f"{evidence}_{c}"]) for c in ("direct", "match", "auto")}
    suffix = "_repair" if row["repair"] == "bn" else ""
    curves = {"direct": "direct" + suffix, "match": "match" + suffix, "auto": "auto"}
    return {c: float(table.numbers(row[f"loss_{name}"])[5]) for c, name in curves.items()}


def worse(rows: Iterable[Row], evidence: str) -> list[tuple[Row, float]]:
    """Pairs that mergeid's own merge loses more than `CLOSE` on, against the better of the other two, worst first."""
    found = []
    for row in rows:
        m = middles(row, evidence)
        found.append((row, m["auto"] - min(m["direct"], m["match"])))
    return sorted(((r, loss) for r, loss in found if loss > CLOSE), key=lambda item: -item[1])


def summary(rows: Sequence[Row]) -> str:
    """Markdown."""
    text = ["# Pairs", ""]
    families = sorted({r["family"] for r in rows})
    body = []
    for family in families:
        counts = [sum(r["family"] == family and r["kind"] == k for r in rows) for k in KINDS]
        data = ", ".join(sorted({r["data"] for r in rows if r["family"] == family}))
        body.append([family, data, *map(str, counts), str(sum(counts))])
    totals = [sum(r["kind"] == k for r in rows) for k in KINDS]
    body.append(["all", "", *map(str, totals), str(len(rows))])
    text += [*_markdown(["family", "data", *KINDS, "all"], body), "", "# Barriers in nats", ""]
    within = f"between {HARD[0]:g} and {HARD[1]:g} nats"
    text += [f"{hard(rows):.0%} of the pairs have a barrier {within}, as they are or matched.", ""]
    body = []
    for kind in (*KINDS, "all"):
        chosen = [r for r in rows if kind in ("all", r["kind"])]
        for curve in table.CURVES:
            found = values(chosen, f"barrier_{curve}")
            if len(found):
                quantiles = [f"{q:.3f}" for q in np.quantile(found, [0.1, 0.25, 0.5, 0.75, 0.9])]
                within = np.mean((found >= HARD[0]) & (found <= HARD[1]))
                body.append(
                    [kind, curve, str(len(found)), *quantiles, f"{within:.0%}", f"{ceiling(chosen, curve):.3f}"]
                )
    heads = ["kind", "merge", "pairs", "10 %", "25 %", "50 %", "75 %", "90 %", f"{HARD[0]:g} to {HARD[1]:g}", "ceiling"]
    text += [
        *_markdown(heads, body),
        "",
        "Ceiling: rank correlation of the barriers on two halves of the test set.",
        "",
    ]
    text += ["# Decisions", ""]
    body = []
    for evidence in ("512", "64", "none"):
        lost = worse(rows, evidence)
        share = 1 - len(lost) / max(len(rows), 1)
        names = "; ".join(f"{r['pair']} ({loss:.3f})" for r, loss in lost[:5])
        body.append([evidence, f"{share:.1%}", str(len(lost)), names])
    heads = ["calibration inputs", f"within {CLOSE:g} nats of the better", "worse", "the worst (nats at the midpoint)"]
    text += [*_markdown(heads, body), ""]
    return "\n".join(text)


def poor(rows: Sequence[Row]) -> str:
    """Decisions where the match is poor, beside the constant rules, in Markdown."""
    text = ["# Decisions between the plain merge and a poor match", "", POOR.format(CLOSE), ""]
    body = []
    for inputs in sorted({r["inputs"] for r in rows}, key=int, reverse=True):
        for name, kinds in (
            ("all", KINDS),
            ("split, fine-tunes", ("split", "fine-tunes")),
            *((k, (k,)) for k in KINDS),
        ):
            chosen = [r for r in rows if r["inputs"] == inputs and r["kind"] in kinds]
            if not chosen:
                continue
            direct, match, auto = (values(chosen, c) for c in ("direct", "match", "auto"))
            good = np.minimum(direct, match) + CLOSE
            shares = [direct < match - CLOSE, match < direct - CLOSE, direct <= good, match <= good, auto <= good]
            body.append([inputs, name, str(len(chosen)), *(f"{np.mean(s):.1%}" for s in shares)])
    heads = ["inputs", "kind", "pairs", "direct better", "match better", "always direct", "always match", "mergeid"]
    return "\n".join([*text, *_markdown(heads, body), ""])


def flips(rows: Sequence[Row]) -> str:
    """What flipping single decisions did, in Markdown."""
    text = ["# Decisions flipped one at a time", "", FLIPPED.format(CLOSE), ""]
    body = []
    found = [r for r in rows if r["space"]]
    for name in ("direct to match", "match to direct", "all"):
        chosen = [r for r in found if name in ("all", f"{_choice(r['flipped_to'])} to {r['flipped_to']}")]
        if not chosen:
            continue
        worse_by = values(chosen, "worse_by")
        shares = [np.mean(worse_by > CLOSE), np.mean(worse_by < -CLOSE)]
        quantiles = [f"{q:.4f}" for q in np.quantile(worse_by, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])]
        body.append([name, str(len(chosen)), *(f"{s:.1%}" for s in shares), *quantiles])
    heads = ["flip", "spaces", "worse", "better", "least", "5 %", "25 %", "50 %", "75 %", "95 %", "most"]
    text += [*_markdown(heads, body), ""]
    pairs = {r["pair"]: r for r in rows}.values()
    spaces, settled, unknown = (sum(int(r[c]) for r in pairs) for c in ("spaces", "settled", "unknown"))
    text += [
        f"Drawn from {spaces} spaces of {len(pairs)} pairs; in {settled} of them the match is the identity, so that "
        f"there is nothing to flip, and in {unknown} the other choice would need another plan.",
        "",
    ]
    return "\n".join(text)


def _choice(flipped_to: str) -> str:
    return "match" if flipped_to == "direct" else "direct"


def _markdown(heads: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *body)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Every pair's barrier as it is and matched, by kind and by family (0 is drawn at 0.001)."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    generator = np.random.default_rng(0)
    for axis, column, names in zip(axes, ("kind", "family"), (KINDS, sorted({r["family"] for r in rows})), strict=True):
        axis.axhspan(*HARD, color="#dddddd", zorder=0)
        for k, name in enumerate(names):
            for shift, (curve, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
                found = values((r for r in rows if r[column] == name), f"barrier_{curve}")
                x = k + shift + generator.uniform(-0.12, 0.12, len(found))
                axis.scatter(x, np.maximum(found, 1e-3), s=9, color=colour, alpha=0.6, linewidths=0)
        axis.set_yscale("log")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes[0].set_ylabel("barrier of the test loss (nats)")
    handles = [plt.Line2D([], [], marker="o", ls="", color=c, label=n) for n, c in COLOURS.items()]
    axes[0].legend(handles=handles, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of pairs.csv")
    out = parser.parse_args().out
    rows = table.read(out / "pairs.csv")
    if not rows:
        parser.error(f"{out / 'pairs.csv'} holds no pairs; run build.py first")
    text = [summary(rows)]
    if weak := table.read(out / "weak.csv"):
        text.append(poor(weak))
    if flipped := table.read(out / "flips.csv"):
        text.append(flips(flipped))
    (out / "summary.md").write_text("\n".join(text), encoding="utf-8")
    draw(rows, out / "barriers.png")
    print(f"{len(rows)} pairs: {out / 'summary.md'}, {out / 'barriers.png'}")


if __name__ == "__main__":
    main()
