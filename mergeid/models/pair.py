"""Two models of one architecture, loaded and compared, with their common neuron graph and data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, Union

from mergeid.errors import MergeidError, NoModel
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.weights import PICKLES
from mergeid.models.load import find_architecture, graph_of, load, load_checkpoint, opened
from mergeid.models.loaded import Example, Loaded, as_batch
from mergeid.models.offload import state_of
from mergeid.plugins import Adapter, Architecture

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeid.models.configs import Agreed
    from mergeid.neuron_graph.neuron_graph import NeuronGraph

Source = Union[str, "os.PathLike[str]", "nn.Module", Checkpoint]
Progress = Callable[[str, int, int], None]
LIMIT = 512
"""Calibration examples that are used unless told otherwise."""


@dataclass
class Pair:
    """Attributes:
    a, b: as networks that compute one function of their weights.
    agreed: their checkpoints, and what was overruled.
    """

    a: Loaded
    b: Loaded
    graph: NeuronGraph
    agreed: Agreed


@dataclass
class Opened:
    """Models that can be merged tensor by tensor, as far as names, configs and heads say.

    Attributes:
        agreed: their checkpoints, with the same heads and with configs of one function.
        skip: the globs that still say something.
    """

    agreed: Agreed
    skip: tuple[str, ...]


def is_module(source: Source) -> TypeGuard[nn.Module]:
    return not isinstance(source, (str, os.PathLike, Checkpoint))


def open_models(
    models: Sequence[Source],
    base: Source | None = None,
    *,
    skip: Sequence[str] = (),
    config: str | None = None,
    arch: str | None = None,
    widths: bool = True,
    heads: bool = True,
    allow_pickle: bool = False,
) -> Opened:
    """Open all models, give them the same heads, and compare their configs. Nothing is built for models of equal
    configs and names.

    Args:
        config: "a", "b", …: whose config counts where they differ in what the network computes.
        widths: whether layers must be of equal widths; else the caller compares the tensors' names and shapes.
        heads: whether the task heads are merged too.

    Raises:
        MergeidError: adapters instead of models, heads that contradict their config, configs that differ.
    """
    from fnmatch import fnmatchcase

    from mergeid.combine.tensor_plan import plan_many
    from mergeid.io.lora import refuse_adapter
    from mergeid.models.configs import agree
    from mergeid.models.heads import SameHeads, same_heads

    sources = [*models, *([base] if base is not None else [])]
    everyone = open_plain(sources, allow_pickle)
    for checkpoint in everyone:
        refuse_adapter(checkpoint)
    given = same_heads(everyone, skip) if heads else SameHeads(everyone)
    left = {name for c in given.models for name in c.table}
    kept = tuple(
        p for p in skip if any(fnmatchcase(n, p) for n in left) or not any(fnmatchcase(n, p) for n in given.dropped)
    )
    origin = given.models.pop() if base is not None else None
    if widths:  # other architectures are called so, and not configs that differ
        plan_many(given.models, base=origin, skip=kept)
    agreed = agree(
        given.models,
        origin,
        config=config,
        same_head=heads and not kept,
        widths=widths,
        arch=arch,
        modules=[m for m in sources if is_module(m)] if all(map(is_module, sources)) and not kept else (),
    )
    agreed.notes = [*given.notes, *agreed.notes]
    return Opened(agreed, kept)


def _check_pair(first: Checkpoint, second: Checkpoint, skip: Sequence[str], dtype: str | None) -> None:
    """Both checkpoints compared by their headers, before anything is built."""
    from mergeid.combine.tensor_plan import plan_tensors

    tensors = plan_tensors(first, second, skip=skip, dtype=dtype)
    from mergeid.combine.by_torch import check_finite

    for checkpoint in (first, second):
        check_finite(checkpoint, tensors.merged)


def load_pair(
    a: Source,
    b: Source,
    *,
    arch: str | None,
    skip: Sequence[str],
    allow_pickle: bool,
    device: str,
    seed: int,
    dtype: str | None = None,
    config: str | None = None,
    example_inputs: Any = None,
    progress: Progress | None = None,
) -> Pair:
    if is_module(a) != is_module(b):
        raise MergeidError("one model is a live module and the other a path; load the path into a module first")
    tell = progress or (lambda *_: None)
    met = open_models([a, b], skip=skip, config=config, arch=arch, allow_pickle=allow_pickle)
    first, second = met.agreed.models
    skip = met.skip
    _check_pair(first, second, skip, dtype)
    if is_module(a):
        given = Example.of(example_inputs)
        one = load(a, arch=arch, example_inputs=given, seed=seed)
        again = given if given.inputs is not None else Example(one.example, given.outputs)
        two = load(b, arch=arch, example_inputs=again, seed=seed)
        two.adapter, two.arch = one.adapter, one.arch
        if met.agreed.chosen is not None:
            _in_one_class(one, two, config == "b")
        found = graph_of(one, seed=seed)
    else:
        try:
            one, two, found = _built(first, second, arch, device, seed, tell)
        except MergeidError as error:
            raise NoModel(str(error)) from error
    if skip:
        keys = skipped_keys(one, skip)
        found = found.on_tensors([t for t in found.tensors if t not in keys])
    return Pair(one, two, found, met.agreed)


def _built(
    first: Checkpoint, second: Checkpoint, arch: str | None, device: str, seed: int, tell: Progress
) -> tuple[Loaded, Loaded, NeuronGraph]:
    """Both models, each from its own config, and their common graph."""
    import torch

    tell("loading", 0, 2)
    adapter, found = find_architecture(first, arch)
    generator = torch.Generator().manual_seed(seed)
    one = load_checkpoint(first, adapter, found, device=device, generator=generator)
    tell("loading", 1, 2)
    other = found if second.config is None else find_architecture(second, arch)[1]
    two = load_checkpoint(second, adapter, other, device=device, generator=generator)
    tell("tracing and verifying the neuron graph", 0, 1)
    return one, two, _common_graph(adapter, found, one, seed)


def _in_one_class(one: Loaded, two: Loaded, second: bool) -> None:
    """Both live models as the one whose config was chosen computes, each with its own weights."""
    import copy

    from mergeid.models.state import load_weights

    chosen, other = (two, one) if second else (one, two)
    model = copy.deepcopy(chosen.model)
    load_weights(model, other.state())
    other.model = model


def skipped_keys(loaded: Loaded, skip: Sequence[str]) -> set[str]:
    """Keys of the model's state dict whose tensors --skip takes from A as they are."""
    from fnmatch import fnmatchcase

    return {key for name, key in loaded.names.items() if any(fnmatchcase(name, p) for p in skip)}


