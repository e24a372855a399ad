"""The probability that a merge stays within a loss, by its predicted score.

Of networks left out, the share that stays within a loss falls with the score: that, and nothing else, is assumed of it
(isotonic regression). Between the centres of its steps the share changes in a straight line (centred isotonic
regression, Oron and Flournoy 2017, arXiv:1701.05964), one line of them for each of a few losses.

A logistic curve of the score over the width of its interval was tried first: said and true chances differed by up to
0.16 in fifths, now by at most 0.09 (from inputs and from weights), and a few pairs with wide intervals bent it for all
others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DIGITS = 4
"""Of scores and chances in the file."""


@dataclass(frozen=True)
class Steps:
    """Attributes:
    scores: ascending. chances: of staying within one loss at these scores, never rising.
    """

    scores: tuple[float, ...]
    chances: tuple[float, ...]

    def __call__(self, score: float) -> float:
        return float(np.interp(score, self.scores, self.chances))


@dataclass(frozen=True)
class Chance:
    """Attributes:
    losses: ascending, on the scale of the scores (`mergeid.prediction.model.lift`).
    steps: for each of them.
    """

    losses: tuple[float, ...] = ()
    steps: tuple[Steps, ...] = ()

    def __call__(self, loss: float, score: float) -> float | None:
        """Never lower for a larger loss, nor higher for a larger score; None where nothing was fitted.

        A loss below the least one fitted counts as that one at a score that is higher by the difference, a loss above
        the largest likewise."""
        if not self.losses:
            return None
        at = np.maximum.accumulate([step(score) for step in self.steps])
        if loss < self.losses[0]:
            return self.steps[0](score + self.losses[0] - loss)
        if loss > self.losses[-1]:
            return max(float(at[-1]), self.steps[-1](score + self.losses[-1] - loss))
        return float(np.interp(loss, self.losses, at))

    def to_json(self) -> dict[str, Any]:
        lines = [{"scores": list(s.scores), "chances": list(s.chances)} for s in self.steps]
        return {"losses": [round(loss, 2 * DIGITS) for loss in self.losses], "steps": lines}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Chance:
        steps = (Steps(tuple(s["scores"]), tuple(s["chances"])) for s in data["steps"])
        return cls(tuple(data["losses"]), tuple(steps))


def fitted_chance(losses: Sequence[float], scores: np.ndarray, targets: np.ndarray) -> Chance:
    """Every pair counts alike.

    Args:
        losses: ascending, on the scale of the targets.
        scores, targets: of pairs left out [n], on one scale.
    """
    order = np.argsort(scores, kind="stable")
    return Chance(tuple(losses), tuple(_steps(scores[order], targets[order] <= loss) for loss in losses))


def _steps(scores: np.ndarray, inside: np.ndarray) -> Steps:
    """`scores`: ascending. A block of n pairs, k of which stay within the loss, has a chance of (k + ½) / (n + 1)."""
    from scipy.optimize import isotonic_regression

    ends = isotonic_regression(inside.astype(float), increasing=False).blocks
    blocks = list(zip(ends[:-1], ends[1:], strict=True))
    centres = [float(scores[a:b].mean()) for a, b in blocks]
    chances = np.minimum.accumulate([(inside[a:b].sum() + 0.5) / (b - a + 1) for a, b in blocks])
    return Steps(tuple(round(c, DIGITS) for c in centres), tuple(round(float(p), DIGITS) for p in chances))
