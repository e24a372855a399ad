"""The paper's claims beside what was measured: the order of the barriers, not their size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grid import DIMENSIONS, MLP_VARIANTS, RESNET_VARIANTS
from table import Row, barriers

LOW = 0.1
"""Share of the standard networks' unaligned barrier below which a barrier counts as near zero."""


@dataclass(frozen=True)
class Claim:
    """`holds` is None where the rows do not yet say."""

    text: str
    measured: str
    holds: bool | None


def check(rows: Sequence[Row]) -> list[Claim]:
    """All claims, in order."""
    found = []
    for experiment in ("mnist", "fashion"):
        found += _order(rows, experiment, experiment, "1")
    found += _order(rows, "resnet", "fashion", "2")
    for experiment, data, variants in (
        ("mnist", "mnist", MLP_VARIANTS),
        ("fashion", "fashion", MLP_VARIANTS),
        ("resnet", "fashion", RESNET_VARIANTS),
    ):
        found.append(_aligned(rows, experiment, data, variants))
    found.append(_falls(rows))
    return found


def _mean(rows: Sequence[Row], experiment: str, data: str, variant: str, merge: str = "unaligned") -> float | None:
    values = barriers(rows, experiment, data, variant, merge)
    return float(values.mean()) if len(values) else None


def _order(rows: Sequence[Row], experiment: str, data: str, sigma: str) -> list[Claim]:
    standard = _mean(rows, experiment, data, "standard")
    fixed = _mean(rows, experiment, data, f"W {sigma}")
    zero = _mean(rows, experiment, data, "W 0")
    claims = [
        Claim(
            f"{experiment}: W-asymmetric, σ_F = {sigma}, unaligned: barrier near zero (< {LOW:.0%} of standard)",
            _said(standard=standard, **{f"σ_F = {sigma}": fixed}),
            None if standard is None or fixed is None else fixed < LOW * standard,
        )
    ]
    if experiment != "resnet":
        claims.append(
            Claim(
                f"{experiment}: masks alone (σ_F = 0) leave the unaligned barrier high (> half of standard)",
                _said(standard=standard, **{"σ_F = 0": zero}),
                None if standard is None or zero is None else zero > 0.5 * standard,
            )
        )
    return claims


def _aligned(rows: Sequence[Row], experiment: str, data: str, variants: Sequence[str]) -> Claim:
    standard = _mean(rows, experiment, data, "standard")
    found = {v: _mean(rows, experiment, data, v, "aligned") for v in variants}
    known = [v for v in found.values() if v is not None]
    holds = None if standard is None or len(known) < len(variants) else max(known) < 0.25 * standard
    return Claim(f"{experiment}: aligned, all are low (< a quarter of standard unaligned)", _said(**found), holds)


def _falls(rows: Sequence[Row]) -> Claim:
    found = {f"k = {k}": _mean(rows, "dimension", f"gauss-{k}", "W 1") for k in DIMENSIONS}
    known = [v for v in found.values() if v is not None]
    holds = None if len(known) < len(found) else all(a > b for a, b in zip(known[:-1], known[1:], strict=True))
    return Claim("Gaussian inputs, σ_F = 1, unaligned: the barrier falls as k grows", _said(**found), holds)


def _said(**values: float | None) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None) or "not measured"
