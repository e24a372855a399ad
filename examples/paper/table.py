"""The table of results: one row per pair of networks and way of merging, in a CSV that grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from measure import Curve, Evidence, Objective
from rows import Row as Row
from rows import read as read
from rows import write as write_rows
from train import Setting

COLUMNS = (
    "experiment",
    "data",
    "net",
    "variant",
    "budget",
    "seed_a",
    "seed_b",
    "merge",
    "barrier",
    "loss_a",
    "loss_b",
    "loss_mid",
    "accuracy_a",
    "accuracy_b",
    "accuracy_mid",
    "losses",
    "j_identity",
    "j_optimal",
    "j_random",
    "verdict",
    "decisions",
    "iota",
    "iota_low",
    "iota_high",
    "margins_a",
    "margins_b",
    "swaps_a",
    "swaps_b",
)
KEY = COLUMNS[:7]


def write(path: Path, rows: Iterable[Row]) -> None:
    """The whole table (`rows.write`)."""
    write_rows(path, COLUMNS, rows)


def key(setting: Setting, pair: tuple[int, int]) -> tuple[str, ...]:
    """What a pair's rows begin with."""
    return (
        *(setting.experiment, setting.data, setting.net, setting.variant, str(setting.budget)),
        *map(str, pair),
    )


def done(rows: Iterable[Row]) -> set[tuple[str, ...]]:
    """The pairs that are measured already."""
    return {tuple(row[c] for c in KEY) for row in rows}


def rows_of(
    setting: Setting,
    pair: tuple[int, int],
    curves: Mapping[str, Curve],
    objectives: Sequence[Objective],
    evidence: Evidence,
) -> list[Row]:
    """One row per curve; objectives and evidence by depth, separated by blanks."""
    out = []
    for merge, curve in curves.items():
        middle = len(curve.loss) // 2
        values = (
            merge,
            f"{curve.barrier:.4f}",
            *(f"{curve.loss[i]:.4f}" for i in (0, -1, middle)),
            *(f"{curve.accuracy[i]:.4f}" for i in (0, -1, middle)),
            " ".join(f"{v:.4f}" for v in curve.loss),
            *(" ".join(f"{getattr(o, name):.4f}" for o in objectives) for name in ("identity", "optimal", "random")),
            *(evidence.verdict, evidence.decisions),
            *(" ".join(f"{v:.4f}" for v in getattr(evidence, name)) for name in ("iota", "low", "high")),
            *(
                " ".join(f"{v:.4g}" for v in getattr(side, name)) if side else ""
                for name in ("margin", "swap")
                for side in evidence.structure or (None, None)
            ),
        )
        out.append(dict(zip(COLUMNS, (*key(setting, pair), *values), strict=True)))
    return out


def numbers(text: str) -> list[float]:
    """A cell of several numbers."""
    return [float(v) for v in text.split()]


def barriers(rows: Iterable[Row], experiment: str, data: str, variant: str, merge: str) -> np.ndarray:
    """The barriers of one cell's pairs, in nats."""
    wanted = {"experiment": experiment, "data": data, "variant": variant, "merge": merge}
    return np.array([float(r["barrier"]) for r in rows if all(r[k] == v for k, v in wanted.items())])


def cells(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """(experiment, data, variant) that have rows, in order of the grid's names."""
    return list(dict.fromkeys((r["experiment"], r["data"], r["variant"]) for r in rows))
