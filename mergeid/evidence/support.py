"""The input support of a layer: the subspace that its inputs fill on calibration data, streamed.

For inputs x in R^d the support is spanned by the leading eigenvectors U [d, k] of their covariance, k the smallest
number that explains the share τ of the variance (arXiv 2606.04754). Beyond the support a weight moves freely without
being seen. Moments are plain sums in float64, so that they can be merged over devices. Inputs too wide for a d × d
matrix are sketched in O(d · columns) memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mergeid.errors import MergeidError

CHUNK = 1024
"""Rows that are added to the sums at once, whatever the batch size."""


@dataclass(frozen=True)
class Support:
    """Principal directions of a layer's inputs, widest first; those up to `k` are the support.

    Attributes:
        directions: float64 [d, r], orthonormal, r >= k; None where `tokens` says it.
        tokens: int64 [r]: the directions are these unit vectors (one-hot inputs).
        k: dimension of the support.
        variances: float64 [r], descending, of the inputs along the directions.
        mean: float64 [d].
        total: trace of the covariance (of the second moment where `centred` is false).
        centred: whether the mean was taken off. Only a free bias or a BatchNorm behind the layer makes that exact.
        rows: inputs seen.
        error: upper bound on the spectral norm of (covariance − what the directions say of it); 0 without a sketch.
    """

    directions: Tensor | None
    tokens: Tensor | None
    k: int
    variances: Tensor
    mean: Tensor
    total: float
    centred: bool
    rows: int
    error: float = 0.0

    @property
    def d(self) -> int:
        """Number of inputs."""
        return len(self.mean)

    @cached_property
    def basis(self) -> Tensor:
        """All known directions, float64 [d, r]."""
        if self.directions is not None:
            return self.directions
        assert self.tokens is not None
        out = torch.zeros(self.d, len(self.tokens), dtype=torch.float64)
        out[self.tokens, torch.arange(len(self.tokens))] = 1
        return out

    @property
    def U(self) -> Tensor:
        """The support's basis, float64 [d, k]."""
        if self.directions is None:
            return replace(self, tokens=_present(self.tokens)[: self.k]).basis
        return self.directions[:, : self.k]

    @property
    def explained(self) -> float:
        """Share of the variance along the support."""
        return float(self.variances[: self.k].sum()) / self.total if self.total > 0 else 1.0

    @cached_property
    def coherence(self) -> float:
        """ν(U) = max_a ‖U_a‖² in [k/d, 1]: 1 where a direction is a single input."""
        if self.k == 0:
            return 0.0
        return 1.0 if self.directions is None else float(self.U.square().sum(1).max())

    @property
    def eigengap(self) -> float:
        """λ_k − λ_{k+1}, with λ_{d+1} = 0; a sketch's unknown λ_{k+1} counts as its error bound."""
        if self.k == 0:
            return 0.0
        after = self.variances[self.k] if self.k < len(self.variances) else self.error if self.k < self.d else 0.0
        return max(float(self.variances[self.k - 1] - after), 0.0)

    def project(self, rows: Tensor) -> Tensor:
        """Coefficients of rows [n, d] along the support, float64 [n, k]."""
        return self.coefficients(rows, self.k)

    def coefficients(self, rows: Tensor, count: int | None = None) -> Tensor:
        """Coefficients of rows [n, d] along the first `count` known directions (default: all), float64."""
        if rows.shape[1] != self.d:
            raise MergeidError(
                f"rows of {rows.shape[1]} values cannot be projected on a support of {self.d} inputs; take the support "
                "of the same layer"
            )
        if self.directions is None:
            return rows[:, _present(self.tokens)[:count]].double()
        return rows.double() @ self.directions[:, :count]

    def onto(self, rows: Tensor) -> Tensor:
        """Inputs [n, d] projected on the support (on the mean plus the support where it is centred), float64."""
        shift = self.mean if self.centred else torch.zeros_like(self.mean)
        return shift + self.project(rows.double() - shift) @ self.U.T

    def at(self, tau: float) -> Support:
        """The support that explains the share `tau`; less where a sketch does not reach so far (see `explained`)."""
        return replace(self, k=_dimension(self.variances, self.total, tau))

    def with_k(self, k: int) -> Support:
        """The support of dimension `k`, at most the known directions."""
        return replace(self, k=min(k, len(self.variances)))


