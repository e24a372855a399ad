"""What ranking.csv says: ranking.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pairs_table as table
from validation import markdown

REGRET = 0.01
"""Nats that the chosen partner may lose more than the best one."""
MODES = {"inputs": "mergeid rank, inputs", "weights": "mergeid rank, no data", "trial": "mergeid rank --try"}
KNOWN = "mergeid rank, inputs, were the candidates' test losses known"
"""What the rule of `mergeid rank` would choose if it did not have to guess how good the candidates are."""
RIVALS: Mapping[str, tuple[str, int]] = {
    "highest cosine of the task vectors": ("cosine", -1),
    "lowest cosine of the task vectors": ("cosine", 1),
    "nearest in the weights": ("distance", 1),
    "highest CKA of the outputs": ("cka", -1),
    "least loss against the mean of the two (rank before)": ("inputs_score", 1),
    "least test loss of the candidate itself": ("loss_candidate", 1),
}
Cell = Callable[[table.Row], float]


@dataclass(frozen=True)
class Truth:
    """What a merge is judged by.

    Attributes:
        of: (row, test loss of the merge) -> nats.
    """

    name: str
    of: Callable[[table.Row, float], float]


def _ends(row: table.Row) -> float:
    return (float(row["loss_model"]) + float(row["loss_candidate"])) / 2


MERGED = Truth("loss of the merged network", lambda row, loss: loss)
ABOVE = Truth("its loss above the mean of the two, at least 0", lambda row, loss: max(0.0, loss - _ends(row)))
TRUTHS = (MERGED, ABOVE)


def losses(row: table.Row) -> list[float]:
    """Test losses of all merges of the pair that were measured."""
    return [float(v) for k, v in row.items() if (k == "loss_direct" or k.endswith("s_loss") or k == "trial_loss") and v]


def cases(rows: Sequence[table.Row]) -> dict[tuple[str, str], list[table.Row]]:
    """(base, model) -> its candidates."""
    found: dict[tuple[str, str], list[table.Row]] = {}
    for r in rows:
        found.setdefault((r["base"], r["model"]), []).append(r)
    return found


def best(own: Sequence[table.Row], truth: Truth) -> float:
    """Of the truly best partner, merged in the best way that was measured."""
    return min(truth.of(r, x) for r in own for x in losses(r))


def regret(own: Sequence[table.Row], truth: Truth, score: Cell, loss: Cell) -> float:
    """Nats that the partner of the lowest score loses more than the best one."""
    chosen = min(own, key=score)
    return truth.of(chosen, loss(chosen)) - best(own, truth)


def _cell(name: str, sign: int = 1) -> Cell:
    return lambda row: sign * float(row[name])


def _known(row: table.Row) -> float:
    return float(row["loss_candidate"]) / 2 + float(row["inputs_expected"])


def choosers(rows: Sequence[table.Row]) -> dict[str, tuple[Cell, Cell]]:
    """name -> what partners are put in order by, and the loss of the merge that it makes."""
    found = {}
    for mode, name in MODES.items():
        if any(r.get(f"{mode}_place") for r in rows):
            found[name] = _cell(f"{mode}_place"), _cell(f"{mode}_loss")
    if MODES["inputs"] in found:
        found[KNOWN] = _known, _cell("inputs_loss")
    return {**found, **{name: (_cell(*how), _cell("loss_direct")) for name, how in RIVALS.items()}}


def regrets(own: Sequence[table.Row], truth: Truth, name: str, how: tuple[Cell, Cell]) -> float:
    """As `regret`; nan where this model was not asked about in that way."""
    try:
        return regret(own, truth, *how)
    except ValueError:  # an empty cell
        return float("nan")


def by_chance(own: Sequence[table.Row], truth: Truth) -> tuple[float, float]:
    """(share of the partners within `REGRET` of the best one, their mean regret), merged as they lie."""
    least = best(own, truth)
    lost = np.array([truth.of(r, float(r["loss_direct"])) - least for r in own])
    return float((lost <= REGRET).mean()), float(np.median(lost))


def _line(values: Sequence[float]) -> list[str]:
    known = np.array([v for v in values if not np.isnan(v)])
    if not len(known):
        return ["–"] * 4
    return [f"{len(known)}", f"{(known <= REGRET).mean():.1%}", f"{np.median(known):.4f}", f"{known.mean():.4f}"]


def written(rows: Sequence[table.Row]) -> str:
    """All tables, as markdown."""
    found, by = cases(rows), choosers(rows)
    bases = list(dict.fromkeys(base for base, _ in found))
    families = {r["family"] for r in rows}
    text = [
        "# How well the best partner is found\n",
        f"{len(found)} models of {len(bases)} bases and {len(families)} families, each with "
        f"{min(map(len, found.values()))} candidates: other fine-tunes of its base. Written by `ranking.py`; "
        "every network of the table was trained and every merge made. Regret: nats that the chosen partner's merge "
        "loses more than that of the truly best partner, on the test set of the model's own task. Where mergeid names "
        "a way of merging, that merge counts; rivals average the weights.\n",
    ]
    for truth in TRUTHS:
        text.append(f"\n## By {truth.name}\n")
        head = ("chosen by", "models", f"within {REGRET:g} nats", "median regret", "mean regret")
        lines = [[name, *_line([regrets(own, truth, name, how) for own in found.values()])] for name, how in by.items()]
        alone = [float(own[0]["loss_model"]) - best(own, MERGED) for own in found.values()]
        chance = [by_chance(own, truth) for own in found.values()]
        lines.append(
            ["a candidate at random", str(len(found)), f"{np.mean([c[0] for c in chance]):.1%}",
             f"{np.mean([c[1] for c in chance]):.4f}", "–"]
        )  # fmt: skip
        if truth is MERGED:
            lines.append(["(no merge at all)", *_line(alone)])
        text.append(markdown(head, lines))
    text.append(f"\n## By base: share within {REGRET:g} nats / mean regret, by {MERGED.name}\n")
    head = ("base", "tuning", "models", *(n for n in by if n in MODES.values()), "nearest in the weights", "at random")
    lines = []
    for base in bases:
        own = [c for (name, _), c in found.items() if name == base]
        cells = [base, own[0][0]["tuning"], str(len(own))]
        for name in head[3:-1]:
            lost = np.array([regrets(c, MERGED, name, by[name]) for c in own])
            known = lost[~np.isnan(lost)]
            cells.append(f"{(known <= REGRET).mean():.0%} / {known.mean():.4f}" if len(known) else "–")
        lines.append([*cells, f"{np.mean([by_chance(c, MERGED)[0] for c in own]):.0%}"])
    text.append(markdown(head, lines))
    return "\n".join(text) + "\n"


def write(folder: Path) -> None:
    """ranking.md from ranking.csv."""
    rows = table.read(folder / "ranking.csv")
    if rows:
        (folder / "ranking.md").write_text(written(rows), encoding="utf-8")
