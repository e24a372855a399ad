"""OT fusion from and to checkpoints: models carried onto the first one's neurons, also from other widths."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.opening import Source, is_live
from mergeid.matchers.protocol import MatchTask
from mergeid.matchers.transport import transport, transported
from mergeid.matchers.widths import transport_widths
from mergeid.models.examples import Examples
from mergeid.models.graph import graph_of
from mergeid.models.load import load_model
from mergeid.models.loaded import Loaded
from mergeid.neuron_graph.reals import in_reals, out_of_reals
from mergeid.nn.names import is_asymmetric
from mergeid.request.request import Calibration, Example, Reading, Run
from mergeid.stages.gather import evidence_of
from mergeid.stages.members import Member, Members
from mergeid.stages.open import Met, Pair, skipped_keys, unskipped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergeid.methods.settings import MergeSettings
    from mergeid.neuron_graph.neuron_graph import NeuronGraph


def transported_members(met: Met, settings: MergeSettings, calibration: Calibration) -> Members:
    """The models of a merge, every further one carried onto the first one's neurons by optimal transport.

    Where the shapes are those of the first, plans are made from the correlations of activations on the calibration
    examples (without, from the weights), heads and what lies in them included; where the widths differ, from the
    weights (`mergeid.matchers.widths`). Skipped tensors count for no plan.

    Args:
        met: opened without regard to widths. The architecture that is named is the first model's.

    Raises `MergeidError` for anything wrong with the input.
    """
    bench, run = met.bench, met.bench.run
    if len({is_live(m) for m in met.models}) > 1:
        raise MergeidError("some models are live modules and others paths; load the paths into modules first")
    loaded: list[Loaded] = []
    for i, source in enumerate(met.models):
        run.tell("loading", i, len(met.models))
        loaded.append(_load(source, bench.reading, run, loaded[0] if loaded else None))
    first = loaded[0]
    graph = unskipped(bench.graph(first), first, met.skip)
    examples = bench.examples(calibration, first)
    members = [Member(met.with_joined(first))]
    for other in loaded[1:]:
        run.tell("optimal transport", len(members) - 1, len(loaded) - 1)
        state = _carried_state(Pair(first, other, graph), examples, met.skip, run)
        members.append(Member(replace(other, checkpoint=_carried(other, state)), None, state))
    return Members(members, None, settings, examples)


def _carried_state(pair: Pair, examples: Examples | None, skip: Sequence[str], run: Run) -> dict[str, Tensor]:
    """B's weights on A's neurons, in B's number formats."""
    first, other, graph = pair.a, pair.b, pair.graph
    own = other.state()
    if not _other_widths(graph, first, other, skip):
        correlation = None
        if examples is not None:
            correlation = evidence_of(pair, examples, run, judged=False).correlations()
        real, (ours, theirs) = in_reals(graph, first.state(), own)
        task = MatchTask(real, ours, theirs, run.generator(), correlation)
        state = out_of_reals(transported(real, transport(task), theirs), own)
    else:
        graphs = graph, unskipped(graph_of(other, seed=run.seed), other, skip)
        state = transport_widths(graphs, (first.model, other.model))
    return {k: v.to(own[k].dtype) for k, v in state.items()}


def _load(source: Source, reading: Reading, run: Run, first: Loaded | None) -> Loaded:
    """A model; `reading.arch` names the first one's, and another of other width may need none, or fit the same name."""
    from mergeid.combine.by_torch import check_finite
    from mergeid.combine.tensor_plan import mergeable

    if first is not None and reading.example.inputs is not None:
        reading = replace(reading, example=Example(first.example, reading.example.outputs))
    if first is None or reading.arch is None:
        found = load_model(source, reading, run)
    else:
        try:
            found = load_model(source, replace(reading, arch=None), run)
        except MergeidError:
            found = load_model(source, reading, run)
    if is_asymmetric(found.state()):
        raise MergeidError(f"{found.source} has asymmetric layers; fold it first (mergeid.nn.fold_file)")
    if found.checkpoint is not None:
        check_finite(found.checkpoint, mergeable(found.checkpoint))
    return found


def _other_widths(graph: NeuronGraph, first: Loaded, other: Loaded, skip: Sequence[str]) -> bool:
    """Whether any axis of neurons differs in size. Raises `MergeidError` where anything else does."""
    ours, theirs = ({k: tuple(v.shape) for k, v in x.state().items()} for x in (first, other))
    skipped = skipped_keys(first, skip)
    different = False
    for name in (n for n in ours if n not in skipped):
        if name not in theirs:
            raise MergeidError(
                f"{other.source} has no tensor {name!r}, which {first.source} has; expected the same layers"
            )
        mine, its = ours[name], theirs[name]
        if mine == its:
            continue
        free = {axis.axis for _, axis in graph.on_tensor.get(name, [])}
        if len(mine) != len(its) or any(
            m != n and d not in free for d, (m, n) in enumerate(zip(mine, its, strict=True))
        ):
            raise MergeidError(
                f"tensor {name!r} has shape {list(mine)} in {first.source} and {list(its)} in {other.source}, which "
                f"is not a difference in the width of a layer; expected the same layers and classes: take the first "
                f"model's with --skip"
            )
        different = True
    return different


def _carried(loaded: Loaded, state: dict[str, Tensor]) -> Checkpoint | None:
    """The checkpoint with what was carried in place of its own tensors; it says where it came from."""
    own = loaded.checkpoint
    if own is None:
        return None
    tensors = {n: state[loaded.names[n]] if loaded.names.get(n) in state else own.tensor(n) for n in own.table}
    kinds = {n: own.tensor(n).dtype for n in own.table}
    found = Checkpoint.from_tensors(
        {n: t.to(kinds[n]).contiguous() for n, t in tensors.items()},
        source=own.source,
        path=own.path,
        config=own.config,
        is_folder=own.is_folder,
    )
    found.files, found.config_changed = own.files, own.config_changed
    return found