def _present(tokens: Tensor | None) -> Tensor:
    assert tokens is not None
    return tokens


def _dimension(variances: Tensor, total: float, tau: float) -> int:
    if not 0 < tau <= 1:
        raise MergeidError(f"the explained share τ must lie in (0, 1], got {tau}")
    if total <= 0:
        return 0
    reached = torch.cumsum(variances, 0) / total >= tau * (1 - 1e-12)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(variances)


class InputMoments:
    """Sums of x and x xᵀ over input rows, in float64; rows of any batch size are added in chunks of `CHUNK`.

    The same rows in the same order give the same bits, however they are batched; `merge` adds the sums of another
    part of the data, which changes the order of the additions, so the last digits.

    With `sketch` columns the matrix A = Σ x xᵀ is never formed: Y = A Ω with a seeded orthonormal Ω [d, sketch] is,
    and A ≈ Y (Ωᵀ Y)⁺ Yᵀ (Nyström; Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite
    matrix from streaming data", 2017, Algorithm 3). The approximation is below A, the mean over Ω of its error's trace
    is at most (1 + k/(sketch − k − 1)) Σ_{i>k} λ_i for every k < sketch − 1, and since tr A is summed exactly,
    tr A − tr Â bounds the error that was made (`Support.error`). Memory O(d · sketch).

    Args:
        d: number of inputs; sketch: columns, None for the exact matrix.
        generator: draws Ω; seed it alike where accumulators are to be merged. Default: seed 0.
    """

    def __init__(self, d: int, *, sketch: int | None = None, generator: torch.Generator | None = None) -> None:
        self.d, self.count, self.square = d, 0, 0.0
        self.sum = torch.zeros(d, dtype=torch.float64)
        self.test: Tensor | None = None
        if sketch is not None and sketch < d:
            generator = generator or torch.Generator().manual_seed(0)
            self.test = torch.linalg.qr(torch.randn(d, sketch, dtype=torch.float64, generator=generator))[0]
        self.second = torch.zeros(d, d if self.test is None else self.test.shape[1], dtype=torch.float64)
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """rows [N, d]. Raises `MergeidError` for another width, or for values that are not finite."""
        if rows.dim() != 2 or rows.shape[1] != self.d:
            raise MergeidError(f"input rows have shape {tuple(rows.shape)}, expected (rows, {self.d})")
        self._waiting.append(rows.detach())
        if sum(map(len, self._waiting)) >= CHUNK:
            self._flush(False)

    def _flush(self, everything: bool) -> None:
        if not self._waiting:
            return
        rows = torch.cat(self._waiting)
        if self.sum.device != rows.device:
            self._to(rows.device)
        while len(rows) >= CHUNK or (everything and len(rows)):
            x = rows[:CHUNK].double()
            rows = rows[CHUNK:]
            self.count += len(x)
            self.sum += x.sum(0)
            self.square += float(x.square().sum())
            self.second += x.T @ (x if self.test is None else x @ self.test)
        # what waits must not hold on to the batch that it is a part of
        self._waiting = [rows.clone()] if len(rows) else []

    def _to(self, device: torch.device) -> None:
        self.sum, self.second = self.sum.to(device), self.second.to(device)
        self.test = None if self.test is None else self.test.to(device)

    def merge(self, other: InputMoments) -> InputMoments:
        """Add another part of the data. Raises `MergeidError` unless both are of one width and one sketch."""
        self._flush(True)
        other._flush(True)
        mine, theirs = self.test, other.test
        same = (mine is None) == (theirs is None) and self.second.shape == other.second.shape
        if not same or (mine is not None and theirs is not None and not torch.equal(mine, theirs.to(mine.device))):
            raise MergeidError("moments of different widths or sketches cannot be merged; make them with one seed")
        self.count += other.count
        self.square += other.square
        self.sum += other.sum.to(self.sum.device)
        self.second += other.second.to(self.second.device)
        return self

    def support(self, tau: float = 0.9, *, centred: bool = True) -> Support:
        """The support that explains the share `tau` of the variance.

        Raises `MergeidError` without rows, and where an input was not finite."""
        self._flush(True)
        if self.count == 0:
            raise MergeidError("no input reached the layer, so its support is unknown; give calibration data")
        total, mean = self.sum.cpu(), self.sum.cpu() / self.count
        second, square = self.second.cpu() / self.count, self.square / self.count
        if not bool(torch.isfinite(second).all() and torch.isfinite(total).all()):
            raise MergeidError("a layer's inputs hold values that are not finite; check the data and the weights")
        test = None if self.test is None else self.test.cpu()
        if centred:
            square -= float(mean.square().sum())
            second = second - torch.outer(mean, mean if test is None else mean @ test)
        square = max(square, 0.0)
        values, directions = _eigen(second) if test is None else _nystrom(second, test)
        error = 0.0 if test is None else max(square - float(values.sum()), 0.0)
        k = _dimension(values, square if test is not None else float(values.sum()), tau)
        trace = square if test is not None else float(values.sum())
        return Support(directions, None, k, values, mean, trace, centred, self.count, error)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not below 0, and eigenvectors whose largest entry is positive."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp(min=0), _signed(vectors.flip(1))


