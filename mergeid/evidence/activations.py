"""Activations of both models on the same calibration data, streamed: nothing that grows with the data is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mergeid.basics import processes
from mergeid.data.batches import MadeBatches
from mergeid.errors import MergeidError
from mergeid.evidence.taps import Key
from mergeid.neuron_graph.neuron_graph import TapMap

CHUNK, FEW = 512, 32
"""Rows that are added to the statistics at once, whatever the batch size; without a cross-covariance, whose sums are
large beside the rows, few."""

HELD = 1 << 28
"""Bytes of both models' sampled activations that are held at once: larger batches run in parts."""

Forward = Callable[[nn.Module, Any], Any]
Answer = TypeVar("Answer")


Take = Callable[[Key, Tensor], Any]


class _Enough(Exception):
    """All was seen."""


class TapReader:
    """Runs a model and returns the tensors at the taps of interest, or what is taken from them on the spot."""

    def __init__(self, model: nn.Module, forward: Forward, taps: Sequence[TapMap], *, stops: bool = False) -> None:
        """`stops`: a forward pass ends where the last of the tensors was seen."""
        self.model, self.forward, self.stops = model, forward, stops
        self.wanted = {(t.module, t.kind, t.call) for t in taps}
        self._calls: dict[tuple[str, str], int] = {}
        self._found: dict[Key, Any] = {}
        self._take: Take = _copied

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for name in {m for m, _, _ in self.wanted}:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._reader(name, "in")))
            handles.append(module.register_forward_hook(self._reader(name, "out")))
        try:
            yield
        finally:
            for h in handles:
                h.remove()

    def _reader(self, name: str, kind: str) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, output: Any = None) -> None:
            call = self._calls.get((name, kind), 0)
            self._calls[name, kind] = call + 1
            if (name, kind, call) in self.wanted:
                leaves = tree_leaves(args if kind == "in" else output)
                tensor = next((t for t in leaves if isinstance(t, Tensor)), None)
                if tensor is not None:
                    self._found[name, kind, call] = self._take((name, kind, call), tensor.detach())
                    if self.stops and self._found.keys() == self.wanted:
                        raise _Enough

        return read

    def __call__(self, batch: Any, take: Take | None = None) -> dict[Key, Any]:
        """(module, "in" or "out", call) -> a copy of the tensor, or what `take` makes of it while the model runs: it
        must keep no view, since later operations may work in place."""
        self._calls, self._found, self._take = {}, {}, take or _copied
        with self._hooks(), torch.no_grad(), suppress(_Enough):
            self.forward(self.model, batch)
        found, self._found = self._found, {}
        return found


def _copied(key: Key, tensor: Tensor) -> Tensor:
    return tensor.clone()


@dataclass
class Rows:
    """Sampled activations at one tap: `values` float32 [rows, members on the tap], `example` int64 [rows], of so many
    `positions` in all examples together."""

    values: Tensor
    example: Tensor
    positions: int = 0


def sample_rows(tensor: Tensor, tap: TapMap, ids: Tensor, mask: Tensor | None, per_example: int, seed: int) -> Rows:
    """At most `per_example` positions of every example, the same for any batch size.

    Args:
        tensor: the activation, examples (times windows, …) in dimension 0.
        ids: int64 [examples]: places of the batch's examples in the data.
        mask: bool [examples, tokens] of real tokens, where there is one.
    """
    examples = len(ids)
    present = torch.from_numpy(np.flatnonzero(tap.index >= 0)).to(tensor.device)
    rest = [d for d in range(tensor.dim()) if d not in tap.dims]
    flat = tensor.permute(*rest, *tap.dims).reshape(-1, len(tap.index))[:, present]
    positions = flat.shape[0]
    rows = positions // examples
    flat = flat[: rows * examples].reshape(examples, rows, flat.shape[1])
    if mask is None or rows != mask.shape[1]:
        picked = _positions(rows, per_example, seed).to(flat.device)
        values = flat[:, picked].reshape(-1, flat.shape[2])
        return Rows(_numbers(values.float().cpu(), tap), ids.repeat_interleave(len(picked)), positions)
    parts, example = [], []
    for e in range(examples):
        valid = torch.nonzero(mask[e]).reshape(-1)
        valid = valid[_positions(len(valid), per_example, seed).to(valid.device)]
        parts.append(flat[e, valid.to(flat.device)])
        example.append(ids[e].expand(len(valid)))
    return Rows(_numbers(torch.cat(parts).float().cpu(), tap), torch.cat(example), positions)


def _numbers(values: Tensor, tap: TapMap) -> Tensor:
    """Masked positions (infinite, or no numbers) count as 0. Raises `MergeidError` where nothing else is there."""
    finite = values.isfinite()
    if finite.all():
        return values
    if not finite.any():
        raise MergeidError(
            f"layer {tap.module or 'the model'} takes or gives nothing but NaN or infinite numbers on the data; give "
            "examples on which both models' activations are finite"
        )
    return values.masked_fill(~finite, 0.0)


