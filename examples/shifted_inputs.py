"""Does a certified decision ever flip when the inputs shift?

    python examples/shifted_inputs.py

trains small networks with a fixed part on scikit-learn's digits (some seconds each), certifies their layers on clean
images, and shifts the inputs: images more and more rotated, noisy, faded, inverted, occluded and moved, and a growing
share of the data from a single class. For every layer and shift it measures how far the covariance of the layer's
inputs moved, ‖E‖, computes all costs anew on the shifted support, and counts decisions that flip: a swap that became
as good as the identity, or a permutation. Where ‖E‖ is below the shift radius, none may. Half-masked layers have next
to no certificate, however large their margin: some S_i are singular, or nearly. Their radius is 0, or so small that it
only covers a shift that leaves the covariance as it was (inverting all images, in the first layer).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from digits import KINDS, images, train
from scipy import ndimage
from torch import Tensor, nn

from mergeid.evidence.activation_cost import linear_ridge_costs
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.inputs import supports
from mergeid.evidence.margin import margin
from mergeid.evidence.stability import Stability, stability
from mergeid.evidence.support import Support

STRENGTHS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
LAYERS = ("0", "2")
TAU = 0.9


@dataclass
class Count:
    """Decisions that a certificate covers and those that it does not, and how many of each flipped."""

    certified: int = 0
    certified_flips: int = 0
    others: int = 0
    other_flips: int = 0

    def add(self, certified: bool, flipped: bool) -> None:
        if certified:
            self.certified += 1
            self.certified_flips += flipped
        else:
            self.others += 1
            self.other_flips += flipped


def shifts(seed: int) -> Iterator[tuple[np.ndarray, bool]]:
    """All images shifted at full strength, float32 [1797, 8, 8], and whether they are blended with the clean ones
    (otherwise they take the place of some of them)."""
    x, y = images()
    rng = np.random.default_rng(seed)
    for angle in (10, 30, 60, 90):
        yield ndimage.rotate(x, angle, axes=(1, 2), reshape=False, order=1), True
    for size in (0.1, 0.5):
        yield x + size * rng.standard_normal(x.shape).astype(np.float32), True
    yield x / 2, True
    yield 1 - x, True
    hidden = x.copy()
    hidden[:, 2:6, 2:6] = 0
    yield hidden, True
    yield np.roll(x, 1, 2), True
    for digit in (0, 1, 8):
        yield x[rng.choice(np.flatnonzero(y == digit), len(x))], False


def layer_supports(model: nn.Module, x: np.ndarray) -> dict[str, Support]:
    batch = {"x": torch.from_numpy(x).flatten(1)}
    found = supports(model, [batch], lambda m, b: m(b["x"]), LAYERS, tau=TAU)
    return {name: groups[0] for name, groups in found.items()}


def covariance(support: Support) -> Tensor:
    return (support.basis * support.variances) @ support.basis.T


def run(kind: str, *, seed: int, epochs: int) -> tuple[dict[str, Count], list[tuple[str, Support, Stability]]]:
    """Counts by certificate ("swaps", "permutations" and, for D = 1, the ridge form of both), and the certificates."""
    model, parts, _ = train(kind, epochs=epochs, seed=seed)
    x, _ = images()
    clean = layer_supports(model, x)
    counts: dict[str, Count] = {}
    certificates = []
    classes, weights = {}, {}
    for name in LAYERS:
        fixed, scaling = parts[f"{name}.weight"]
        classes[name] = FunctionClasses(fixed, (clean[name],), scaling)
        weights[name] = model.get_parameter(f"{name}.weight").detach()
        certificates.append((name, clean[name], stability(classes[name], weights[name])))
    order = np.random.default_rng(seed).permutation(len(x))
    for shifted, blended in shifts(seed):
        for strength in STRENGTHS:
            mixed = x + strength * (shifted - x) if blended else x.copy()
            if not blended:
                chosen = order[: max(round(strength * len(x)), 1)]
                mixed[chosen] = shifted[chosen]
            moved = layer_supports(model, mixed)
            for name, support, certificate in certificates:
                size = float(torch.linalg.matrix_norm(covariance(moved[name]) - covariance(support), 2))
                other = moved[name].with_k(support.k)
                own = replace(classes[name], supports=(other,))
                count(counts, "", certificate.pairs, certificate.permutations, size, own.costs(weights[name]))
                if certificate.ridge_pairs is None or certificate.ridge_permutations is None:
                    continue
                whole = replace(own, supports=(other.with_k(other.d),))
                cost = linear_ridge_costs(whole, weights[name], certificate.ridge)
                count(counts, " (ridge)", certificate.ridge_pairs, certificate.ridge_permutations, size, cost)
    return counts, certificates


def count(counts: dict[str, Count], form: str, pairs: float, permutations: float, size: float, cost: Tensor) -> None:
    found = margin(cost)
    counts.setdefault(f"swaps{form}", Count()).add(size < pairs, found.least_swap <= 0)
    counts.setdefault(f"permutations{form}", Count()).add(size < permutations, not found.identifiable)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="networks of each kind")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the digits in training")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args(arguments)
    flips = 0
    for kind in options.kinds:
        total: dict[str, Count] = {}
        for seed in range(options.seeds):
            counts, certificates = run(kind, seed=seed, epochs=options.epochs)
            for name, support, c in certificates:
                print(
                    f"{kind}, seed {seed}, layer {name}: k {support.k} of {support.d}, gap {c.gap:.2e}, norm "
                    f"{c.norm:.2e}, radius/gap {c.by_gap:.2e}, radius/norm {c.by_norm:.2e}"
                )
            for what, found in counts.items():
                t = total.setdefault(what, Count())
                t.certified += found.certified
                t.certified_flips += found.certified_flips
                t.others += found.others
                t.other_flips += found.other_flips
        for what, t in total.items():
            print(
                f"  {what}: {t.certified} certified decisions, {t.certified_flips} flipped; {t.others} others, "
                f"{t.other_flips} flipped"
            )
            flips += t.certified_flips
    print(f"certified decisions that flipped: {flips}")
    return int(flips > 0)


if __name__ == "__main__":
    raise SystemExit(main())
