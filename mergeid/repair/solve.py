"""Solve the merged network layer by layer, so that it answers as the models do on average; no labels are used.

In order of execution: the inputs of a layer are those of the merged network with all layers before it solved, the
targets the models' own answers at the same place, in the first model's order of neurons, averaged by their shares. The
weights come in closed form (`mergeid.repair.closed_form`), pulled towards the aligned average, and are taken only where
they answer better on examples that the fit has not seen.

A solved network lies off the straight line between the models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergeid.basics.memory import give_back
from mergeid.basics.nested import examples_in
from mergeid.basics.on_demand import OnDemand, formed, is_on_demand, memory_of
from mergeid.basics.on_disk import on_disk
from mergeid.errors import MergeidError
from mergeid.evidence.activations import real_tokens
from mergeid.plugins import Batch
from mergeid.repair.beyond import Beyond
from mergeid.repair.channels import ChannelMoments, fit_channels
from mergeid.repair.closed_form import Fit
from mergeid.repair.derived import fit_derived
from mergeid.repair.few_rows import Gathered, fit_gathered
from mergeid.repair.layers import Layer, Part, answer_of, block_of, by_model, layer_of
from mergeid.repair.layout import layouts
from mergeid.repair.paced import Forward, Paced, Stop, Value, parameters_of

UNSEEN = 4
"""Every fourth example judges, the others fit."""
ROWS_PER_INPUT, LEAST_ROWS = 32, 16384
"""Rows that a layer is fitted on at most: so many per input, and no fewer than that."""
FEWER_THAN_INPUTS = 4096
"""Rows that are taken at most where there are fewer than inputs: matrices over pairs of rows are held then."""


@dataclass(frozen=True)
class SolvedLayer:
    """Attributes:
    weights: names of the tensors. ridge: ρ, infinite where the average stayed.
    before, after: squared error on unseen examples over the targets' spread, of the average and of the solution.
    """

    weights: tuple[str, ...]
    ridge: float
    before: float
    after: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; no ridge where the average stayed."""
        ridge = self.ridge if isfinite(self.ridge) else None
        return {"tensors": list(self.weights), "ridge": ridge, "error_before": self.before, "error_after": self.after}


@dataclass(frozen=True)
class Shares:
    """Weights of the models in what is imitated, with sum 1.

    Attributes:
        last: in the network's last layer; one per model, or a row of them for every example.
        hidden: the same in all layers before.
    """

    last: Sequence[float] | Tensor
    hidden: Sequence[float] | Tensor


