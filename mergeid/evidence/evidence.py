"""Do neurons correspond? Identity, optimal and random objectives on held-out calibration data.

For activations A, B [N, n] on the same inputs, R their Pearson correlations, J(π) = mean_i R[i, π(i)] and
J_rand = mean(R); the identifiability index is ι = (J(id) − J_rand) / (J(π*) − J_rand) (after arXiv 2606.04754's
comparison of identity, optimal and random assignments). π* is fitted on every other calibration example and judged
on the rest, because a match fitted on its own judges is biased in its own favour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mergeid.basics import processes
from mergeid.basics.when_asked import Stored
from mergeid.evidence.activations import Answer, Moments, PairStream, Read, Rows, standardised
from mergeid.evidence.chord import Consumer, chord_deviation, find_consumer
from mergeid.evidence.spool import Spool
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, TapMap

Progress = Callable[[str, int, int], None]
SUMS = 1 << 29
"""Bytes of sums over pairs of neurons that are held at once; where there are more, the activations go to disk."""


@dataclass
class Evidence:
    """What the held-out examples say about one space; sums over the rows of every example.

    Attributes:
        identity, current, matched, random: {example: Σ_rows mean_i z_a[i] z_b[π(i)]} for the identity, the assignment
            that only follows the parents, the matched one and the mean over all assignments.
        rows: {example: number of rows}.
    """

    sums: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, example: Tensor, values: Tensor) -> None:
        """values float64 [rows, 4], example int64 [rows]."""
        ids, inverse = torch.unique(example, return_inverse=True)
        out = torch.zeros(len(ids), 5, dtype=torch.float64)
        out[:, :4].index_add_(0, inverse, values)
        out[:, 4].index_add_(0, inverse, torch.ones(len(inverse), dtype=torch.float64))
        for e, row in zip(ids.tolist(), out.numpy(), strict=True):
            self.sums[e] = self.sums[e] + row if e in self.sums else row

    def table(self) -> np.ndarray:
        """[examples, 5] in order of the examples."""
        return np.stack([self.sums[e] for e in sorted(self.sums)]) if self.sums else np.zeros((0, 5))


@dataclass(frozen=True)
class Judgement:
    """Objectives on the held-out half with bootstrap intervals over examples.

    Attributes:
        j_identity, j_current, j_match, j_random: mean correlations.
        iota, iota_low, iota_high: identifiability index with a 95 % percentile interval; None where the match is not
            significantly better than chance.
        gain, gain_low, gain_high: j_match − j_current with its interval at the level asked for.
        above_chance: lower end of the 95 % interval of max(j_current, j_match) − j_random.
    """

    j_identity: float
    j_current: float
    j_match: float
    j_random: float
    iota: float | None
    iota_low: float | None
    iota_high: float | None
    gain: float
    gain_low: float
    gain_high: float
    above_chance: float
    examples: int


def judge(table: np.ndarray, *, z: float, seed: int, resamples: int = 2000) -> Judgement:
    """Bootstrap over whole examples, π* held fixed.

    Args:
        table: [examples, 5]: sums for identity, current, matched, random, and the number of rows.
        z: standard errors that the interval of the gain extends to either side.
    """
    n = len(table)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    boot = weights @ table
    boot = boot[:, :4] / np.maximum(boot[:, 4:], 1)
    point = table.sum(0)
    identity, current, match, random = (point[:4] / max(point[4], 1)).tolist()
    gains = boot[:, 2] - boot[:, 1]
    spread = float(gains.std(ddof=1))
    span = boot[:, 2] - boot[:, 3]
    best = boot[:, 2] if match > current else boot[:, 1]
    above = float(np.quantile(best - boot[:, 3], 0.025))
    iota = low = high = None
    if np.quantile(span, 0.025) > 0:
        iota = (identity - random) / (match - random)
        told = span != 0  # draws of examples that say nothing
        low, high = np.quantile((boot[told, 0] - boot[told, 3]) / span[told], [0.025, 0.975]).tolist()
    gain = match - current
    return Judgement(
        identity, current, match, random, iota, low, high, gain, gain - z * spread, gain + z * spread, above, n
    )


Key = tuple[str, bytes, bytes]


@dataclass(frozen=True, eq=False)
class Request:
    """`current` against `matched` for one space: permutations of its members."""

    space: str
    current: np.ndarray
    matched: np.ndarray

    @cached_property
    def key(self) -> Key:
        return self.space, self.current.tobytes(), self.matched.tobytes()


class ActivationEvidence:
    """Correlations from the fitting half, judgements from the other half."""

    def __init__(
        self,
        graph: NeuronGraph,
        stream: PairStream,
        taps: Mapping[str, Sequence[TapMap]],
        progress: Progress | None = None,
    ) -> None:
        self.graph, self.stream, self.taps = graph, stream, taps
        self.progress = progress or (lambda *_: None)
        self.fit: dict[tuple[str, int], Moments] = {}
        self.held: dict[tuple[str, int], Moments] = {}
        self.consumers: dict[str, tuple[int, Consumer]] = {
            s: found for s, list_of in taps.items() if (found := find_consumer(graph, s, list_of)) is not None
        }
        self.spool: Spool | None = None
        owners = processes.dealt([graph.by_id[s].size ** 2 for s in taps])
        self._owners = dict(zip(taps, owners, strict=True))
        self._judged: dict[Key, Judgement | None] = {}
        self.members: dict[tuple[str, int], np.ndarray] = {
            (s, k): t.index[t.index >= 0] for s, list_of in taps.items() for k, t in enumerate(list_of)
        }

    def collect(self, *, judged: bool = True) -> None:
        """One pass over the data: moments of both halves, or of the fitting half alone where nothing will be judged.
        Processes share out the batches, and of what these say the spaces."""
        sums = sum(8 * len(members) ** 2 for members in self.members.values())
        if sums > SUMS:
            most = self.stream.per_example * self.stream.count
            self.spool = Spool(2 * most * sum(len(members) for members in self.members.values()))
        owners = self._owners if self.spool is None else None  # what lies on disk is read by all
        for space, k, a, b in self.stream.rows(self.taps, half=None if judged else 0, owners=owners):
            key = (space, k)
            if self.spool is not None:
                self.spool.put(key, a, b)
            if not self._is_mine(space):
                continue
            if key not in self.fit:
                n = a.values.shape[1]
                self.fit[key], self.held[key] = Moments(n, cross=self.spool is None), Moments(n, cross=False)
            half = a.example % 2 == 0
            for moments, chosen in ((self.fit[key], half), (self.held[key], ~half)):
                if chosen.any():
                    moments.add(a.values[chosen], b.values[chosen])
            if self.consumers.get(space, (-1,))[0] == k and (~half).any():
                self.consumers[space][1].add(a.values[~half], b.values[~half])
        for key in self.stream.routed & self.fit.keys():  # what was seen before that was known
            del self.fit[key], self.held[key]
        for m in (*self.fit.values(), *self.held.values()):
            m.finish()
        self._exchange()
        self.consumers = {s: found for s, found in self.consumers.items() if (s, found[0]) not in self.stream.routed}

    def _is_mine(self, space: str) -> bool:
        return self._owners[space] == processes.place()[0]

    def _exchange(self) -> None:
        """All but the sums over pairs of neurons, which stay where their correlations are made."""
        for other in processes.everyones(
            (
                {key: m.without_pairs() for key, m in self.fit.items()},
                self.held,
                {s: found for s, found in self.consumers.items() if self._is_mine(s)},
            )
        ):
            self.fit = {**other[0], **self.fit}
            self.held = {**other[1], **self.held}
            self.consumers |= {s: found for s, found in other[2].items() if not self._is_mine(s)}
        order = list(self.members)
        self.fit, self.held = ({k: of[k] for k in order if k in of} for of in (self.fit, self.held))

    def chord(self, space: str, element: Element, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float | None:
        """Relative chord deviation at the first layer that consumes the space; None where there is none.

        Args:
            element: the assignment of B, all spaces.
            a, b: both models' state dicts.
        """
        if space not in self.consumers:
            return None
        k, consumer = self.consumers[space]
        positions = _positions(self.members[space, k], element[space])
        name = consumer.axis.tensor
        return chord_deviation(self.graph, consumer, a[name], b[name], element, positions)

    def correlations(self) -> Mapping[str, np.ndarray]:
        """Space id -> [size, size] float32, mean over its taps of the correlations on the fitting half. Once only: the
        sums are given up, unless there were too many to be held; then each is made when it is first asked for."""
        counted = [s for s in dict.fromkeys(s for s, _ in self.fit) if self._keys(s)]
        if self.spool is not None:
            return Stored(counted, self._correlation)
        mine = {i: self._correlation(s) for i, s in enumerate(counted) if self._is_mine(s)}
        found = processes.collected(mine, [self._owners[s] for s in counted])
        return dict(zip(counted, found, strict=True))

    def _keys(self, space: str) -> list[tuple[str, int]]:
        return [key for key, moments in self.fit.items() if key[0] == space and moments.count]

    def _correlation(self, space: str) -> np.ndarray:
        keys, n = self._keys(space), self.graph.by_id[space].size
        total = np.zeros((n, n), np.float32)
        if all(np.array_equal(self.members[key], np.arange(n)) for key in keys):
            for key in keys:
                total += self._fitted(key).correlation()
            total /= np.float32(len(keys))
            return total
        count = np.zeros((n, n), np.float32)
        for key in keys:
            members = self.members[key]
            same = _same_copy(members)
            # a member on several positions of the tap counts once for every position
            np.add.at(total, (members[:, None], members[None, :]), self._fitted(key).correlation() * same)
            np.add.at(count, (members[:, None], members[None, :]), same)
        answer: np.ndarray = np.divide(total, count, out=total, where=count > 0)
        return answer

    def _fitted(self, key: tuple[str, int]) -> Moments:
        """Moments of the fitting half, with the cross-covariance."""
        if self.spool is None:
            return self.fit[key]
        moments = Moments(self.fit[key].n, cross=True)
        for a, b in self.spool.rows(key):
            half = a.example % 2 == 0
            if half.any():
                moments.add(a.values[half], b.values[half])
        return moments.finish()

    def _held_out(
        self, taps: Mapping[str, Sequence[TapMap]], take: Callable[[Iterator[Read]], Answer]
    ) -> Iterator[Answer]:
        """What `take` makes of the rows of the half that judges, shared out among processes."""
        spool = self.spool
        if spool is None:
            return self.stream.of_batches(taps, take, half=1)
        kept = [key for key in spool.places if key[0] in taps]
        return processes.in_turn(kept, lambda key: take((*key, a, b) for a, b in spool.rows(key)))

    def judge(self, requests: Sequence[Request], *, z: float, seed: int) -> list[Judgement | None]:
        """One pass over the held-out half for all requests that were not judged before; None where there are fewer than
        four examples to judge by."""
        new = {r.key: r for r in requests if r.key not in self._judged}
        if new:
            self._judged.update(self._judge(new, z, seed))
        return [self._judged[r.key] for r in requests]

    def _judge(self, requests: Mapping[Key, Request], z: float, seed: int) -> dict[Key, Judgement | None]:
        evidence = {key: Evidence() for key in requests}
        identity = self.graph.identity()
        of_space: dict[str, list[Request]] = {}
        for r in requests.values():
            of_space.setdefault(r.space, []).append(r)
        taps = {s: self.taps[s] for s in of_space if s in self.taps}

        def values(reads: Iterator[Read]) -> list[tuple[Key, Tensor, Tensor]]:
            found = []
            for space, k, a, b in reads:
                held = self.held.get((space, k))
                chosen = a.example % 2 == 1
                if held is None or held.count < 2 or not chosen.any():
                    continue
                pairs, members = (_pick(a, chosen), _pick(b, chosen)), self.members[space, k]
                for r in of_space[space]:
                    orders = identity[space], r.current, r.matched
                    found.append((r.key, a.example[chosen], _row_values(*pairs, held, members, orders)))
            return found

        for found in self._held_out(taps, values):
            for key, example, rows in found:
                evidence[key].add(example, rows)
        at = {s.id: i for i, s in enumerate(self.graph.spaces)}
        return {
            key: judge(e.table(), z=z, seed=seed + at[key[0]]) if len(e.sums) >= 4 else None
            for key, e in evidence.items()
        }


def _same_copy(members: np.ndarray) -> np.ndarray:
    """1 where two positions are the same occurrence of their members, else 0 (all ones without repeats)."""
    copy = np.zeros(len(members), np.int64)
    count: dict[int, int] = {}
    for i, m in enumerate(members.tolist()):
        copy[i] = count.get(m, 0)
        count[m] = copy[i] + 1
    answer: np.ndarray = (copy[:, None] == copy[None, :]).astype(np.float32)
    return answer


def _pick(rows: Rows, chosen: Tensor) -> Tensor:
    return rows.values[chosen]


def _row_values(a: Tensor, b: Tensor, held: Moments, members: np.ndarray, perms: Sequence[np.ndarray]) -> Tensor:
    """[rows, 4] float64: mean over neurons of z_a z_b[π] for every permutation, and the mean over all pairs."""
    (mean_a, mean_b), (std_a, std_b) = held.mean, held.std
    za, zb = standardised(a, mean_a, std_a), standardised(b, mean_b, std_b)
    # both models' live neurons count: a constant one correlates with nothing
    live = torch.minimum((std_a > 0).sum(), (std_b > 0).sum()).clamp(min=1)
    out = torch.empty(len(a), 4, dtype=torch.float64)
    for k, perm in enumerate(perms):
        index = _positions(members, perm)
        out[:, k] = (za * zb[:, torch.from_numpy(index)]).sum(1, dtype=torch.float64) / live
    out[:, 3] = (
        za.sum(1, dtype=torch.float64)
        * zb.sum(1, dtype=torch.float64)
        / ((std_a > 0).sum() * (std_b > 0).sum()).clamp(min=1)
    )
    return out


def _positions(members: np.ndarray, perm: np.ndarray) -> np.ndarray:
    """For every position of the tap the position of B that a permutation of members puts there."""
    order = np.argsort(members, kind="stable")
    unique, counts = np.unique(members, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.empty(len(members), np.int64)
    rank[order] = np.arange(len(members)) - np.repeat(starts, counts)
    target = np.searchsorted(unique, perm[members])
    answer: np.ndarray = order[starts[target] + rank]
    return answer
