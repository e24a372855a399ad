"""A thousand (ε, c)-equivalent solutions of one W-asymmetric network, against what the theory predicts for each.

    python examples/equivalent_solutions.py

trains a network with a fixed half of its weights on scikit-learn's digits, and constructs solutions of its first layer:
moves that no input sees, swaps and longer cycles of neurons realized with the least norm (the next layer permuted
alike), and small random changes. For each the norm growth and the error are predicted from the function classes and
measured on the network's logits. Then it counts which of them are (ε, c)-equivalent. On more dimensions of support a
permutation takes more norm, and beyond the support that norm makes errors of its own.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from digits import images, train
from scipy.stats import spearmanr

from mergeid.evidence.equivalent import Equivalents, study
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.inputs import supports


@dataclass
class Table:
    """One row per solution: neurons moved, growth predicted and measured, error predicted (of the layer's
    pre-activations) and measured (of the logits); float64 [solutions, 5]."""

    rows: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        return self.rows[:, 0] > 0


def construct(count: int, *, epsilon: float, tau: float, epochs: int, seed: int) -> tuple[Table, Equivalents]:
    model, parts, trained = train("mask", epochs=epochs, seed=seed)
    x = torch.from_numpy(images()[0]).flatten(1)
    support = supports(model, [x], lambda m, b: m(b), ["0"], tau=tau, centred={"0": False})["0"]
    fixed, scaling = parts["0.weight"]
    found = Equivalents(FunctionClasses(fixed, support, scaling), trained["0.weight"])
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    first = x.double()

    def outputs(effective: torch.Tensor, permutation: np.ndarray) -> torch.Tensor:
        to = torch.from_numpy(permutation)
        h = torch.relu(first @ effective.T + state["0.bias"][to])
        h = torch.relu(h @ state["2.weight"][:, to].T + state["2.bias"])
        return h @ state["4.weight"].T + state["4.bias"]

    generator = torch.Generator().manual_seed(seed)
    rows = [
        (
            (made.permutation != np.arange(len(fixed))).sum(),
            made.predicted.growth,
            measured.growth,
            made.predicted.error,
            measured.error,
        )
        for made, measured in study(found, outputs, count, epsilon=epsilon, generator=generator)
    ]
    return Table(np.array(rows, dtype=np.float64)), found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="solutions to construct")
    parser.add_argument("--epsilon", type=float, default=0.02, help="largest change of the pre-activations")
    parser.add_argument("--tau", type=float, default=0.95, help="share of the inputs' second moment on the support")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    table, found = construct(
        options.count, epsilon=options.epsilon, tau=options.tau, epochs=options.epochs, seed=options.seed
    )
    rows, moved = table.rows, table.moved
    finite = torch.isfinite(found.cost).sum().item() - len(found.cost)
    print(
        f"{len(rows)} solutions, {int(moved.sum())} of them permuted; support of {found.support.k} dimensions; "
        f"{finite} of {found.cost.numel() - len(found.cost)} takeovers of a function are realizable"
    )
    print(
        f"norm growth, measured / predicted: off by {np.abs(rows[:, 2] / rows[:, 1] - 1).max():.1e} at most; error of "
        f"the logits against that predicted for the layer: rank correlation {spearmanr(rows[:, 3], rows[:, 4])[0]:.2f}"
    )
    for what, chosen in (("in place", ~moved), ("permuted", moved)):
        if chosen.any():
            part = rows[chosen]
            print(
                f"{what}: growth {part[:, 2].min():.2f} to {part[:, 2].max():.2f}, median {np.median(part[:, 2]):.2f}; "
                f"error of the logits {np.median(part[:, 4]):.4f} in the median, {part[:, 4].max():.4f} at most"
            )
    for epsilon in (0.05, 0.2, 0.3):
        counts = []
        for c in (1.0, 1.5, 2.0, 4.0):
            held = (rows[:, 4] <= epsilon) & (rows[:, 2] <= c)
            counts.append(f"c = {c:g}: {int((held & ~moved).sum())} and {int((held & moved).sum())}")
        print(f"({epsilon:g}, c)-equivalent, in place and permuted: {'; '.join(counts)}")


if __name__ == "__main__":
    main()
