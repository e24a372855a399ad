"""Rewrite a checkpoint tensor by tensor: a random element of its symmetry group, or an alignment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.io.checkpoint import Checkpoint
from mergeid.models.load import Loaded, graph_of, load
from mergeid.models.pair import Progress, output_path
from mergeid.request.boundary import verb

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.neuron_graph.neuron_graph import NeuronGraph


@dataclass
class ScrambleResult:
    """Attributes:
    moved_share: share of the parameters whose tensor has moved.
    max_relative_error: largest output change in float64 over the largest output.
    """

    files: list[Path]
    arch: str
    seed: int
    moved_share: float
    max_relative_error: float
    spaces: int

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "files": [str(f) for f in self.files]}


def rewrite(
    checkpoint: Checkpoint,
    output: Path,
    transform: Callable[[str, Tensor], Tensor],
    record: Mapping[str, Any],
    force: bool,
) -> list[Path]:
    """The checkpoint with every tensor transformed (equal shape and dtype), streamed."""
    from mergeid.io.companions import default_companions
    from mergeid.io.stream import CheckpointWriter
    from mergeid.models.configs import config_files

    writer = CheckpointWriter(
        output,
        like=checkpoint,
        companions=default_companions(checkpoint),
        replace=config_files(checkpoint),
        record=dict(record),
        force=force,
    )
    with writer:
        for name in writer.order():
            writer.write(name, [transform(name, checkpoint.tensor(name)).contiguous()])
    return list(writer.paths())


@verb
def scramble(
    a: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    seed: int = 0,
    arch: str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ScrambleResult:
    """A random group element applied to a checkpoint: another checkpoint of the same function.

    Args:
        seed: of the group element.

    Raises `MergeidError` for anything wrong with the input; nothing was written.
    """
    from math import prod

    import torch

    target = output_path(output, [a, arch], force)
    loaded = load(a, arch=arch, allow_pickle=allow_pickle)
    found = graph_of(loaded)
    element = found.random_element(torch.Generator().manual_seed(seed))
    files = found.renamed({k: n for n, k in loaded.names.items()})
    assert loaded.checkpoint is not None
    moved = 0
    table = loaded.checkpoint.table
    total = sum(prod(i.shape) for i in table.values())
    for name, info in table.items():
        if any(files.gather_index(name, d, element) is not None for d in range(len(info.shape))):
            moved += prod(info.shape)
    error = _function_change(loaded, found, element)
    record = {"scramble": {"source": loaded.source, "seed": seed, "arch": loaded.arch.id, "max_relative_error": error}}
    paths = rewrite(loaded.checkpoint, target, lambda n, t: files.apply(element, n, t), record, force)
    return ScrambleResult(paths, loaded.arch.id, seed, moved / max(total, 1), error, len(found.spaces))


def _function_change(loaded: Loaded, found: NeuronGraph, element: Mapping[str, Any]) -> float:
    """Relative output change of these very weights under a group element, in float64."""
    import copy

    import torch

    from mergeid.data.nested import mapped
    from mergeid.models.state import forget_derived, load_weights
    from mergeid.neuron_graph.verify import relative_error

    model = copy.deepcopy(loaded.model).double()
    batch = mapped(loaded.inputs, lambda t: t.double() if t.is_floating_point() else t)
    forget_derived(model)
    with torch.no_grad():
        before = list(loaded.outputs(model, batch).values())
        load_weights(model, found.apply_state(element, model.state_dict()))
        after = list(loaded.outputs(model, batch).values())
    return relative_error(before, after)
