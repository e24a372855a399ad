"""``scramble``: another checkpoint of the same function, its neurons in a random order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Output, Progress, Reading, Run, bytes_of
from mergeid.results.merge import ScrambleResult
from mergeid.stages.open import output_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergeid.models.loaded import Loaded
    from mergeid.neuron_graph.neuron_graph import NeuronGraph
    from mergeid.neuron_graph.turned import Turn


@verb
def scramble(
    a: str | os.PathLike[str],
    *,
    output: Annotated[
        str | os.PathLike[str], o.Option("A .safetensors file or a folder.", o.OUTPUT, "OUT", ("-o", "--output"), Path)
    ],
    seed: o.Seed = 0,
    arch: o.Arch = None,
    maps: Annotated[
        bool,
        o.switch(
            "Also draw scales of neurons, orthogonal maps of heads, and signs or orthogonal maps of residual streams.",
            o.HOW,
        ),
    ] = False,
    allow_pickle: o.AllowPickle = False,
    dequantise: o.Dequantise = False,
    shard_size: o.ShardSize = None,
    resume: o.Resume = False,
    force: o.Force = False,
    progress: Progress | None = None,
) -> ScrambleResult:
    """Write a copy of a checkpoint with its neurons in a random order, which computes the same function.

    Args:
        seed: of the random order.
        maps: also apply random scales, signs and orthogonal maps that leave the function unchanged.
        resume, shard_size: as for `merge`.

    Raises `MergeidError` for anything wrong with the input; nothing was written.
    """
    from functools import partial
    from math import prod

    from mergeid.models.graph import graph_of
    from mergeid.stages.write import digest_of, reordered, rewrite

    run = Run.of(progress, seed=seed)
    asked = Output(output, force=force, shard_size=bytes_of(shard_size), resume=resume)
    asked = replace(asked, path=output_path(asked, [a, arch]))
    bench = Workbench(Reading(arch, allow_pickle=allow_pickle, dequantise=dequantise), Run.of(progress))
    loaded = bench.load(a)
    found = graph_of(loaded)
    element = found.random_element(run.generator())
    known = {k: n for n, k in loaded.names.items()}
    files = found.renamed(known)
    turns = []
    if maps:
        from mergeid.stages.symmetries import random_maps

        turns = random_maps(loaded, found, run)
    assert loaded.checkpoint is not None
    count = 0
    table = loaded.checkpoint.table
    total = sum(prod(i.shape) for i in table.values())
    for name, info in table.items():
        if any(files.gather_index(name, d, element) is not None for d in range(len(info.shape))):
            count += prod(info.shape)
    error = _function_change(loaded, partial(_carry, found, element, turns))
    record: dict[str, Any] = {
        "scramble": {"source": loaded.source, "seed": seed, "arch": loaded.arch.id, "max_relative_error": error}
    }
    if maps:
        record["scramble"]["maps"] = [turn.as_map() for turn in turns]
    checkpoint, pieces = reordered(
        loaded.checkpoint, partial(_carry, files, element, [t.renamed(known) for t in turns])
    )
    paths = rewrite(
        checkpoint,
        asked,
        pieces,
        record,
        run,
        {"seed": seed, "maps": maps, "architecture": loaded.arch.id, "order of neurons": digest_of(element)},
    )
    return ScrambleResult(paths, loaded.arch.id, seed, count / max(total, 1), error, len(found.spaces))


def _carry(graph: NeuronGraph, element: Mapping[str, Any], turns: Sequence[Turn], name: str, value: Tensor) -> Tensor:
    """One tensor under maps and a permutation."""
    for turn in turns:
        value = turn.apply(name, value)
    return graph.apply(element, name, value)


def _function_change(loaded: Loaded, carry: Callable[[str, Tensor], Tensor]) -> float:
    """Relative output change of these very weights under a group element: in float64, or in float32 where the network
    has operations that take nothing wider."""
    import torch

    try:
        return _change(loaded, carry, torch.float64)
    except (RuntimeError, TypeError, NotImplementedError):
        return _change(loaded, carry, torch.float32)


def _change(loaded: Loaded, carry: Callable[[str, Tensor], Tensor], dtype: torch.dtype) -> float:
    import copy

    import torch

    from mergeid.basics.casting import in_precision, kept_kind
    from mergeid.basics.nested import mapped
    from mergeid.basics.state import forget_derived, load_weights, tensors_of
    from mergeid.neuron_graph.compare import Yardstick, as_real
    from mergeid.neuron_graph.probe import randomised

    model = in_precision(copy.deepcopy(loaded.model), dtype)
    batch = mapped(loaded.inputs, lambda t: t.to(kept_kind(t, dtype)))
    forget_derived(model)

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: as_real(t) for name, t in loaded.outputs(model, batch).items()}

    yardstick = Yardstick(run())
    load_weights(model, {name: carry(name, value) for name, value in tensors_of(model).items()})
    after = run()
    load_weights(model, randomised(model, torch.Generator().manual_seed(0)))
    yardstick.learn(run())
    return yardstick.error(after)