def _nystrom(image: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [r] and eigenvectors [d, r] of the Nyström approximation from A Ω and Ω."""
    shift = (len(image) ** 0.5) * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(image, 2))
    if shift == 0:
        return torch.zeros(image.shape[1], dtype=torch.float64), test
    shifted = image + shift * test
    core = test.T @ shifted
    factor = torch.linalg.cholesky((core + core.T) / 2)
    half = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
    vectors, singular, _ = torch.linalg.svd(half, full_matrices=False)
    return (singular.square() - shift).clamp(min=0), _signed(vectors)


def _signed(vectors: Tensor) -> Tensor:
    at = vectors.abs().argmax(0)
    return vectors * torch.sign(vectors[at, torch.arange(vectors.shape[1])])


class TokenCounts:
    """One-hot inputs (an embedding's tokens), never written out: their second moment is diag(token frequencies).

    An embedding has no bias, so nothing is centred: the directions are the tokens themselves, most frequent first."""

    def __init__(self, vocabulary: int) -> None:
        self.counts = torch.zeros(vocabulary, dtype=torch.int64)

    def add(self, tokens: Tensor) -> None:
        """int64 token ids of any shape."""
        self.counts += torch.bincount(tokens.detach().reshape(-1).cpu(), minlength=len(self.counts))

    def merge(self, other: TokenCounts) -> TokenCounts:
        """Add another part of the data."""
        self.counts += other.counts
        return self

    def support(self, tau: float = 0.9, *, centred: bool = False) -> Support:
        """The tokens that make up the share `tau` of the data.

        Raises `MergeidError` without tokens, and when asked to centre."""
        if centred:
            raise MergeidError("the support of an embedding is not centred, because it has no bias; leave centred off")
        rows = int(self.counts.sum())
        if rows == 0:
            raise MergeidError("no token reached the embedding, so its support is unknown; give calibration data")
        order = torch.argsort(self.counts, descending=True, stable=True)
        order = order[self.counts[order] > 0]
        values = self.counts[order].double() / rows
        return Support(None, order, _dimension(values, 1.0, tau), values, self.counts.double() / rows, 1.0, False, rows)
