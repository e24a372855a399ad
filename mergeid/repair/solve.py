"""Solve the merged network layer by layer, so that it answers as the models do on average; no labels are used.

In order of execution: the inputs of a layer are those of the merged network with all layers before it solved, the
targets the models' own answers at the same place, in the first model's order of neurons, averaged by their shares. The
weights come in closed form (`mergeid.repair.closed_form`), pulled towards the aligned average, and are taken only where
they answer better on examples that the fit has not seen.

A solved network lies off the straight line between the models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergeid.errors import MergeidError
from mergeid.evidence.activations import real_tokens
from mergeid.plugins import Batch
from mergeid.repair.channels import ChannelMoments, fit_channels
from mergeid.repair.closed_form import Fit, Moments, fit
from mergeid.repair.derived import fit_derived
from mergeid.repair.layers import KINDS, Layer, Part, layer_of
from mergeid.repair.paced import Forward, Paced, Stop, operations

UNSEEN = 4
"""Every fourth example judges, the others fit."""
ROWS_PER_INPUT, LEAST_ROWS = 8, 4096
"""Rows that a layer is fitted on at most: so many per input, and no fewer than that."""


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


@torch.no_grad()
def solve_network(
    merged: nn.Module,
    models: Sequence[nn.Module],
    shares: Sequence[float],
    forward: Forward,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[SolvedLayer]:
    """Change the weights of `merged` in place.

    Args:
        merged: the averaged network, in eval mode.
        models: in the first one's order of neurons, in eval mode, on the same device; not changed.
        shares: weights of the models in what is imitated, with sum 1.
        forward: runs a network on a batch.
        batches: calibration examples, without labels, in the first dimension of every tensor.
        seed: of the positions (pixels, tokens) that are looked at in every example.

    Returns:
        one record per layer that could be solved, in order of execution.

    Raises:
        MergeidError: the networks do not execute the same operations.
    """
    examples = [_examples(b) for b in batches]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    nets: list[list[Paced]] = []
    try:
        with sdpa_kernel(SDPBackend.MATH):
            wanted = _wanted(merged, forward, batches[0])
            nets = [
                [
                    Paced(merged, forward, batch, wanted, after=False),
                    *(Paced(m, forward, batch, wanted, after=True) for m in models),
                ]
                for batch in batches
            ]
            done: list[SolvedLayer] = []
            for k in range(len(wanted)):
                if progress is not None:
                    progress(k, len(wanted))
                stops = [[net.advance() for net in side] for side in nets]
                done += _solve_at(stops, shares, batches, examples, seed + 7919 * k)
            for side in nets:
                side[0].advance()
            return done
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for side in nets:
            for net in side:
                net.close()


def _examples(batch: Batch) -> int:
    return next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim())


def _wanted(model: nn.Module, forward: Forward, batch: Batch) -> frozenset[int]:
    """Numbers of the operations whose weights take part in no other one: a weight that is used twice cannot suit both
    places."""
    seen = operations(model, forward, batch)
    uses = Counter(key for stop in seen for keys in stop.places.values() for key in keys)
    return frozenset(
        stop.index
        for stop in seen
        if stop.name.removeprefix("aten.") in KINDS
        and all(uses[key] == 1 for keys in stop.places.values() for key in keys)
    )


def _solve_at(
    stops: Sequence[Sequence[Stop | None]],
    shares: Sequence[float],
    batches: Sequence[Batch],
    examples: Sequence[int],
    seed: int,
) -> list[SolvedLayer]:
    first = stops[0][0]
    if any(s is None or first is None or s.signature != first.signature for side in stops for s in side):
        raise MergeidError(
            "the models do not execute the same operations on the same inputs (routed experts?), so the merge cannot "
            "be solved layer by layer; leave out --repair solve"
        )
    assert first is not None
    layers = [layer_of(side[0], n) for side, n in zip(stops, examples, strict=True) if side[0] is not None]
    if any(layer is None for layer in layers):
        return []
    found = [layer for layer in layers if layer is not None]
    names = tuple(dict.fromkeys(name for keys in first.places.values() for name, *_ in keys))
    out: list[SolvedLayer] = []
    for p, part in enumerate(found[0].parts):
        seen, unseen = _moments(p, part, found, stops, shares, batches, seed)
        if not seen.count or not unseen.count:
            continue
        made = _fitted(part, seen, unseen)
        if made.ridge < inf:
            for layer in found if part.derived is not None else found[:1]:  # every batch has computed its own
                layer.parts[p].write(made)
        out.append(SolvedLayer(names, made.ridge, made.before, made.after))
    return out


def _fitted(part: Part, seen: Moments | ChannelMoments, unseen: Moments | ChannelMoments) -> Fit:
    if part.derived is not None:
        return fit_derived(seen, unseen, part)
    if isinstance(seen, ChannelMoments) and isinstance(unseen, ChannelMoments):
        return fit_channels(seen, unseen, part.weight, part.bias)
    assert isinstance(seen, Moments) and isinstance(unseen, Moments)
    return fit(seen, unseen, part.matrix, part.bias)


def _moments(
    p: int,
    part: Part,
    layers: Sequence[Layer],
    stops: Sequence[Sequence[Stop | None]],
    shares: Sequence[float],
    batches: Sequence[Batch],
    seed: int,
) -> tuple[Moments | ChannelMoments, Moments | ChannelMoments]:
    """Of the examples to fit on and of the others."""
    d = len(part.weight) if part.alone else part.matrix.shape[1]
    m = len(part.weight)
    total = sum(_examples(b) for b in batches)
    most = max(-(-max(ROWS_PER_INPUT * (1 if part.alone else d), LEAST_ROWS) // total), 1)
    sides: list[Moments | ChannelMoments] = [ChannelMoments(m) if part.alone else Moments(d, m) for _ in range(2)]
    start = 0
    for layer, side, batch in zip(layers, stops, batches, strict=True):
        at = None
        if layer.positions > most:
            generator = torch.Generator().manual_seed(seed + 104729 * layer.positions)
            at = torch.randperm(layer.positions, generator=generator)[:most].sort().values
        answers: Tensor | None = None
        for share, stop in zip(shares, side[1:], strict=True):
            y = layer.rows(p, layer.source, _first_out(stop), at)[1] * share
            answers = y if answers is None else answers + y
        assert answers is not None and side[0] is not None
        x = layer.rows(p, layer.source, _first_out(side[1]), at)[0]
        mask = real_tokens(batch)
        keep = torch.ones(x.shape[:2], dtype=torch.bool)
        if mask is not None and mask.shape[1] == layer.positions:
            keep = (mask if at is None else mask[:, at]).cpu()
        for k, moments in enumerate(sides):
            chosen = (torch.arange(start, start + len(x)) % UNSEEN == UNSEEN - 1) == bool(k)
            if mask is not None or not bool(chosen.all()):
                taken = keep & chosen[:, None]
                moments.add(x[taken], answers[taken])
            else:
                moments.add(x.flatten(0, 1), answers.flatten(0, 1))
        start += len(x)
    return sides[0], sides[1]


def _first_out(stop: Stop | None) -> Tensor:
    assert stop is not None
    return stop.out[0] if isinstance(stop.out, (tuple, list)) else stop.out