@torch.no_grad()
def solve_network(
    merged: nn.Module,
    models: Sequence[nn.Module],
    shares: Sequence[float] | Tensor | Shares,
    forward: Forward,
    batches: Sequence[Batch],
    *,
    frozen: Collection[str] = (),
    heads: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[SolvedLayer]:
    """Change the weights of `merged` in place.

    Args:
        merged: the averaged network, in eval mode.
        models: in the first one's order of neurons, in eval mode, on the same device; not changed.
        shares: weights of the models in what is imitated, with sum 1; or a row of them for every example; or others in
            the last layer than before.
        forward: runs a network on a batch.
        batches: calibration examples, without labels, in the first dimension of every tensor.
        frozen: keys of the state dict that stay as they are.
        heads: key of a weight with the outputs of one model after the other's -> how many are each model's. They are
            fitted to that model's answers alone, on the examples on which it has a share.

    Returns:
        one record per layer that could be solved, in order of execution.

    Raises:
        MergeidError: the networks do not execute the same operations.
    """
    counts = [examples_in(b) for b in batches]
    both = (shares.last, shares.hidden) if isinstance(shares, Shares) else (shares, shares)
    each, before = (_by_batch(w, counts) for w in both)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    nets: list[list[Paced]] = []
    try:
        with sdpa_kernel(SDPBackend.MATH):
            shaped = layouts(merged, forward, batches, frozen)
            found = shaped[0].solvable
            wanted, fitted = frozenset(stop.index for stop in found), parameters_of(merged)
            maps = [{k: v for k, v in layout.beyond.items() if k in wanted} for layout in shaped]
            orders = [layout.outers for layout in shaped]
            alone = [stop for stop in found if not any(stop.index in behind for behind in maps)]
            blocks = {stop.index: block for stop in alone if (block := block_of(stop))}
            nets = [
                [
                    Paced(
                        _twin(net) if b else net,
                        forward,
                        batch,
                        wanted,
                        after=k > 0,
                        keep=_needed(behind),
                        blocks=blocks,
                    )
                    for k, net in enumerate([merged, *models])
                ]
                for b, (batch, behind) in enumerate(zip(batches, maps, strict=True))
            ]
            done: list[SolvedLayer] = []
            large = is_on_demand(merged)
            for k, index in enumerate(sorted(wanted)):
                if progress is not None:
                    progress(k, len(wanted))
                stops = [[net.advance() for net in side] for side in nets]
                if large:
                    give_back()
                at = [behind.pop(index, None) for behind in maps]
                imitated = each if k == len(wanted) - 1 else before
                lie = [order.get(index) for order in orders]
                done += _solve_at(stops, nets, at, lie, imitated, heads or {}, fitted, 7919 * k)
                for side, behind in zip(nets, maps, strict=True):
                    needed = _needed(behind)
                    for net in side:
                        net.forget(needed)
                if large:
                    give_back()
            return done
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for side in nets:
            for net in side:
                net.close()


def _by_batch(shares: Sequence[float] | Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Per batch [examples, models]."""
    weights = torch.as_tensor(shares, dtype=torch.float64)
    return list((weights if weights.dim() == 2 else weights.expand(sum(counts), -1)).split(list(counts)))


def _twin(net: nn.Module) -> nn.Module:
    """The same network with the same tensors: the passes take turns, and what one leaves on a module while it runs is
    not another's."""
    tensors = (*net.parameters(), *net.buffers())
    return copy.deepcopy(net, {id(t): t for t in tensors})


def _needed(behind: Mapping[int, Beyond]) -> frozenset[Value]:
    return frozenset(value for each in behind.values() for value in each.needs)


def _solve_at(
    stops: Sequence[Sequence[Stop | None]],
    nets: Sequence[Sequence[Paced]],
    maps: Sequence[Beyond | None],
    lie: Sequence[int | None],
    shares: Sequence[Tensor],
    heads: Mapping[str, Sequence[int]],
    fitted: Collection[str],
    seed: int,
) -> list[SolvedLayer]:
    first = stops[0][0]
    if any(s is None or first is None or s.signature != first.signature for side in stops for s in side):
        raise MergeidError(
            "the models do not execute the same operations on the same inputs (routed experts?), so the merge cannot "
            "be solved layer by layer; leave out --repair solve"
        )
    assert first is not None
    values = _Values()
    layers = [
        layer_of(values.of(side[0]), len(w), outer or 1)
        for side, w, outer in zip(stops, shares, lie, strict=True)
        if side[0] is not None
    ]
    found = [layer for layer in layers if layer is not None]
    sought = zip(found, nets, shares, lie, strict=False)
    if any(outer is None and _told_apart(layer, side[0].batch, w) for layer, side, w, outer in sought):
        return []  # nobody knows whose rows these are
    used = dict.fromkeys(place.name for places in first.places.values() for place in places)
    names = tuple(name for name in used if name in fitted)
    own = next((heads[name] for name in names if name in heads), None)
    if own is not None:
        found = [by_model(layer, own) for layer in found if len(layer.parts) == 1 and layer.parts[0].derived is None]
    if len(found) < len(stops):
        return []
    gains: dict[int, Tensor | None] = {}
    sides = [_answers(*each, gains) for each in zip(found, stops, nets, maps, shares, strict=True)]
    if not all(_alike(side.gain, sides[0].gain) for side in sides):
        sides = [_answers(a, b, c, None, w, gains) for a, b, c, w in zip(found, stops, nets, shares, strict=True)]
    out: list[SolvedLayer] = []
    for p in range(len(found[0].parts)):
        part = sides[0].part(p)
        seen, unseen = _moments(p, part, sides, [net[0].batch for net in nets], seed)
        if not seen.count or not unseen.count:
            continue
        made = _fitted(part, seen, unseen)
        if made.ridge < inf:
            for side in sides if part.derived is not None else sides[:1]:  # every batch has computed its own
                side.part(p).write(made)
        out.append(SolvedLayer(names, made.ridge, made.before, made.after))
    if any(layer.ridge < inf for layer in out):
        values.keep()
    return out


def _told_apart(layer: Layer, batch: Batch, shares: Tensor) -> bool:
    """Whether it matters which example of a batch a row belongs to."""
    mask = real_tokens(batch)
    padded = mask is not None and mask.shape[1] == layer.positions and not bool(mask.all())
    return padded or not torch.equal(shares, shares[:1].expand_as(shares))


def _fitted(part: Part, seen: Gathered | ChannelMoments, unseen: Gathered | ChannelMoments) -> Fit:
    if isinstance(seen, ChannelMoments) and isinstance(unseen, ChannelMoments):
        if part.derived is not None:
            return fit_derived(seen, unseen, part)
        return fit_channels(seen, unseen, part.matrix, part.offset)
    assert isinstance(seen, Gathered) and isinstance(unseen, Gathered)
    if part.derived is not None:
        sums = [g.moments.centred() if part.free else g.moments for g in (seen, unseen)]
        return fit_derived(sums[0], sums[1], part)
    return fit_gathered(seen, unseen, part.matrix, part.offset, free=part.free)


class _Values:
    """Values of the weights at one operation that are formed on demand: held while the layer is solved, and put on disk
    then."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[OnDemand, Tensor]] = {}

    def of(self, stop: Stop) -> Stop:
        """The same call with plain tensors."""
        return replace(stop, args=[self._value(x) for x in stop.args])

    def _value(self, x: Any) -> Any:
        if not isinstance(x, OnDemand):
            return x
        if memory_of(x) not in self._held:
            self._held[memory_of(x)] = (x, formed(x).clone())
        return self._held[memory_of(x)][1]

    def keep(self) -> None:
        """They are what the weights give from now on."""
        for weight, value in self._held.values():
            weight.becomes(on_disk(value.t() if weight.turned else value))


@dataclass(frozen=True)
class _Side:
    """A layer on one batch.

    Attributes:
        layer: at which the merged network rests.
        answers: what every model answers there, as it is to be compared.
        gain: of every entry of the merged network's answer; None where the same channel's differ.
        shifts: see `Part.free`.
        shares: [examples, models].
    """

    layer: Layer
    answers: list[Tensor]
    gain: Tensor | None
    shifts: bool
    shares: Tensor

    def part(self, p: int) -> Part:
        part = self.layer.parts[p]
        if self.gain is None or not self.gain.dim():
            return part
        free = self.shifts and part.bias is None and not part.alone
        begin = sum(len(other.weight) for other in self.layer.parts[:p])
        return replace(part, gain=self.gain[begin : begin + len(part.weight)], free=free)

    def weights(self, p: int) -> Tensor:
        """What each model counts on every example in what a part is fitted to, [examples, models]."""
        if not self.layer.by_model:
            return self.shares
        alone = torch.zeros_like(self.shares)
        alone[:, p] = (self.shares[:, p] > 0).to(alone)
        return alone


def _answers(
    layer: Layer,
    stops: Sequence[Stop | None],
    nets: Sequence[Paced],
    behind: Beyond | None,
    shares: Tensor,
    gains: dict[int, Tensor | None],
) -> _Side:
    """`gains`: those known so far; batches of one shape share their map, and the map its gain."""
    outs = [answer_of(stop) for stop in stops[1:] if stop is not None]
    steps = {stop.step for stop in stops if stop is not None}
    known = behind is not None and len(steps) == 1 and all(behind.needs <= net.kept.keys() for net in nets)
    if behind is None or not known:
        return _Side(layer, outs, torch.ones(()), False, shares)
    zero = behind(nets[0].state, nets[0].kept, torch.zeros_like(outs[0]))
    answers = [behind.back(behind(net.state, net.kept, y) - zero) for net, y in zip(nets[1:], outs, strict=True)]
    if id(behind) not in gains:
        gains[id(behind)] = _by_channel(layer, behind.gain(nets[0].state, nets[0].kept, outs[0]))
    return _Side(layer, answers, gains[id(behind)], behind.shifts, shares)


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


def _by_channel(layer: Layer, gain: Tensor) -> Tensor | None:
    """One value per channel, None where a channel has several."""
    found = []
    at = torch.linspace(0, layer.positions - 1, min(layer.positions, 8)).long()
    for p in range(len(layer.parts)):
        values = layer.answers(p, gain, at).flatten(0, 1)
        if not torch.allclose(values, values[:1].expand_as(values), rtol=1e-6, atol=1e-9 * float(values.abs().max())):
            return None
        found.append(values[0])
    return torch.cat(found)


def _moments(
    p: int, part: Part, sides: Sequence[_Side], batches: Sequence[Batch], seed: int
) -> tuple[Gathered | ChannelMoments, Gathered | ChannelMoments]:
    """Of the examples to fit on and of the others."""
    d = len(part.weight) if part.alone else part.matrix.shape[1]
    m = len(part.weight)
    total = sum(len(side.shares) for side in sides)
    limit = max(ROWS_PER_INPUT * (1 if part.alone else d), LEAST_ROWS)
    if sum(side.layer.positions * len(side.shares) for side in sides) <= d and not part.alone:
        limit = FEWER_THAN_INPUTS
    most = max(-(-limit // total), 1)
    sums: list[Gathered | ChannelMoments] = [ChannelMoments(m) if part.alone else Gathered(d, m) for _ in range(2)]
    start = 0
    for side, batch in zip(sides, batches, strict=True):
        layer, at = side.layer, None
        if layer.positions > most:
            generator = torch.Generator().manual_seed(seed + 104729 * layer.positions)
            at = torch.randperm(layer.positions, generator=generator)[:most].sort().values
        x = layer.inputs(p, layer.source, at)
        rows = [layer.answers(p, y, at) for y in side.answers]
        answers = torch.zeros_like(rows[0])
        weights = side.weights(p)
        for i, y in enumerate(rows):
            answers += y * weights[:, i, None, None].to(y)
        mask = real_tokens(batch)
        keep = torch.ones(x.shape[:2], dtype=torch.bool)
        if mask is not None and mask.shape[1] == layer.positions:
            keep = (mask if at is None else mask[:, at]).cpu()
        keep = keep & (x.isfinite().all(-1) & answers.isfinite().all(-1)).cpu()
        for k, moments in enumerate(sums):
            chosen = (torch.arange(start, start + len(x)) % UNSEEN == UNSEEN - 1) == bool(k)
            taken = keep & (chosen & weights.any(1).cpu())[:, None]
            moments.add(x[taken], answers[taken])
        start += len(x)
    return sums[0], sums[1]
