"""(ε, c)-equivalence: which other weights of a layer do the same, and how much norm they take.

A solution W' of a trained layer W is (ε, c)-equivalent to it when the network's outputs on the calibration data differ
by at most ε in relative root mean square, and ‖W'‖ ≤ c ‖W‖ for the trainable weights (Frobenius norm). What the theory
predicts for a layer with function classes v_i + im(M_i):

- moves in the kernel of M_i change nothing on the support, and add their square to ‖w_i‖²;
- a permutation π of the neurons' functions (the next layer permuted alike) is realized at Σ_i C_{iπ(i)} at least, so
  that it is (0, c)-equivalent exactly where Σ_i C_{iπ(i)} ≤ c² ‖W‖²;
- a change of the effective weights by δ costs the pre-activations E‖δ·x‖², off the support too: what a solution with
  much norm does to the little that inputs have there is an error as well.

`Equivalents` constructs such solutions, with the norm and error predicted for each; `measure` says what they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
import torch
from torch import Generator, Tensor

from mergeid.errors import MergeidError
from mergeid.evidence.function_class import FunctionClasses


@dataclass(frozen=True)
class Equivalence:
    """error: RMS(outputs' − outputs) / RMS(outputs); growth: ‖W'‖ / ‖W‖ of the trainable weights."""

    error: float
    growth: float

    def holds(self, epsilon: float, c: float) -> bool:
        """Whether the solution is (ε, c)-equivalent."""
        return self.error <= epsilon and self.growth <= c


@dataclass(frozen=True)
class Solution:
    """One constructed solution of a layer.

    Attributes:
        trained: W', float64 [m, d]; effective: F + D ⊙ W'.
        permutation: neuron i has the function of the original's neuron ``permutation[i]``.
        predicted: growth by Σ C and the square of the kernel moves; and the relative RMS error of the layer's
            pre-activations, by the inputs' second moments along all known directions.
    """

    trained: Tensor
    effective: Tensor
    permutation: np.ndarray
    predicted: Equivalence


def measure(outputs: Tensor, reference: Tensor, trained: Tensor, original: Tensor) -> Equivalence:
    """How equivalent a solution is, from both networks' outputs on the same data and both trainable weights.

    Raises `MergeidError` where the shapes differ, or the reference is 0."""
    if outputs.shape != reference.shape or trained.shape != original.shape:
        raise MergeidError("equivalence compares outputs, and weights, of one shape; run both on the same data")
    size, norm = float(reference.double().norm()), float(original.double().norm())
    if size == 0 or norm == 0:
        raise MergeidError("equivalence is relative: the reference's outputs and trainable weights must not be 0")
    return Equivalence(
        float((outputs.double() - reference.double()).norm()) / size, float(trained.double().norm()) / norm
    )


class Equivalents:
    """Solutions of one layer of one group: its trained W [m, d] in its function classes.

    Raises `MergeidError` for a grouped convolution, whose groups are layers of their own here, and where W is not in
    the classes (outside of a LoRA's row space)."""

    def __init__(self, classes: FunctionClasses, trained: Tensor) -> None:
        if len(classes.supports) > 1:
            raise MergeidError("take one group of a grouped convolution at a time")
        self.classes, self.trained = classes, trained.double()
        self.support = classes.supports[0]
        self.coefficients = self.support.project(self._effective(self.trained))
        self.cost = classes.costs(self._effective(self.trained))
        if not bool(torch.isfinite(self.cost.diagonal()).all()):
            raise MergeidError("the trained layer does not lie in its own function classes; give the right fixed part")
        self.norm = float(self.trained.norm())
        m, k = classes.m, self.support.k
        self._inverse = torch.empty(m, k, k, dtype=torch.float64)
        for factor in classes.factors(0):
            left = factor.left * factor.inverse[:, None]
            self._inverse[factor.neurons] = left @ left.transpose(1, 2)

    def _effective(self, trained: Tensor) -> Tensor:
        scaling = self.classes.scaling
        return self.classes.fixed.double() + (trained if scaling is None else scaling.double() * trained)

    def predicted_growth(self, permutation: np.ndarray) -> float:
        """√(Σ_i C_{iπ(i)}) / ‖W‖: the least c for which π is (0, c)-equivalent; +∞ where it is not realizable."""
        rows = torch.arange(self.classes.m)
        return sqrt(float(self.cost[rows, torch.from_numpy(permutation)].sum())) / self.norm

    def realize(self, coefficients: Tensor) -> Tensor:
        """The trainable weights of least norm with these coefficients [m, k] (as near as the classes come)."""
        y = torch.einsum("mkl,ml->mk", self._inverse, coefficients - self.classes.centres[0])
        w = y @ self.support.U.T
        if self.classes.row_space is not None:
            q = self.classes.row_space.double()
            return w @ q @ q.T
        return w if self.classes.scaling is None else self.classes.scaling.double() * w

    def kernel(self, directions: Tensor) -> Tensor:
        """The parts of directions [m, d] that no input on the support sees."""
        if self.classes.row_space is not None:
            q = self.classes.row_space.double()
            directions = directions @ q @ q.T
        scaling = self.classes.scaling
        seen = self.support.project(directions if scaling is None else scaling.double() * directions)
        return directions - self.realize(self.classes.centres[0] + seen)

    def make(self, permutation: np.ndarray, *, unseen: float, change: float, generator: Generator) -> Solution | None:
        """A solution under `permutation`; None where that is not realizable.

        Args:
            unseen: norm of a random move in the kernels, in units of ‖W‖.
            change: RMS of a random change of the pre-activations on the support, relative to theirs.
        """
        m, k = self.classes.m, self.support.k
        if self.predicted_growth(permutation) == inf:
            return None
        target = self.coefficients[torch.from_numpy(permutation)]
        delta = torch.randn(m, k, dtype=torch.float64, generator=generator)
        # only changes that the neurons can make
        zero = self.classes.centres[0]
        delta = self.support.project(self._effective(self.realize(zero + delta)) - self.classes.fixed.double())
        delta *= change * self._rms(target) / max(self._rms(delta), 1e-300)
        least = self.realize(target + delta)
        move = self.kernel(torch.randn(self.trained.shape, dtype=torch.float64, generator=generator))
        move *= unseen * self.norm / max(float(move.norm()), 1e-300)
        # the least-norm part is orthogonal to the kernel
        square = torch.einsum("mk,mkl,ml->", target + delta - zero, self._inverse, target + delta - zero)
        growth = sqrt(float(square) + float(move.square().sum())) / self.norm
        trained = least + move
        effective = self._effective(trained)
        before = self._effective(self.trained)[torch.from_numpy(permutation)]
        error = self._rms(self.support.coefficients(effective - before)) / self._rms(self.support.coefficients(before))
        return Solution(trained, effective, permutation, Equivalence(error, growth))

    def _rms(self, coefficients: Tensor) -> float:
        """√E‖coefficients·x‖², coefficients [m, r] along the first r known directions."""
        r = coefficients.shape[1]
        total = (coefficients.square() * self.support.variances[:r]).sum()
        if self.support.centred:
            total = total + (coefficients @ self.support.coefficients(self.support.mean[None], r)[0]).square().sum()
        return sqrt(float(total))


def study(
    equivalents: Equivalents,
    outputs: Callable[[Tensor, np.ndarray], Tensor],
    count: int,
    *,
    epsilon: float,
    moved: int = 4,
    generator: Generator,
) -> Iterator[tuple[Solution, Equivalence]]:
    """`count` constructed solutions, each with what was predicted and what was measured.

    A third of them keep the neurons in place; the others swap up to `moved` of them. Kernel moves are up to ‖W‖ long,
    changes up to `epsilon`. A permutation that is not realizable is drawn anew; after 100 draws the identity is taken.

    Args:
        outputs: the network's outputs with this layer's effective weights [m, d] and the next layer permuted to match:
            neuron i of the solution has the function of neuron ``permutation[i]``.
    """
    m = equivalents.classes.m
    reference = outputs(equivalents._effective(equivalents.trained), np.arange(m))
    for number in range(count):
        unseen, change = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
        permutation = np.arange(m)
        for _ in range(100 if number % 3 and m > 1 else 0):
            permutation = _few_moved(m, moved, generator)
            if equivalents.predicted_growth(permutation) < inf:
                break
            permutation = np.arange(m)
        found = equivalents.make(permutation, unseen=unseen, change=epsilon * change, generator=generator)
        assert found is not None  # the identity is realizable, and no other permutation is kept that is not
        result = outputs(found.effective, permutation)
        yield found, measure(result, reference, found.trained, equivalents.trained)


def _few_moved(m: int, moved: int, generator: Generator) -> np.ndarray:
    """A permutation that is one random cycle of two to `moved` neurons."""
    length = int(torch.randint(2, min(max(moved, 2), m) + 1, (1,), generator=generator))
    chosen = torch.randperm(m, generator=generator)[:length].numpy()
    permutation = np.arange(m)
    permutation[chosen] = np.roll(chosen, -1)
    return permutation