def real_tokens(batch: Mapping[str, Any]) -> Tensor | None:
    """bool [examples, tokens]: which are no padding; None where the batch does not say."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


@cache
def _positions(count: int, most: int, seed: int) -> Tensor:
    """At most `most` of `count` positions, drawn once per count."""
    if count <= most:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed + 7919 * count)
    return torch.randperm(count, generator=generator)[:most].sort().values


class Moments:
    """Means, variances and (if asked) the cross-covariance of two models' activations, in float64, shifted by the
    first chunk's mean; rows are added in chunks of a fixed size."""

    def __init__(self, n: int, cross: bool) -> None:
        self.n, self.count = n, 0
        self.chunk = CHUNK if cross else FEW
        self.shift: tuple[Tensor, Tensor] | None = None
        self.sums = torch.zeros(2, n, dtype=torch.float64)
        self.squares = torch.zeros(2, n, dtype=torch.float64)
        self.cross = torch.zeros(n, n, dtype=torch.float64) if cross else None
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        self._waiting.append((a, b))
        if sum(len(x) for x, _ in self._waiting) >= self.chunk:
            self._flush(False)

    def _flush(self, everything: bool) -> None:
        if not self._waiting:
            return
        a, b = (torch.cat([pair[k] for pair in self._waiting]) for k in range(2))
        while len(a) >= self.chunk or (everything and len(a)):
            self._add(a[: self.chunk], b[: self.chunk])
            a, b = a[self.chunk :], b[self.chunk :]
        self._waiting = [(a.clone(), b.clone())] if len(a) else []  # no views of the whole

    def _add(self, a: Tensor, b: Tensor) -> None:
        if self.shift is None:
            self.shift = (a.mean(0, dtype=torch.float64).float(), b.mean(0, dtype=torch.float64).float())
        a, b = a - self.shift[0], b - self.shift[1]
        self.count += len(a)
        for k, x in enumerate((a, b)):
            self.sums[k] += x.sum(0, dtype=torch.float64)
            self.squares[k] += x.double().square().sum(0)
        if self.cross is not None:
            self.cross += a.T @ b  # added in float64

    def finish(self) -> Moments:
        self._flush(True)
        return self

    def without_pairs(self) -> Moments:
        """The same without the cross-covariance."""
        found = copy.copy(self)
        found.cross = None
        return found

    @property
    def mean(self) -> tuple[Tensor, Tensor]:
        """Means of A and B, float32 [n] each."""
        assert self.shift is not None
        return tuple(s + (m / max(self.count, 1)).float() for s, m in zip(self.shift, self.sums, strict=True))  # type: ignore[return-value]

    @property
    def std(self) -> tuple[Tensor, Tensor]:
        """Standard deviations, float32 [n]; 0 for constant neurons."""
        out = []
        for k in range(2):
            m = self.sums[k] / max(self.count, 1)
            var = self.squares[k] / max(self.count, 1) - m.square()
            noise = 1e-10 * (self.squares[k] / max(self.count, 1) + self.mean[k].double().square())
            out.append(torch.where(var > noise, var, torch.zeros_like(var)).sqrt().float())
        return out[0], out[1]

    def correlation(self) -> np.ndarray:
        """Pearson correlations [n, n] float32, A's neuron i with B's neuron j; 0 for constant neurons. The sums that
        they come from are given up: of a wide layer they are large."""
        assert self.cross is not None
        n = max(self.count, 1)
        cov, self.cross = self.cross, None
        cov /= n
        cov.addr_(self.sums[0] / n, self.sums[1] / n, alpha=-1)
        for std, shape in zip(self.std, ((-1, 1), (1, -1)), strict=True):
            cov *= torch.where(std > 0, 1 / std.double(), 0.0).reshape(shape)
        return cov.clamp_(-1, 1).float().numpy()