def load_base(
    base: Source,
    like: Loaded,
    *,
    arch: str | None,
    skip: Sequence[str],
    allow_pickle: bool,
    seed: int,
    overruled: bool = False,
) -> dict[str, Tensor]:
    """The weights that both models were fine-tuned from, under the keys of `like`'s state dict.

    Args:
        overruled: whether `like`'s config counts where the base's differs.

    Raises `MergeidError` where it is no checkpoint of the same architecture."""
    from fnmatch import fnmatchcase

    if is_module(base) != (like.checkpoint is None):
        raise MergeidError("the base is a live module and the models are paths, or the reverse; expected all of a kind")
    first, second = like.checkpoint or opened(like.model), opened(base, allow_pickle=allow_pickle)
    here = {*first.table, *second.table}
    skip = [p for p in skip if any(fnmatchcase(n, p) for n in here)]
    met = open_models([first, second], skip=skip, config="a" if overruled else None, arch=arch)
    first, second = met.agreed.models
    _check_pair(first, second, met.skip, None)
    if is_module(base):
        return state_of(base)
    import torch

    found = like.arch if second.config is None else find_architecture(second, arch)[1]
    generator = torch.Generator().manual_seed(seed)
    return load_checkpoint(second, like.adapter, found, device="cpu", generator=generator).state()


def _common_graph(adapter: Adapter, arch: Architecture, loaded: Loaded, seed: int) -> NeuronGraph:
    """The graph on which all architectures that fit the tensors agree.

    Raises `MergeidError` when they do not."""
    import dataclasses
    import warnings

    import torch

    from mergeid.errors import MergeidWarning

    found = graph_of(loaded, seed=seed)
    others = [c for c in arch.candidates if c != arch.name]
    for name in others:
        candidate = dataclasses.replace(arch, name=name, candidates=())
        assert loaded.checkpoint is not None
        other = load_checkpoint(
            loaded.checkpoint, adapter, candidate, device="cpu", generator=torch.Generator().manual_seed(seed)
        )
        if _shape_of(graph_of(other, seed=seed)) != _shape_of(found):
            raise MergeidError(
                f"the tensors of {loaded.source} fit {', '.join(arch.candidates)}, whose neuron graphs differ; "
                f"say which with --arch, for example --arch {adapter.name}/{arch.name}"
            )
    if others:
        warnings.warn(
            f"the tensors of {loaded.source} fit {', '.join(arch.candidates)}; their neuron graphs are the same, going "
            f"on with {arch.name} (choose with --arch)",
            MergeidWarning,
            stacklevel=4,
        )
    return found


def _shape_of(found: NeuronGraph) -> Any:
    return [(s.size, s.blocks, s.parents, [(a.tensor, a.axis, a.index.tolist()) for a in s.axes]) for s in found.spaces]


def dataset_of(data: Any, loaded: Loaded, limit: int | None, seed: int) -> tuple[Any, Callable[[Any], Any] | None]:
    """Map-style data and its collate function; (None, None) without data."""
    if data is None:
        return None, None
    if loaded.adapter.name == "torch":
        return _as_given(data, loaded), None
    from mergeid.data import collate, load_data

    dataset = load_data(data, adapter=loaded.adapter, arch=loaded.arch, folder=loaded.folder, limit=limit, seed=seed)
    return dataset, collate


def _as_given(data: Any, loaded: Loaded) -> Any:
    """A live module's data: examples that are stacked into batches where its items have one dimension less than the
    example inputs, else whole inputs."""
    from mergeid.data.nested import named_tensors
    from mergeid.evaluate.batches import WholeInputs, dataset_length

    dataset_length(data)
    first, example = named_tensors(loaded.inputs_of(as_batch(data[0]))), named_tensors(loaded.inputs)
    alike = set(first) == set(example) and all(t.dim() == example[k].dim() for k, t in first.items())
    return WholeInputs(data) if alike else data


def open_plain(sources: Sequence[Source], allow_pickle: bool) -> list[Checkpoint]:
    """Checkpoints of files, folders, hub ids and live modules; open ones as they are."""
    return [opened(x, allow_pickle=allow_pickle) for x in sources]


def output_path(output: str | os.PathLike[str] | None, reads: Sequence[Any], force: bool) -> Path:
    """Where the output goes: beside the working directory's files, of the first model's kind, if it has no name.

    Args:
        reads: all that is read, models first; none of it may be touched.

    Raises `MergeidError` where it cannot be written."""
    from mergeid.io.output import check_output

    if output is None:
        first = reads[0]
        folder = isinstance(first, (str, os.PathLike)) and not str(first).endswith((".safetensors", *PICKLES))
        folder = folder or (isinstance(first, Checkpoint) and first.is_folder)
        output = "merged" if folder else "merged.safetensors"
    return check_output(output, inputs=[x for x in reads if isinstance(x, (str, os.PathLike))], force=force)
