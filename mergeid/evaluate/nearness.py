"""How far a network is from what the models of a merge say, on unlabelled inputs.

A classifying head: with p_i what model i predicts, s_i its share and H the cross-entropy, an input (or token) is worth

    S(q) = −log Σ_i s_i exp(−H(p_i, q))

to a network that predicts q. That is the likelihood of a mixture: one of the models is right about this input, and its
share is how likely that is beforehand. Where the models agree it is the cross-entropy against their prediction. Where
they do not (fine-tunes on different tasks), the mean would reward a merge that lies between them and is right about
neither; this asks that the merge keeps to either.

S counts how unsure the models are themselves, and how much they disagree. What remains is the *excess*: S(q) less the
smallest of S(p_1), …, S(p_n) and S(Σ s_i p_i) on that input, in nats. It is 0 for a merge that says what one of the
models says, or their mean, whatever that is; with one model it is the Kullback-Leibler divergence. It may be negative.
Of tokens those count that the task scores (`mergeid.evaluate.scored`).

Any other output: the squared distance over the variance of what it should be, about its mean over the examples (the
unexplained share of the variance: a network that always says the same is at 1 or beyond); of the models and their mean
the one that is nearest, where the mean counts only if their outputs vary together: that of two networks which
contradict each other says nothing. Several outputs: each by itself.

A head with the classes of several models: each model speaks about its own classes alone, on its own examples or on all
(`mergeid.evaluate.own_columns`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergeid.basics.memory import few_rows
from mergeid.basics.spread import Spread
from mergeid.basics.state import evaluating
from mergeid.data.batches import FixedBatches, input_dtype, to_model
from mergeid.errors import MergeidError
from mergeid.evaluate.agreement import Tally
from mergeid.evaluate.own_columns import OwnColumns, together
from mergeid.evaluate.scored import per_example
from mergeid.models.loaded import ModuleAdapter
from mergeid.models.running import fits_the_model
from mergeid.plugins import Batch
from mergeid.results.agreement import Agreement
from mergeid.results.comparison import NATS, RELATIVE

if TYPE_CHECKING:
    from mergeid.models.examples import Examples
    from mergeid.models.loaded import Loaded

EXAMPLES = 256
"""Calibration examples that networks are run on, evenly spaced."""
KEPT = 1 << 28
"""Bytes of inputs and outputs that are kept between networks; where there are more, the models run again for each."""


def joined(parts: Sequence[Mapping[str, Far]]) -> dict[str, Far]:
    """How far a network is on all parts of a panel, from how far it is on each."""
    return {n: Far(far.unit, torch.cat([p[n].rows for p in parts], 1)) for n, far in parts[0].items()}


@dataclass(frozen=True)
class Far:
    """How far a network is by one of its outputs.

    Attributes:
        unit: "nats" or "relative".
        rows: float64 [references, examples]: what it may be near to; of classifying heads the nearest is taken example
            by example, and there is one row.
    """

    unit: str
    rows: Tensor

    @property
    def distance(self) -> float:
        """Mean over the examples, infinite where it is no number."""
        means = self.rows.mean(1).tolist()
        return min(m if isfinite(m) else inf for m in means)

    @property
    def nearest(self) -> Tensor:
        """The row of the nearest reference, [examples]."""
        return self.rows[int(torch.nan_to_num(self.rows.mean(1), nan=inf).argmin())]


class Panel:
    """The models of a merge, and the examples on which networks are compared with them.

    Args:
        first: of the models, how they are run.
        models: the networks that were merged; shares: their weights in what they say together. Models that are
            subtracted (a negative share) are not right about anything.
        either: a network may keep to any of the models; else it is compared with their mean alone.
        examples: of which up to `EXAMPLES`, evenly spaced, are looked at, without labels. Where each belongs to a
            model, that model alone counts on it.
        parts: how many parts these examples are dealt out to: networks can be asked about one part at a time. Or how
            many, and how many of them are looked at.
        batch_size: for speed and memory only.
    """

    def __init__(
        self,
        first: Loaded,
        models: Sequence[nn.Module],
        *,
        shares: Sequence[float],
        examples: Examples,
        batch_size: int,
        device: str,
        either: bool = True,
        parts: int | tuple[int, int] = 1,
    ) -> None:
        self.first, self.either, self.owners = first, either, examples.owners
        self._heads = classifying(first)
        self._columns = None
        if first.joined is not None:
            self._columns = columns = OwnColumns(frozenset(self._heads), first.joined.classes)
            if self.owners is None:
                self._heads = {columns.called(n, k) for n in self._heads for k in range(len(columns.classes))}
        shares = shares if self.owners is None and self._columns is None else [1.0]
        self.models = [evaluating(m.to(device)) for m in models]
        self._data, self.batch_size, self.device = examples, batch_size, device
        weights = torch.tensor(shares, dtype=torch.float64)
        self.shares = weights.clamp(min=0) / weights.clamp(min=0).sum() if either else weights
        count = len(examples)
        dealt, looked_at = parts if isinstance(parts, tuple) else (parts, parts)
        self._dealt = min(dealt, count)
        self.parts = [
            _spaced(range(k, count, dealt), max(EXAMPLES // dealt, 1)) for k in range(min(looked_at, self._dealt))
        ]
        self._kept: list[list[tuple[Batch, list[dict[str, Tensor]]]]] | None = [[] for _ in self.parts]
        self._least: list[dict[str, Tensor]] = []
        self._spreads: dict[str, list[Spread]] = {}
        self._apart: dict[str, list[Tensor]] = {}
        self._uneven: set[str] = set()
        self._listen()

    @property
    def examples(self) -> int:
        return sum(map(len, self.parts))

    @property
    def disagreement(self) -> float:
        """How far the models are from their mean, by their shares, mean over the outputs: Kullback-Leibler divergence
        (nats) of a classifying head, squared distance over the variance of any other output."""
        found = []
        for name, rows in self._apart.items():
            scale = self._spreads[name][0].variance(torch.float32) if name in self._spreads else 1.0
            found.append(float(torch.cat(rows).mean()) / scale)
        return sum(found) / len(found)

    def agreement(self) -> dict[str, Agreement]:
        """How far the models agree and how sure they are, by classifying outputs. Nothing where each of them speaks
        about inputs or classes of its own, on which the others need not agree, and of a single model."""
        if self.owners is not None or self._columns is not None or int((self.shares > 0).sum()) < 2:
            return {}
        tallies: dict[str, Tally] = {}
        for part in range(len(self.parts)):
            for (batch, own), count in zip(self._said(part), self._sizes(part), strict=True):
                for name in own[0]:
                    if name in self._heads and name not in self._uneven and own[0][name].shape[-1] > 1:
                        tally = tallies.setdefault(name, Tally(self.first, self.shares.tolist()))
                        tally.add([o[name] for o in own], batch, count)
        return {name: tally.agreement() for name, tally in tallies.items()}

    def rest(self, part: int) -> Examples:
        """The calibration data that this part says nothing about: all but every so manieth example. Where there is one
        part only, all of it."""
        if self._dealt == 1:
            return self._data
        return self._data.taken([i for i in range(len(self._data)) if i % self._dealt != part])

    def far(self, net: nn.Module, part: int) -> dict[str, Far]:
        """How far a network on the device is from the models on the examples of one part, by the outputs' names."""
        found: dict[str, list[Tensor]] = {}
        sizes, owned = self._sizes(part), self._owned(part)
        for (batch, own), count, owners in zip(self._said(part), sizes, owned, strict=True):
            with torch.no_grad(), fits_the_model(batch):
                said = self._outputs(net, batch)
            if self._columns is not None:
                said = self._columns.of([said], owners)
            for name, outs in ((n, [o[n] for o in own]) for n in own[0] if n not in self._uneven):
                if name in said and said[name].shape == outs[0].shape:
                    rows = self._rows(name, said[name], outs, batch, count)
                else:  # another number of boxes
                    rows = torch.full((len(self._spreads.get(name, [0])), count), inf, dtype=torch.float64)
                found.setdefault(name, []).append(rows.cpu())
        least = self._least[part]
        whole = {name: torch.cat(rows, 1) for name, rows in found.items()}
        return {n: Far(NATS, rows - least[n]) if n in least else Far(RELATIVE, rows) for n, rows in whole.items()}

    def _outputs(self, net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found = self.first.outputs(net, batch)
        read = {n: t for n, t in found.items() if n not in self.first.unread} or found
        return {n: torch.view_as_real(t) if t.is_complex() else t for n, t in read.items()}

    def _batches(self, part: int) -> FixedBatches:
        return self._data.taken(self.parts[part]).batches(self.batch_size)

    def _sizes(self, part: int) -> list[int]:
        return [len(s) for s in self._batches(part).slices]

    def _said(self, part: int) -> Iterator[tuple[Batch, list[dict[str, Tensor]]]]:
        """Every batch of a part with the models' outputs."""
        if self._kept is not None and self._kept[part]:
            yield from self._kept[part]
            return
        for raw, owners in zip(self._batches(part), self._owned(part), strict=True):
            kinds = [input_dtype(m) for m in (self.first.model, *self.models)]
            suits = {kind: to_model(raw, torch.device(self.device), kind) for kind in dict.fromkeys(kinds)}
            batch = suits[kinds[0]]
            with torch.no_grad(), fits_the_model(batch):
                own = [self._outputs(m, suits[kind]) for m, kind in zip(self.models, kinds[1:], strict=True)]
            if self._columns is not None:
                yield batch, [self._columns.of(own, owners)]
            else:
                yield batch, own if owners is None else [_of_owners(own, owners)]

    def _owned(self, part: int) -> list[Tensor | None]:
        """Numbers of the models that the examples of every batch belong to; None: they belong to no one."""
        if self.owners is None:
            return [None] * len(self._sizes(part))
        owners = torch.tensor([self.owners[i] for i in self.parts[part]])
        return [owners[at.start : at.stop] for at in self._batches(part).slices]

    def _listen(self) -> None:
        """Run the models once: what they reach themselves, and how much their outputs vary.

        Raises `MergeidError` where none of these has the same shape in all models."""
        size = 0
        for part in range(len(self.parts)):
            least: dict[str, list[Tensor]] = {}
            said = []
            for (batch, own), count in zip(self._said(part), self._sizes(part), strict=True):
                for name in own[0]:
                    outs = [o[name] for o in own if name in o]
                    if name in self._uneven or len(outs) < len(own) or len({o.shape for o in outs}) > 1:
                        self._uneven.add(name)  # as many boxes as each model sees
                        continue
                    if name in self._heads and outs[0].shape[-1] > 1:
                        least.setdefault(name, []).append(
                            per_example(self._best(outs), batch, count, self.first)[None].cpu()
                        )
                        apart = per_example(self._divergence(outs), batch, count, self.first)
                    else:
                        spreads = self._spreads.setdefault(name, [Spread() for _ in self._references(outs)])
                        for spread, reference in zip(spreads, self._references(outs), strict=True):
                            spread.add(reference, batch)
                        apart = per_example(self._deviation(outs), batch, count)
                    self._apart.setdefault(name, []).append(apart.cpu())
                tensors = [*(v for v in batch.values() if isinstance(v, Tensor)), *(t for o in own for t in o.values())]
                size += sum(t.numel() * t.element_size() for t in tensors)
                if self._kept is not None and size <= KEPT:
                    said.append((batch, own))
                else:
                    self._kept = None
            self._least.append({name: torch.cat(rows, 1) for name, rows in least.items()})
            if self._kept is not None:
                self._kept[part] = said
        for name in self._uneven:
            self._spreads.pop(name, None)
            self._apart.pop(name, None)
            for reached in self._least:
                reached.pop(name, None)
        if not self._apart:
            names = ", ".join(map(repr, sorted(self._uneven)))
            raise MergeidError(
                f"the models return outputs of different shapes for the same inputs ({names}), so nothing says how "
                "near a merge is to them; name outputs of a fixed shape (outputs=), or give no data"
            )

    def _references(self, outs: Sequence[Tensor]) -> list[Tensor]:
        """What an output that is no classification may be near to: the models' mean, and each of them."""
        mean = sum((w * o.double() for w, o in zip(self.shares.tolist(), outs, strict=True)), torch.zeros(()))
        alone = [o for w, o in zip(self.shares.tolist(), outs, strict=True) if w > 0] if self.either else []
        return [mean, *(alone if len(alone) > 1 else [])]

    def _best(self, outs: Sequence[Tensor]) -> Tensor:
        """The smallest S of the models and of their mean, [...]."""
        found = []
        for parts in few_rows(*outs):
            said = torch.stack([p.softmax(-1) for p in parts])
            mean = torch.einsum("m,mrc->rc", self.shares.to(said.device), said)
            tried = [mean, *said[(self.shares > 0).to(said.device)]] if self.either else [mean]
            found.append(torch.stack([self._worth(said, q.log()) for q in tried]).amin(0))
        return torch.cat(found).reshape(outs[0].shape[:-1])

    def _deviation(self, outs: Sequence[Tensor]) -> Tensor:
        """Squared distance of the models' outputs from their mean, weighed by shares."""
        mean = sum((w * o.double() for w, o in zip(self.shares.tolist(), outs, strict=True)), torch.zeros(()))
        gaps = [torch.where(o == mean, 0.0, o.double() - mean).square() for o in outs]
        apart = sum((w * g for w, g in zip(self.shares.tolist(), gaps, strict=True)), torch.zeros(()))
        return apart.mean(-1) if apart.dim() > 1 else apart

    def _divergence(self, outs: Sequence[Tensor]) -> Tensor:
        """The models' mean Kullback-Leibler divergence from their mean, [...]: entropies weighed by shares."""
        shares = self.shares.to(outs[0].device)
        found = []
        for parts in few_rows(*outs):
            said = torch.stack([p.softmax(-1) for p in parts])
            mean = torch.einsum("m,mrc->rc", shares, said)
            found.append(torch.special.entr(mean).sum(-1) - torch.einsum("m,mrc->r", shares, torch.special.entr(said)))
        return torch.cat(found).reshape(outs[0].shape[:-1])

    def _worth(self, said: Tensor, log_q: Tensor) -> Tensor:
        """S of log-probabilities [rows, classes], given what the models predict [models, rows, classes]."""
        shares = self.shares.to(said.device)
        if not self.either:
            said, shares = torch.einsum("m,mrc->rc", shares, said)[None], torch.ones_like(shares[:1])
        # classes that nobody names count nothing, be they ruled out (a logit of -inf) or not
        against = (said * log_q).masked_fill(said == 0, 0.0).sum(-1)
        return -torch.logsumexp(against + shares.log()[:, None], 0)

    def _rows(self, name: str, out: Tensor, outs: Sequence[Tensor], batch: Batch, count: int) -> Tensor:
        """[references, examples] of one batch: S of a classifying head, or the relative squared distance."""
        if name not in self._spreads:
            found = [
                self._worth(torch.stack([p.softmax(-1) for p in parts]), logits.log_softmax(-1))
                for logits, *parts in few_rows(out, *outs)
            ]
            return per_example(torch.cat(found).reshape(out.shape[:-1]), batch, count, self.first)[None]
        rows = []
        for spread, reference in zip(self._spreads[name], self._references(outs), strict=True):
            # what is infinite in both, such as a mask, is no difference
            gap = torch.where(out == reference, 0.0, out.double() - reference.double()).square()
            gap = gap.mean(-1) if gap.dim() > 1 else gap
            rows.append(per_example(gap, batch, count) / spread.variance(outs[0].dtype))
        if not self._agree(name, outs[0].dtype):
            rows[0] = torch.full_like(rows[0], inf)
        return torch.stack(rows)

    def _agree(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the models' outputs vary together: their mean varies more than that of as many unrelated ones."""
        mean, *alone = (spread.variance(dtype) for spread in self._spreads[name])
        shares = [w for w in self.shares.tolist() if w > 0]
        return not alone or mean > sum(w * w * v for w, v in zip(shares, alone, strict=True))


def _spaced(of: range, most: int) -> list[int]:
    """Up to `most` of a range, evenly spaced."""
    count = len(of)
    return list(of) if count <= most else [of[k * count // most] for k in range(most)]


def _of_owners(said: Sequence[Mapping[str, Tensor]], owners: Tensor) -> dict[str, Tensor]:
    """Of every example what its own model says."""
    return {name: together([s[name] for s in said], owners) for name in said[0]}


def classifying(first: Loaded) -> set[str]:
    """Names of the outputs whose last dimension holds logits: the adapter can score the task output against labels, or
    a live module's library says so."""
    if isinstance(first.adapter, ModuleAdapter) and (name := first.adapter.logits(first.model)) is not None:
        return {name}
    example: Mapping[str, Any] = first.example
    if "labels" not in example or "labels" in first.inputs:
        return set()
    device = next((p.device for p in first.model.parameters()), torch.device("cpu"))
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in example.items()}
    with torch.no_grad():
        found = first.outputs(first.model, first.inputs_of(moved))
        name, out = next(iter(found.items()))
        return {name} if first.loss(out, moved) is not None else set()