def standardised(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x − mean) / std, 0 for constant neurons."""
    return torch.where(std > 0, (values - mean) / torch.where(std > 0, std, torch.ones_like(std)), torch.zeros(()))


Read = tuple[str, int, Rows, Rows]
"""Space, tap number, rows of A, rows of B."""


@dataclass(frozen=True)
class _Part:
    """Some examples of a batch.

    Attributes:
        batch: makes it.
        first, size: its examples in the data.
        ids: those that are of interest.
        begins: whether no part of the batch came before.
        is_whole: whether it is one example, and cannot be cut.
    """

    batch: Callable[[], Mapping[str, Any]]
    first: int
    size: int
    ids: Tensor
    begins: bool
    is_whole: bool


def _sized(batches: Iterable[Mapping[str, Any]], whole: bool) -> Iterator[tuple[int, Callable[[], Mapping[str, Any]]]]:
    """Every batch, made when it is asked for, with its number of examples."""
    if isinstance(batches, MadeBatches):
        for i, examples in enumerate(batches.slices):
            yield len(examples), lru_cache(1)(partial(batches.__getitem__, i))
        return
    for batch in batches:
        size = 1 if whole else next(len(x) for x in batch.values() if isinstance(x, Tensor))
        yield size, partial(dict, batch)


@dataclass
class PairStream:
    """Both models over the calibration batches, tap by tap. B runs as it is; permutations are applied to what is read.

    Attributes:
        batches: starts a new pass; yields batches (first dimension = examples). Processes share out those of
            `MadeBatches`.
        whole: every batch is one example, taken as it is.
        per_example: most positions (tokens, pixels) of an example that count as rows.
        count: examples in one pass.
        routed: (space, tap number) where the models chose other positions (experts), found on the way: what one sees
            there is not what the other sees.
    """

    reader_a: TapReader
    reader_b: TapReader
    batches: Callable[[], Iterable[Mapping[str, Any]]]
    whole: bool = False
    per_example: int = 32
    seed: int = 0
    count: int = 0
    routed: set[tuple[str, int]] = field(default_factory=set)

    def rows(
        self, taps: Mapping[str, Sequence[TapMap]], *, half: int | None = None, owners: Mapping[str, int] | None = None
    ) -> Iterator[tuple[str, int, Rows, Rows]]:
        """(space, tap number, rows of A, rows of B) for every batch (or part of one), space and tap.

        Args:
            half: only every other example, 0: from the first on, 1: from the second on.
            owners: space -> the only process that needs its rows; None: all do.
        """

        def parts(found: list[Read]) -> list[list[Read]]:
            assert owners is not None
            return [[read for read in found if owners[read[0]] == i] for i in range(processes.place()[1])]

        for found in self.of_batches(taps, list, half=half, parts=None if owners is None else parts):
            while found:
                space, k, a, b = found.pop(0)
                if (space, k) not in self.routed:
                    yield space, k, a, b

    def of_batches(
        self,
        taps: Mapping[str, Sequence[TapMap]],
        take: Callable[[Iterator[Read]], Answer],
        *,
        half: int | None = None,
        parts: Callable[[Answer], Sequence[Answer]] | None = None,
    ) -> Iterator[Answer]:
        """What `take` makes of the rows of every batch, or part of one, in order: processes share them out.

        Args:
            take: given (space, tap number, rows of A, rows of B), as `rows` has them.
            parts: what each process is to have of an answer; None: each has all of it.
        """

        def work(part: _Part) -> tuple[Answer, set[tuple[str, int]]]:
            return take(self._read(taps, part, half)), self.routed

        def split(done: tuple[Answer, set[tuple[str, int]]]) -> list[tuple[Answer, set[tuple[str, int]]]]:
            assert parts is not None
            return [(part, done[1]) for part in parts(done[0])]

        world = processes.place()[1]
        left = self._parts(taps, half)
        while some := list(islice(left, world)):
            for answer, routed in processes.shared(some, work, None if parts is None else split):
                self.routed |= routed
                yield answer

    def _read(self, taps: Mapping[str, Sequence[TapMap]], part: _Part, half: int | None) -> Iterator[Read]:
        batch, ids = part.batch(), part.ids
        if not part.is_whole:
            if not all(isinstance(x, Tensor) and x.dim() and len(x) == part.size for x in batch.values()):
                if not part.begins:  # all of it was taken
                    return
                ids = torch.arange(part.first, part.first + part.size)
            elif len(ids) < part.size:
                at = ids - part.first
                batch = {k: x[at.to(x.device)] for k, x in batch.items()}
        take = partial(self._sampled, taps, ids, real_tokens(batch))
        values = [
            {k: rows for at_tap in reader(batch, take).values() for k, rows in at_tap.items()}
            for reader in (self.reader_a, self.reader_b)
        ]
        for space, list_of in taps.items():
            for k in range(len(list_of)):
                if (space, k) not in values[0] or (space, k) not in values[1] or (space, k) in self.routed:
                    continue
                a, b = values[0].pop((space, k)), values[1].pop((space, k))
                if a.positions != b.positions or a.positions % len(ids):
                    self.routed.add((space, k))
                else:
                    yield space, k, a, b

    def _parts(self, taps: Mapping[str, Sequence[TapMap]], half: int | None) -> Iterator[_Part]:
        """Batches that give no more than `HELD` bytes of rows, with the places of their examples in the data."""
        members = sum(int((t.index >= 0).sum()) for list_of in taps.values() for t in list_of)
        most = max(HELD // max(2 * 4 * self.per_example * members, 1), 1)
        first = 0
        for size, batch in _sized(self.batches(), self.whole):
            ids = torch.arange(first, first + size)
            chosen = ids if half is None else ids[ids % 2 == half]
            for some in chosen.split(most) if len(chosen) else ():
                yield _Part(batch, first, size, some, bool(some[0] == chosen[0]), self.whole)
            first += size

    def _sampled(
        self, taps: Mapping[str, Sequence[TapMap]], ids: Tensor, mask: Tensor | None, key: Key, tensor: Tensor
    ) -> dict[tuple[str, int], Rows]:
        """The rows at every tap of one tensor: taken at once, since whole activations of a batch are large."""
        return {
            (space, k): sample_rows(tensor, tap, ids, mask, self.per_example, self.seed)
            for space, list_of in taps.items()
            for k, tap in enumerate(list_of)
            if (tap.module, tap.kind, tap.call) == key and tensor.dim() == tap.ndim
        }
