"""The tables: one row per pair (`pairs.csv`) and one per network (`models.csv`), which grow with a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from measuring import Curve, Decision, excess
from recipes import Model, Pair
from training import facts

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from rows import Row, read, write

__all__ = ["Row", "read", "write"]

CURVES = ("direct", "direct_repair", "match", "match_repair", "auto")
WEAK = ("none", "64")
COLUMNS = (
    *("pair", "family", "data", "kind", "detail", "group", "model_a", "model_b", "scramble", "task_a", "task_b"),
    *("repair", "examples", "spaces"),
    *(f"barrier_{c}" for c in CURVES),
    *(f"points_{c}" for c in CURVES),
    *("verdict", "direct_spaces", "match_spaces", "will_not_spaces", "overruled", "auto_is"),
    *(f"{w}_{c}" for w in WEAK for c in ("verdict", "overruled", "auto_is", "direct", "match", "auto")),
    *(f"{v}_{c}" for c in CURVES for v in ("loss", "accuracy", "loss_half", "accuracy_half")),
    "seconds",
)
MODEL_COLUMNS = (
    *("model", "family", "data", "width", "depth", "parameters", "role", "task", "seed", "sigma", "parent", "at"),
    *("optimizer", "steps", "rate", "decay", "loss", "accuracy", "seconds", "file"),
)


def options_of(doc: str | None, files: str, inputs: int) -> argparse.ArgumentParser:
    """What a run over pairs is asked for. Args: doc: what it is about; files: its tables; inputs: its default."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=here, help=f"folder of {files}")
    parser.add_argument("--cache", type=Path, help="folder of the trained networks (default: OUT/cache)")
    parser.add_argument("--only", default="*", metavar="GLOB", help="pairs whose id matches")
    parser.add_argument("--inputs", type=int, default=inputs, help="calibration inputs, at least 16")
    return parser


def numbers(cell: str) -> np.ndarray:
    """A cell of several numbers, float64."""
    return np.array([float(v) for v in cell.split()])


def names(pair: Pair) -> Row:
    """What identifies a pair."""
    g = pair.a.group
    values = (pair.id, g.family, g.data, pair.kind, pair.detail, g.name, pair.a.id, pair.b.id, pair.scramble)
    return dict(zip(COLUMNS, (*values, pair.a.task, pair.b.task), strict=False))


def curve_cells(name: str, curve: Curve | None) -> Row:
    """Barrier and curves over all test examples and over every second one; empty without a curve."""
    if curve is None:
        return {}
    parts = {"": slice(None), "_half": slice(None, None, 2)}
    cells = {f"barrier_{name}": f"{curve.barrier:.4f}", f"points_{name}": f"{curve.points:.2f}"}
    for suffix, part in parts.items():
        cells[f"loss{suffix}_{name}"] = " ".join(f"{v:.5g}" for v in curve.losses[:, part].mean(1))
        cells[f"accuracy{suffix}_{name}"] = " ".join(f"{v:.4g}" for v in curve.right[:, part].mean(1))
    return cells


def decision_cells(prefix: str, decision: Decision, auto_is: str) -> Row:
    return {
        f"{prefix}verdict": decision.plan.verdict,
        f"{prefix}overruled": str(int(decision.overruled)),
        f"{prefix}auto_is": auto_is,
    }


def halves(row: Mapping[str, str], curve: str) -> tuple[float, float]:
    """The barrier on each of two halves of the test set (`COLUMNS` holds all examples and one half)."""
    whole, half = numbers(row[f"loss_{curve}"]), numbers(row[f"loss_half_{curve}"])
    return excess(half), excess(2 * whole - half)


def model_row(model: Model, cache: Path, parameters: int, file: Path, optimizer: str) -> dict[str, object]:
    """One row of `models.csv`."""
    g, found = model.group, facts(model, cache)
    values = (
        *(model.id, g.family, g.data, g.width, g.depth, parameters, model.role, model.task, model.seed),
        *("" if model.sigma is None else model.sigma, "" if model.parent is None else model.parent.id),
        *("" if model.parent is None else model.at, optimizer, model.steps, f"{model.rate:g}", f"{model.decay:g}"),
        *(f"{found['loss']:.4f}", f"{found['accuracy']:.4f}", found["seconds"], file.as_posix()),
    )
    return dict(zip(MODEL_COLUMNS, values, strict=True))
