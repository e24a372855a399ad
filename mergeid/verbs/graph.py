"""``graph``: which neurons of a model may trade places, found and proven."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.io.opening import Source
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Example, Reading, Run

if TYPE_CHECKING:
    from mergeid.models.loaded import Loaded
    from mergeid.neuron_graph.by_hand import Given
    from mergeid.neuron_graph.neuron_graph import NeuronGraph


@verb
def graph(
    source: Source,
    example_inputs: Any = None,
    *,
    more_inputs: Sequence[Any] | None = (),
    outputs: Sequence[str] = (),
    freeze: Sequence[str] = (),
    tie: Sequence[tuple[str, str]] = (),
    graph: Given | None = None,
    arch: o.Arch = None,
    seed: o.Seed = 0,
    allow_pickle: o.AllowPickle = False,
    dequantise: o.Dequantise = False,
    revision: str | None = None,
) -> NeuronGraph:
    """The verified neuron graph of a model.

    Args:
        source: live module, ``.safetensors`` file, folder, hub id, the name of an architecture (``timm/resnet18``), or
            the path of a config.json; a bare architecture too large to run is traced without weights.
        example_inputs: for a live module: a tensor, tuple or dict of keywords that drives every branch.
        more_inputs: a list of further example inputs, where one does not drive every branch. The facts of all passes
            make one graph, which is verified on every input.
        outputs: names or globs of those outputs of a live module that count (``"logits"``, ``"0"``); by default every
            tensor that it returns, so that none of them may change.
        freeze: axes that must not move: ``"TENSOR[AXIS]"`` or ``"TENSOR"``, TENSOR may be a glob.
        tie: pairs of axes (``("a.weight[0]", "b.weight[0]")``) whose neurons move together.
        graph: a graph written or corrected by hand (a path, the exchange format, or a `NeuronGraph`): it is verified
            instead of tracing one, and what does not hold is frozen.
        arch: the architecture, if the file does not say.
        seed: of example inputs and of the group elements that verify.

    Raises `MergeidError` when the model is not found or not recognised, does not run on the inputs, or when
    `freeze`, `tie` or `graph` do not fit it.
    """
    from mergeid.models.graph import graph_of
    from mergeid.models.loaded import further_batches
    from mergeid.neuron_graph.by_hand import Constraints, read_graph

    if graph is not None and (freeze or tie):
        raise MergeidError(
            "graph= takes the place of tracing, and freeze= and tie= are for a traced graph; edit the graph"
        )
    given = read_graph(graph) if graph is not None else None
    reading = Reading(
        arch, allow_pickle=allow_pickle, dequantise=dequantise, example=Example.of(example_inputs, outputs)
    )
    loaded = _found(source, reading, Run(seed=seed), revision)
    more = further_batches(more_inputs, loaded)
    by_hand = Constraints(freeze, tie) if freeze or tie else None
    return graph_of(loaded, seed=seed, more=more, constraints=by_hand, given=given)


def _found(source: Source, reading: Reading, run: Run, revision: str | None) -> Loaded:
    """A model with its weights, or a bare architecture."""
    from mergeid.models.load import bare, load_model

    if not isinstance(source, (str, os.PathLike)):
        return load_model(source, reading, run, revision=revision)
    text = os.fspath(source)
    config = text.endswith(".json")
    if not config and (os.path.exists(text) or os.path.isdir(text.rpartition("+")[2])):
        return load_model(source, reading, run, revision=revision)
    try:
        return bare(text, run)
    except MergeidError as error:
        if config or "/" not in text:
            raise
        try:
            return load_model(source, reading, run, revision=revision)
        except MergeidError as second:
            raise MergeidError(f"{second} (as an architecture: {error})") from None
