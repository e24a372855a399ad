"""Two neurons that are identifiable one by one, and yet interact: what mergeid's engine reports.

    python examples/interacting_neurons.py

A layer of two ReLU neurons reads (z, y), z in [−1, 1] and y in [2, 3]; the output is h_1 − h_2. Networks A and B have
the same fixed part F (D = 1), trainable weights of the same norm, and the same function, z:

    A: h_1 = relu(z),  h_2 = relu(−z)           B: h_1 = relu(z + y),  h_2 = relu(y)

The structure certifies in each of them that no neuron may take over the other's function for the same price. But only
both together carry z, so the networks share no neuron up to a permutation, and their average computes 1.5 z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mergeid.evidence.activation_cost import relu_costs
from mergeid.evidence.equivalent import Equivalence, measure
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.interaction import Interactions, interactions
from mergeid.evidence.margin import Margin, margin
from mergeid.evidence.stability import Stability, stability
from mergeid.evidence.support import InputMoments

READOUT = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
A = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
B = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
FIXED = (A + B) / 2


@dataclass
class Report:
    """What the engine says of one pair of networks.

    Attributes:
        margins, relu_margins, stabilities: of A and of B.
        equivalence: of B's outputs to A's; average: the outputs' relative error at the midpoint, under the identity
            and under the swap.
        correlations: Pearson [2, 2] of A's and B's neurons.
    """

    margins: tuple[Margin, Margin]
    relu_margins: tuple[Margin, Margin]
    stabilities: tuple[Stability, Stability]
    equivalence: Equivalence
    interactions: Interactions
    correlations: np.ndarray
    average: tuple[float, float]


def hidden(x: Tensor, weights: Tensor) -> Tensor:
    return torch.relu(x @ weights.T)


def report(seed: int = 0, rows: int = 2000) -> Report:
    """Run the engine on data drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 1.0])
    x = x + torch.tensor([-1.0, 2.0])
    moments = InputMoments(2)
    moments.add(x)
    classes = FunctionClasses(FIXED, (moments.support(1.0, centred=False),))
    outputs = {name: hidden(x, w) @ READOUT.T for name, w in (("a", A), ("b", B))}
    swap = torch.tensor([1, 0])

    def error(weights: Tensor, readout: Tensor) -> float:
        return measure(hidden(x, weights) @ readout.T, outputs["a"], weights, A).error

    joint = np.corrcoef(hidden(x, A).T.numpy(), hidden(x, B).T.numpy())[:2, 2:]
    return Report(
        (margin(classes.costs(A)), margin(classes.costs(B))),
        (margin(relu_costs(classes, A, x)), margin(relu_costs(classes, B, x))),
        (stability(classes, A), stability(classes, B)),
        measure(outputs["b"], outputs["a"], B - FIXED, A - FIXED),
        interactions(READOUT),
        joint,
        (error((A + B) / 2, READOUT), error((A + B[swap]) / 2, (READOUT + READOUT[:, swap]) / 2)),
    )


def main() -> None:
    found = report()
    for name, linear, relu, stable in zip("AB", found.margins, found.relu_margins, found.stabilities, strict=True):
        print(
            f"{name}: identity optimal {linear.identity_optimal}, margin {linear.value:.3f} (ReLU {relu.value:.3f}), "
            f"shift radius {stable.by_norm:.3f} of the inputs' largest variance"
        )
    print(
        f"B against A: outputs differ by {found.equivalence.error:.1e}, norm growth {found.equivalence.growth:.3f}: "
        "equivalent"
    )
    print("correlation of A's neurons (rows) with B's:")
    print(np.array2string(found.correlations, precision=2, prefix="  "))
    seen = found.interactions
    print(
        f"the next layer sees {seen.rank} of {seen.rank + seen.hidden} dimensions; share of each neuron that it does "
        f"not see: {', '.join(f'{s:.2f}' for s in seen.freedom.tolist())}"
    )
    for i, j, sign in seen.together:
        print(f"neurons {i + 1} and {j + 1} are read only as h_{i + 1} {'+-'[sign < 0]} h_{j + 1}: they interact")
    print(
        f"error of the average, relative to the outputs: {found.average[0]:.2f} as they are, {found.average[1]:.2f} "
        "with B's neurons swapped"
    )


if __name__ == "__main__":
    main()
