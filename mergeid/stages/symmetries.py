"""Symmetries beside the permutations, undone before neurons are compared: signs and orthogonal maps of residual
streams, positive scales of neurons."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mergeid.basics.memory import give_back
from mergeid.basics.on_demand import is_on_demand
from mergeid.basics.state import load_weights, tensors_of
from mergeid.matchers.balancing import EQUAL, balanced
from mergeid.matchers.copies import copy_order
from mergeid.matchers.streams import carried, may_differ, refused, rotation
from mergeid.models.loaded import Loaded
from mergeid.neuron_graph.neuron_graph import NeuronGraph
from mergeid.neuron_graph.powers import Trial, find_powers
from mergeid.neuron_graph.scaled import Powers
from mergeid.neuron_graph.space import Space
from mergeid.neuron_graph.turned import FULL, SIGNS, Turn, nearest
from mergeid.neuron_graph.turns import find_turns
from mergeid.nn.names import is_asymmetric
from mergeid.request.request import Run
from mergeid.stages.open import Pair

MOST = 100_000_000
"""Parameters beyond which nothing is looked for: a float64 copy and its gradients would not fit beside the models."""


@dataclass(frozen=True)
class Undone:
    """What is done to B before its neurons are compared with A's, and after they have A's order.

    Attributes:
        pair: the models as they are compared: the same functions.
        before: changes of B as it lies.
        after: changes of B in A's order.
    """

    pair: Pair
    before: tuple[Turn, ...] = ()
    after: tuple[Turn, ...] = ()
    notes: tuple[str, ...] = ()


def undone(pair: Pair, run: Run) -> Undone:
    """The pair with B's signs, orthogonal maps and scales brought to A's, where that is clearly nearer; a permuted copy
    has A's."""
    graph = pair.graph
    real, a, b = pair.weights()
    spaces = _free(graph)
    size = sum(p.numel() for p in pair.a.model.parameters())
    if not spaces or size > MOST or is_asymmetric(a) or any(is_on_demand(m.model) for m in (pair.a, pair.b)):
        return Undone(pair)
    if not _differ(spaces, a, b) and not any(may_differ(real, s.id, (a, b)) for s in spaces):
        return Undone(pair)
    if copy_order(real, a, b) is not None:
        return Undone(pair)
    if graph.powers is None:
        run.tell("trying scales and signs", 0, 1)
        graph.powers = find_powers(
            graph,
            pair.a.model,
            pair.a.inputs,
            pair.a.whole_outputs,
            generator=run.generator(),
            only=[s.id for s in spaces],
        )
        give_back()  # a copy of the model, in float64
    return _scaled(_carried(pair, graph.powers), graph.powers)


def random_maps(loaded: Loaded, graph: NeuronGraph, run: Run) -> list[Turn]:
    """Random maps, one after the other, of all that leave a model's function unchanged besides permutations: streams,
    scales, heads."""
    generator, state = run.generator(), loaded.state()
    powers = find_powers(
        graph, loaded.model, loaded.inputs, loaded.whole_outputs, generator=generator, only=[s.id for s in _free(graph)]
    )
    turns: list[Turn] = []
    for stream in powers.streams:
        draw = torch.randn(stream.size, stream.size, generator=generator, dtype=torch.float64).numpy()
        if refused(stream, (state, state)):
            turns.append(stream.sign(np.where(draw[0] < 0, -1.0, 1.0)))
        else:
            turns.append(rotation(stream, nearest(FULL, draw), (state, state)))
    for one in powers.scaled:
        turns.append(one.scale(torch.randn(one.size, generator=generator, dtype=torch.float64).exp().numpy()))
    heads = find_turns(graph, loaded.model, loaded.inputs, loaded.whole_outputs, generator=generator)
    return [*turns, *(turnable.random(generator) for turnable in heads)]


def _free(graph: NeuronGraph) -> list[Space]:
    """Spaces of neurons that no other space moves."""
    return [s for s in graph.spaces if not s.parents and len(s.axes) > 1 and s.size > 1]


def _carried(pair: Pair, powers: Powers) -> Undone:
    """Streams of B brought onto A's."""
    graph, turns, notes = pair.graph, [], []
    for stream in powers.streams:
        found = carried(graph, stream, (pair.a.state(), pair.b.state()))
        label = f"{stream.space} ({graph.by_id[stream.space].label})"
        if found.refused:
            notes.append(f"B's residual stream {label} looks rotated, but it cannot be turned back: {found.refused}")
        turn = found.turn
        if turn is None or not _stays(pair.b, turn):
            continue
        turns.append(turn)
        if turn.of.kind == SIGNS:
            done = f"the signs of {turn.turned} of {stream.size} neurons of {label} were flipped in B"
        else:
            done = f"B's residual stream {label} was rotated onto A's, and its {len(stream.gains)} gains became A's"
        notes.append(f"{done}; its function is unchanged")
    return Undone(replace(pair, b=_changed(pair.b, turns)), tuple(turns), (), tuple(notes))


def _scaled(found: Undone, powers: Powers) -> Undone:
    """Scales of both balanced; B gets A's afterwards."""
    pair = found.pair
    scales = balanced(powers.scaled, (pair.a.state(), pair.b.state()))
    if scales is None:
        return found
    ours, back, theirs = scales
    spaces = len({t.of.space for t in theirs if t.turned})
    note = (
        f"neurons of {spaces} spaces have different scales in A and B; they were balanced before they were compared, "
        "and B gets A's, which leaves its function unchanged"
    )
    changed = replace(pair, a=_changed(pair.a, ours), b=_changed(pair.b, theirs))
    return Undone(changed, (*found.before, *theirs), tuple(back), (*found.notes, note))


def _stays(loaded: Loaded, turn: Turn) -> bool:
    """Whether a change leaves the model's outputs as they are, in float64."""
    try:
        return Trial(loaded.model, loaded.inputs, loaded.whole_outputs, None).stays([turn])
    except (RuntimeError, NotImplementedError):  # some kernels refuse float64
        return False


def _changed(loaded: Loaded, turns: Sequence[Turn]) -> Loaded:
    """The model with its weights changed."""
    if not turns:
        return loaded
    net = copy.deepcopy(loaded.model)
    names = {axis.tensor for turn in turns for axis in turn.of.axes}
    state = {k: v for k, v in tensors_of(net).items() if k in names}
    for turn in turns:
        state = {k: turn.apply(k, v) for k, v in state.items()}
    load_weights(net, state)
    return replace(loaded, model=net)


def _differ(spaces: Sequence[Space], a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether the lengths of rows, whatever their order, are others in B."""
    for axis in (axis for space in spaces for axis in space.axes):
        ours, theirs = (
            s[axis.tensor].detach().double().movedim(axis.axis, 0).flatten(1 if s[axis.tensor].dim() > 1 else 0)
            for s in (a, b)
        )
        x, y = (v.norm(dim=1) if v.dim() > 1 else v.abs() for v in (ours, theirs))
        x, y = (v.cpu().sort().values.clamp(min=1e-12 * float(v.max()) + 1e-30) for v in (x, y))
        if not float((x.log() - y.log()).abs().mean()) <= EQUAL:
            return True
    return False
