"""``scramble``: another checkpoint of the same function, its neurons in a random order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Output, Progress, Reading, Run
from mergeid.results.merge import ScrambleResult
from mergeid.stages.open import output_path

if TYPE_CHECKING:
    from mergeid.models.loaded import Loaded
    from mergeid.neuron_graph.neuron_graph import NeuronGraph


@verb
def scramble(
    a: str | os.PathLike[str],
    *,
    output: Annotated[
        str | os.PathLike[str], o.Option("A .safetensors file or a folder.", o.OUTPUT, "OUT", ("-o", "--output"), Path)
    ],
    seed: o.Seed = 0,
    arch: o.Arch = None,
    force: o.Force = False,
    allow_pickle: o.AllowPickle = False,
    progress: Progress | None = None,
) -> ScrambleResult:
    """A random group element applied to a checkpoint: another checkpoint of the same function.

    Args:
        seed: of the group element.

    Raises `MergeidError` for anything wrong with the input; nothing was written.
    """
    from functools import partial
    from math import prod

    from mergeid.models.graph import graph_of
    from mergeid.stages.write import moved, rewrite

    run = Run.of(progress, seed=seed)
    target = output_path(Output(output, force=force), [a, arch])
    bench = Workbench(Reading(arch, allow_pickle=allow_pickle), Run.of(progress))
    loaded = bench.load(a)
    found = graph_of(loaded)
    element = found.random_element(run.generator())
    files = found.renamed({k: n for n, k in loaded.names.items()})
    assert loaded.checkpoint is not None
    count = 0
    table = loaded.checkpoint.table
    total = sum(prod(i.shape) for i in table.values())
    for name, info in table.items():
        if any(files.gather_index(name, d, element) is not None for d in range(len(info.shape))):
            count += prod(info.shape)
    error = _function_change(loaded, found, element)
    record = {"scramble": {"source": loaded.source, "seed": seed, "arch": loaded.arch.id, "max_relative_error": error}}
    paths = rewrite(loaded.checkpoint, target, moved(partial(files.apply, element)), record, run, force)
    return ScrambleResult(paths, loaded.arch.id, seed, count / max(total, 1), error, len(found.spaces))


def _function_change(loaded: Loaded, found: NeuronGraph, element: Mapping[str, Any]) -> float:
    """Relative output change of these very weights under a group element, in float64."""
    import copy

    import torch

    from mergeid.basics.nested import mapped
    from mergeid.basics.state import forget_derived, load_weights
    from mergeid.neuron_graph.verify import relative_error

    model = copy.deepcopy(loaded.model).double()
    batch = mapped(loaded.inputs, lambda t: t.double() if t.is_floating_point() else t)
    forget_derived(model)
    with torch.no_grad():
        before = list(loaded.outputs(model, batch).values())
        load_weights(model, found.apply_state(element, model.state_dict()))
        after = list(loaded.outputs(model, batch).values())
    return relative_error(before, after)
