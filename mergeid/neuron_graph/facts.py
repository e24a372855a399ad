"""What a traced forward pass tells about its neurons.

A *label* is an integer that names one neuron: one index of a parameter axis (an atom), or a neuron that appears
on the way (fresh). Two kinds of facts are kept:

- ``eq(a, b)``: labels a and b move together.
- ``par(child, parent)``: an equivariant map. Children of one parent stay together when the parent moves
  (neuron (h, d) lies in head h).

and some labels are frozen: no permutation may move them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Labels = np.ndarray
"""int64 array of labels, shaped like the dimensions it describes."""


@dataclass
class Facts:
    """An append-only record; `mergeid.neuron_graph.solve` closes it into a permutation group."""

    count: int = 0
    starts: list[int] = field(default_factory=list)
    """First label of each array of labels that was created together (one array = one initial colour)."""
    eqs: list[tuple[Labels, Labels]] = field(default_factory=list)
    pars: list[tuple[Labels, Labels]] = field(default_factory=list)
    freezes: list[tuple[Labels, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    reads: list[Labels] = field(default_factory=list)
    """Labels whose values an operation used (rather than moved)."""

    def fresh(self, shape: Sequence[int]) -> Labels:
        """New labels, one per position of `shape`, all of one initial colour."""
        n = int(np.prod(shape, dtype=np.int64))
        labels = np.arange(self.count, self.count + n, dtype=np.int64).reshape(shape)
        self.starts.append(self.count)
        self.count += n
        return labels

    def eq(self, a: Labels, b: Labels) -> None:
        """a[i] and b[i] move together, for every position i (same shape)."""
        if a is not b:
            self.eqs.append((a.reshape(-1), b.reshape(-1)))

    def par(self, child: Labels, parent: Labels) -> None:
        """child[i] lies in parent[i]; `parent` broadcasts against `child`."""
        self.pars.append((child.reshape(-1), np.broadcast_to(parent, child.shape).reshape(-1)))

    def read(self) -> np.ndarray:
        """Whether an operation used a label's values, bool [count]; who uses a pair uses both parts of it."""
        read = np.zeros(self.count, bool)
        for labels in self.reads:
            read[labels] = True
        news = True
        while news:
            news = False
            for child, parent in self.pars:
                new = parent[read[child] & ~read[parent]]
                read[new] = True
                news |= bool(new.size)
        return read

    def freeze(self, labels: Labels, why: str) -> None:
        """No permutation may move these labels; `why` is what the user reads."""
        if labels.size:
            if not self.reasons or self.reasons[-1] != why:
                self.reasons.append(why)
            self.freezes.append((labels.reshape(-1), len(self.reasons) - 1))

    def frozen(self, shape: Sequence[int], why: str) -> Labels:
        """Fresh labels that are frozen from the start."""
        labels = self.fresh(shape)
        self.freeze(labels, why)
        return labels
