"""How alike two layers are: CKA, SVCCA and PWCCA from sums over rows, and CKA between all layers.

Rows are examples (or positions of examples), columns are neurons. Nothing that grows with the data is kept, unless
there are fewer rows than neurons: every index is computed from sums in float64, added up in chunks of a fixed size, so
that the batch size does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mergeid.basics.memory import NUMBERS

CHUNK = 1024
"""Rows added at once."""
EXAMPLES = 256
"""Examples of a chunk of `CkaMap`."""
VARIANCE = 0.99
"""Share of the variance that SVCCA keeps, as its authors do."""
ROUNDING = 1e-14
"""Differences from the mean up to this share of it are rounding of float64."""
RANK = 1e-10
"""Directions with less than this share of the largest variance count as absent."""


class _Chunks:
    """Puts rows together into chunks of one size, however they arrive."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._waiting: list[tuple[Tensor, ...]] = []

    def add(self, *rows: Tensor) -> list[tuple[Tensor, ...]]:
        self._waiting.append(rows)
        if sum(len(r[0]) for r in self._waiting) < self.size:
            return []
        whole = tuple(torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        cut = len(whole[0]) - len(whole[0]) % self.size
        self._waiting = [tuple(w[cut:] for w in whole)] if cut < len(whole[0]) else []
        return [tuple(w[i : i + self.size] for w in whole) for i in range(0, cut, self.size)]

    def rest(self) -> list[tuple[Tensor, ...]]:
        found, self._waiting = self._waiting, []
        return [tuple(torch.cat(parts) for parts in zip(*found, strict=True))] if found else []


class _Canonical:
    """Indices that follow from canonical correlations."""

    def svcca(self, variance: float = VARIANCE) -> float:
        """Mean canonical correlation of the directions that hold `variance` of each layer's variance (Raghu et al.
        2017, arXiv:1706.05806)."""
        found = self._canonical(variance)
        return 0.0 if found is None else float(found[0].mean())

    def pwcca(self) -> float:
        """Canonical correlations weighted by how much of X each variate accounts for, α_i = Σ_j |⟨h_i, x_j⟩| (Morcos et
        al. 2018, arXiv:1806.05759). Not symmetric; too high where there are few rows per neuron."""
        found = self._canonical(1.0)
        if found is None:
            return 0.0
        correlations, shares = found
        return float((correlations * shares).sum() / shares.sum())

    def _canonical(self, variance: float) -> tuple[Tensor, Tensor] | None:
        """Canonical correlations and Σ_j |⟨h_i, x_j⟩| of X's variates; None where a layer is constant."""
        raise NotImplementedError


@dataclass
class PairSums(_Canonical):
    """Sums over the rows of X [n, p] and Y [n, q], from which all indices of one pair of layers follow.

    Add rows with `add`, then call `finish`.
    """

    count: int = 0
    _shift: tuple[Tensor, Tensor] | None = None
    _sum: list[Tensor] = field(default_factory=list)
    _xx: Tensor = field(default_factory=lambda: torch.zeros(0))
    _yy: Tensor = field(default_factory=lambda: torch.zeros(0))
    _xy: Tensor = field(default_factory=lambda: torch.zeros(0))
    _norms: list[float] = field(default_factory=list)
    _weighted: list[Tensor] = field(default_factory=list)
    _chunks: _Chunks = field(default_factory=lambda: _Chunks(CHUNK))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows of both layers on the same inputs, [n, p] and [n, q]."""
        for a, b in self._chunks.add(x, y):
            self._add(a, b)

    def finish(self) -> PairSums:
        """To be called after the last row."""
        for a, b in self._chunks.rest():
            self._add(a, b)
        return self

    def _add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.double(), y.double()
        if self._shift is None:  # the indices do not change under a shift, but sums of squares would cancel
            self._shift = x.mean(0), y.mean(0)
            self._sum = [torch.zeros_like(m) for m in self._shift]
            self._weighted = [torch.zeros_like(m) for m in (self._shift[0], self._shift[0], *self._shift[1:] * 2)]
            p, q = (len(m) for m in self._shift)
            self._xx, self._yy, self._xy = (torch.zeros(s, dtype=torch.float64) for s in ((p, p), (q, q), (p, q)))
            self._norms = [0.0] * 5
        x, y = (_about(rows, at) for rows, at in zip((x, y), self._shift, strict=True))
        self.count += len(x)
        self._sum[0] += x.sum(0)
        self._sum[1] += y.sum(0)
        self._xx += x.T @ x
        self._yy += y.T @ y
        self._xy += x.T @ y
        a, b = x.square().sum(1), y.square().sum(1)
        for i, value in enumerate((a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum())):
            self._norms[i] += value.item()
        for i, (rows, weights) in enumerate(((x, a), (x, b), (y, a), (y, b))):
            self._weighted[i] += weights @ rows

    def cka(self) -> float:
        """Linear CKA, ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred X and Y (Kornblith et al. 2019, arXiv:1905.00414).

        Biased upwards when there are few rows. 0 where a layer is constant.
        """
        xx, yy, xy = self._covariances()
        below = torch.linalg.norm(xx) * torch.linalg.norm(yy)
        return float(torch.linalg.norm(xy) ** 2 / below) if below > 0 else 0.0

    def cka_unbiased(self) -> float:
        """Linear CKA from the unbiased estimate of HSIC (Song et al. 2012; Nguyen et al. 2021, arXiv:2010.15327).

        About 0 for unrelated layers however few the rows; may lie a little below 0. At least four rows.
        """
        xy = self._hsic(self._xy, 0, 1, self._norms[4], self._weighted[1], self._weighted[2])
        xx = self._hsic(self._xx, 0, 0, self._norms[2], self._weighted[0], self._weighted[0])
        yy = self._hsic(self._yy, 1, 1, self._norms[3], self._weighted[3], self._weighted[3])
        return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else 0.0

    def _hsic(self, cross: Tensor, i: int, j: int, products: float, left: Tensor, right: Tensor) -> float:
        """Unbiased HSIC of the Gram matrices K = XXᵀ and L = YYᵀ without their diagonals, from sums over rows.

        Args:
            cross: XᵀY.
            products: Σ ‖x‖² ‖y‖².
            left: Σ ‖y‖² x. right: Σ ‖x‖² y.
        """
        n = self.count
        if n < 4:
            return 0.0
        x, y = self._sum[i], self._sum[j]
        trace = float(cross.square().sum()) - products
        whole = (float(x @ x) - self._norms[i]) * (float(y @ y) - self._norms[j])
        rows = float(x @ cross @ y) - float(x @ left) - float(y @ right) + products
        return (trace + whole / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))

    def _covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        n = max(self.count, 1)
        x, y = (s / n for s in self._sum)
        return self._xx / n - torch.outer(x, x), self._yy / n - torch.outer(y, y), self._xy / n - torch.outer(x, y)

    def _canonical(self, variance: float) -> tuple[Tensor, Tensor] | None:
        xx, yy, xy = self._covariances()
        bases = [_principal(c, variance) for c in (xx, yy)]
        if any(len(values) == 0 for values, _ in bases):
            return None
        (lx, ux), (ly, uy) = bases
        whitened = (ux.T @ xy @ uy) / torch.outer(lx.sqrt(), ly.sqrt())
        left, correlations, _ = torch.linalg.svd(whitened, full_matrices=False)
        shares = (left.T @ (lx.sqrt()[:, None] * ux.T)).abs().sum(1)
        return correlations.clamp(0, 1), shares


class PairRows(_Canonical):
    """The same indices from the rows themselves: smaller where a layer has more neurons than there are rows.

    Attributes:
        count: rows so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._rows: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows of both layers on the same inputs, [n, p] and [n, q]. They are kept."""
        self.count += len(x)
        for kept, rows in zip(self._rows, (x, y), strict=True):
            kept.append(rows)

    def finish(self) -> PairRows:
        """To be called after the last row."""
        return self

    def cka(self) -> float:
        """As `PairSums.cka`."""
        one, two = self._grams
        below = torch.linalg.norm(one) * torch.linalg.norm(two)
        return float((one * two).sum() / below) if below > 0 else 0.0

    def cka_unbiased(self) -> float:
        """As `PairSums.cka_unbiased`."""
        if self.count < 4:
            return 0.0
        one, two = map(_u_centred, self._grams)
        xy, xx, yy = (float((x * y).sum()) for x, y in ((one, two), (one, one), (two, two)))
        return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else 0.0

    def _columns(self, which: int) -> Iterator[Tensor]:
        """Some neurons of a layer at a time, centred, float64 [n, neurons]."""
        rows = self._rows[which]
        step = max(NUMBERS // self.count, 1)
        for begin in range(0, rows[0].shape[1], step):
            part = torch.cat([r[:, begin : begin + step] for r in rows]).double()
            yield _about(part, part.mean(0))

    @cached_property
    def _grams(self) -> tuple[Tensor, Tensor]:
        """XXᵀ and YYᵀ of centred X and Y."""
        found = [torch.zeros(self.count, self.count, dtype=torch.float64) for _ in range(2)]
        for which, gram in enumerate(found):
            for part in self._columns(which):
                gram.addmm_(part, part.T)
        return found[0], found[1]

    @cached_property
    def _spectra(self) -> list[tuple[Tensor, Tensor]]:
        return [_principal(gram / self.count, 1.0) for gram in self._grams]

    def _canonical(self, variance: float) -> tuple[Tensor, Tensor] | None:
        ux, uy = (vectors[:, : _holding(values, variance)] for values, vectors in self._spectra)
        if not ux.shape[1] or not uy.shape[1]:
            return None
        left, correlations, _ = torch.linalg.svd(ux.T @ uy, full_matrices=False)
        variates = (ux @ left).T / self.count**0.5
        shares = torch.zeros(len(variates), dtype=torch.float64)
        for part in self._columns(0):
            shares += (variates @ part).abs().sum(1)
        return correlations.clamp(0, 1), shares


def _about(rows: Tensor, at: Tensor) -> Tensor:
    """Rows about a point; what rounding leaves of a constant neuron is nothing."""
    found = rows - at
    return found.masked_fill_(found.abs() <= ROUNDING * at.abs(), 0.0)


def _principal(covariance: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues [k] and eigenvectors [p, k] that hold a share of the variance."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    present = int((values > RANK * values[0]).sum()) if len(values) and values[0] > 0 else 0
    kept = _holding(values[:present], variance)
    return values[:kept], vectors[:, :kept]


def _holding(values: Tensor, variance: float) -> int:
    """How many of the largest eigenvalues hold a share of the variance."""
    if not len(values) or variance >= 1:
        return len(values)
    return int((values.cumsum(0) / values.sum() < variance).sum()) + 1


class CkaMap:
    """Unbiased linear CKA between every layer of one model and every layer of another, in chunks of examples.

    HSIC is estimated without bias on each chunk and averaged over chunks (Nguyen et al. 2021, arXiv:2010.15327).

    Args:
        chunk: examples per chunk.
    """

    def __init__(self, chunk: int = EXAMPLES) -> None:
        self._chunks = _Chunks(chunk)
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._first = 0

    def add(self, a: list[Tensor], b: list[Tensor]) -> None:
        """One [examples, features] per layer of each model."""
        self._first = len(a)
        for chunk in self._chunks.add(*a, *b):
            self._add(chunk)

    def _add(self, chunk: tuple[Tensor, ...]) -> None:
        n = len(chunk[0])
        if n < 4:
            return
        rows = (_about(x.double(), x.double().mean(0)) for x in chunk)
        centred = torch.stack([_u_centred(x @ x.T).reshape(-1) for x in rows])
        a, b = centred[: self._first], centred[self._first :]
        new = (a @ b.T, (a * a).sum(1), (b * b).sum(1))
        scaled = tuple(t / (n * (n - 3)) for t in new)
        self._sums = scaled if self._sums is None else tuple(s + t for s, t in zip(self._sums, scaled, strict=True))  # type: ignore[assignment]

    def finish(self) -> np.ndarray:
        """CKA [layers of A, layers of B]; nan where a layer is constant."""
        for chunk in self._chunks.rest():
            self._add(chunk)
        if self._sums is None:
            return np.zeros((0, 0))
        cross, a, b = self._sums
        below = torch.outer(a.clamp(min=0).sqrt(), b.clamp(min=0).sqrt())
        return torch.where(below > 0, cross / below, torch.full_like(below, torch.nan)).numpy()


def _u_centred(gram: Tensor) -> Tensor:
    """A Gram matrix without its diagonal, centred such that the inner product of two is n (n − 3) times the unbiased
    HSIC (Székely & Rizzo 2014)."""
    n = len(gram)
    gram = gram - torch.diag(torch.diagonal(gram))
    rows = gram.sum(0) / (n - 2)
    whole = rows.sum() / (n - 1)
    centred = gram - rows[:, None] - rows[None] + whole
    return centred - torch.diag(torch.diagonal(centred))
