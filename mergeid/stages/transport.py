"""OT fusion from and to checkpoints: models carried onto the first one's neurons, also from other widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mergeid.errors import MergeidError
from mergeid.evaluate.batches import is_whole
from mergeid.io.checkpoint import Checkpoint
from mergeid.matchers.protocol import MatchTask
from mergeid.matchers.transport import transport, transported
from mergeid.matchers.widths import transport_widths
from mergeid.models.load import Loaded, graph_of, load
from mergeid.models.pair import Progress, Source, dataset_of, is_module, open_models, skipped_keys
from mergeid.neuron_graph.neuron_graph import NeuronGraph
from mergeid.nn.names import is_asymmetric
from mergeid.stages.members import Member, Members
from mergeid.stages.plan import batches_of, evidence_of

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.methods.settings import MergeSettings


def transported_members(
    models: Sequence[Source],
    settings: MergeSettings,
    *,
    skip: Sequence[str] = (),
    data: Any = None,
    arch: str | None = None,
    config: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    allow_pickle: bool = False,
    example_inputs: Any = None,
    progress: Progress | None = None,
) -> Members:
    """The models of a merge, every further one carried onto the first one's neurons by optimal transport.

    Where the shapes are those of the first, plans are made from the correlations of activations on `data` (without,
    from the weights), heads and what lies in them included; where the widths differ, from the weights
    (`mergeid.matchers.widths`). Arguments as for `mergeid.merge`; `arch` is the first model's. Skipped tensors count
    for no plan.

    Raises `MergeidError` for anything wrong with the input.
    """
    from mergeid.combine.by_torch import check_finite
    from mergeid.combine.tensor_plan import MERGEABLE

    tell = progress or (lambda *_: None)
    if len({is_module(m) for m in models}) > 1:
        raise MergeidError("some models are live modules and others paths; load the paths into modules first")
    opened = open_models(models, skip=skip, config=config, arch=arch, widths=False, allow_pickle=allow_pickle)
    skip = opened.skip
    if not is_module(models[0]):
        models = [*opened.agreed.models]
    loaded: list[Loaded] = []
    for i, source in enumerate(models):
        tell("loading", i, len(models))
        example = loaded[0].example if loaded and example_inputs is not None else example_inputs
        one = _load(source, arch, not i, example, device, allow_pickle, seed)
        if is_asymmetric(one.state()):
            raise MergeidError(f"{one.source} has asymmetric layers; fold it first (mergeid.nn.fold_file)")
        if one.checkpoint is not None:
            check_finite(one.checkpoint, [n for n, info in one.checkpoint.table.items() if info.dtype in MERGEABLE])
        loaded.append(one)
    first = loaded[0]
    tell("tracing and verifying the neuron graph", 0, 1)
    graph = _unskipped(graph_of(first, seed=seed), first, skip)
    dataset, collate = dataset_of(data, first, limit, seed)
    members = [Member(first)]
    for other in loaded[1:]:
        tell("optimal transport", len(members) - 1, len(loaded) - 1)
        if not _other_widths(graph, first, other, skip):
            correlation = None
            if dataset is not None:
                batches = batches_of(first, dataset, collate, batch_size, tell)
                correlation = evidence_of(
                    graph, first, other, batches, seed, judged=False, whole=is_whole(dataset)
                ).correlations()
            generator = torch.Generator().manual_seed(seed)
            task = MatchTask(graph, first.state(), other.state(), generator, correlation)
            state = transported(graph, transport(task), other.state())
        else:
            graphs = graph, _unskipped(graph_of(other, seed=seed), other, skip)
            state = transport_widths(graphs, (first.model, other.model))
        state = {k: v.to(other.state()[k].dtype) for k, v in state.items()}
        members.append(Member(replace(other, checkpoint=_carried(other, state)), None, state))
    return Members(members, None, settings, dataset, collate)


def _load(
    source: Source, arch: str | None, first: bool, example: Any, device: str, allow_pickle: bool, seed: int
) -> Loaded:
    """`arch` names the first model's; another of other width may need none, or fit the same name."""
    how: dict[str, Any] = {
        "example_inputs": example, "device": device, "allow_pickle": allow_pickle, "seed": seed,
    }  # fmt: skip
    if first or arch is None:
        return load(source, arch=arch, **how)
    try:
        return load(source, **how)
    except MergeidError:
        return load(source, arch=arch, **how)


def _unskipped(graph: NeuronGraph, loaded: Loaded, skip: Sequence[str]) -> NeuronGraph:
    keys = skipped_keys(loaded, skip)
    return graph.on_tensors([t for t in graph.tensors if t not in keys]) if keys else graph


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
                f"tensor {name!r} has shape {list(mine)} in {first.source} and {list(its)} in {other.source}, and not "
                "for the width of a layer; expected the same layers and classes: take the first model's with --skip"
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
