"""From what the user names (file, folder, hub id, architecture, live module) to a model that runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from mergeid.basics.nested import as_batch
from mergeid.errors import MergeidError
from mergeid.io.building import BARE, Room, build, naming, skeleton
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.dequantise import refuse_quantised
from mergeid.io.dtypes import torch_dtype
from mergeid.io.folders import unread_of
from mergeid.io.opening import Source, module_of, open_checkpoint
from mergeid.io.tensors import TensorSource
from mergeid.models.architecture import described_by, find_architecture, resolve_name
from mergeid.models.computed import fill_computed
from mergeid.models.converted import as_network, as_stored, names_of
from mergeid.models.loaded import Loaded, ModuleAdapter, check_runs, takes_labels
from mergeid.models.mapped import LARGEST_HELD, put_mapped
from mergeid.nn.names import is_asymmetric, plain_table, stored_keys
from mergeid.plugins import Adapter, Architecture, Batch, KnowsModules, adapter_names, get_adapter
from mergeid.request.request import Reading, Run

if TYPE_CHECKING:
    from torch import nn

HUGE = 1_000_000_000
"""Parameters above which a bare architecture is traced on the meta device."""


def load_model(source: Source, reading: Reading, run: Run, *, revision: str | None = None) -> Loaded:
    """A runnable model with its weights.

    Args:
        revision: of a hub id.

    Raises:
        MergeidError: not found, not recognised, or weights that do not fit the architecture.
    """
    if (module := module_of(source)) is not None:
        return _live(module, reading, run)
    if reading.example.outputs:
        raise MergeidError(f"outputs= chooses among what a live module returns, but {source} is a path; leave it out")
    checkpoint = open_checkpoint(
        source, revision=revision, allow_pickle=reading.allow_pickle, dequantise=reading.dequantise
    )
    adapter, found = find_architecture(checkpoint, reading.arch)
    return load_checkpoint(checkpoint, adapter, found, run)


def load_checkpoint(
    checkpoint: Checkpoint, adapter: Adapter, arch: Architecture, run: Run, like: Loaded | None = None
) -> Loaded:
    """Build the architecture and put the checkpoint's weights into it; layers that are asymmetric in the checkpoint are
    so in the model.

    Args:
        like: a model that was loaded before. One of the same architecture is copied instead of being built again, which
            spares drawing weights that nobody needs.

    Raises `MergeidError` when a floating-point tensor of the model is missing or has another shape."""
    from mergeid.basics.aliases import tied_groups

    room, large = Room.of(checkpoint.table), _size(checkpoint) > LARGEST_HELD and not is_asymmetric(checkpoint.table)
    with naming(checkpoint.source):
        model = skeleton(adapter, arch, room) if large else None
        mapped = model is not None
        if model is None and like is not None and not large and _stands_for(like, arch, checkpoint):
            model = copy.deepcopy(like.model)
        if model is None:
            model = build(adapter, arch, room, device=run.place)
        plain = adapter.tensor_names(arch, model, plain_table(checkpoint.table))
    checkpoint = as_network(checkpoint, adapter, model)
    names = names_of(checkpoint, plain)
    if is_asymmetric(checkpoint.table):
        from mergeid.nn.stored import restore

        names = stored_keys(checkpoint.table, names)
        restore(model, {key: checkpoint.tensor(name) for name, key in names.items()})
    own = model.state_dict()
    refuse_quantised(checkpoint, list(names))
    for name, key in names.items():
        shape = tuple(checkpoint.table[name].shape)
        if key in own and shape != tuple(own[key].shape):
            raise MergeidError(
                f"tensor {name!r} of {checkpoint.source} has shape {shape}, but {arch.id} expects "
                f"{tuple(own[key].shape)}; name its architecture with --arch"
            )
    given, tied = set(names.values()), {k: set(group) for group in tied_groups(model) for k in group}
    missing = [k for k in own if k not in given and own[k].is_floating_point() and not tied.get(k, set()) & given]
    if missing:
        found = fill_computed(model, adapter, missing, lambda: build(adapter, arch, room))
        held = min(found & like.model.state_dict().keys(), default=None) if like is not None else None
        if like is not None and held is not None:  # its neurons could move there, and here they cannot
            raise MergeidError(
                f"{checkpoint.source} leaves out {held!r}, which its library computes, and {like.source} holds it; "
                "save both with one version of the library, or name the first one second"
            )
        missing = [k for k in missing if k not in found]
    if missing:
        raise MergeidError(
            f"{checkpoint.source} lacks {len(missing)} of the {len(own)} tensors of {arch.id} (first: {missing[0]!r}); "
            "name its architecture with --arch, or merge the tensors as is with --match never"
        )
    if run.place != "cpu":
        _in_bfloat16(model, checkpoint, names)
    (put_mapped if mapped else _put)(model, checkpoint, names)
    model = model.to(run.place).eval()
    example = _there(adapter.example_inputs(arch, model, run.generator()), run.place, model)
    unread = unread_of(checkpoint.path) if checkpoint.is_folder else frozenset()
    return Loaded(checkpoint.source, model, adapter, arch, checkpoint, names, example, unread=unread)


def _stands_for(like: Loaded, arch: Architecture, checkpoint: TensorSource) -> bool:
    """Whether a copy of that model with this checkpoint's tensors is what would be built for it: all that either holds
    is in both files."""
    known = like.checkpoint
    if known is None or like.arch != arch or is_asymmetric(known.table) or is_asymmetric(checkpoint.table):
        return False
    whole = set(like.names.values()) >= set(like.model.state_dict())
    return whole and as_stored(known).table.keys() == checkpoint.table.keys()


def _size(checkpoint: TensorSource) -> int:
    return sum(prod(info.shape) for info in checkpoint.table.values())


def _put(model: nn.Module, checkpoint: TensorSource, names: Mapping[str, str]) -> None:
    """Copies of a checkpoint's tensors in the model's number formats."""
    own = model.state_dict()
    state = {}
    for name, key in names.items():
        value = checkpoint.tensor(name)
        state[key] = value.to(own[key].dtype) if key in own else value
    model.load_state_dict(state, strict=False)
    for name in names:
        checkpoint.release(name)


def _in_bfloat16(model: nn.Module, checkpoint: TensorSource, names: Mapping[str, str]) -> None:
    """On a device, a model that is stored in bf16 and in nothing else runs in it, as its users run it. A CPU computes
    in float32, which is faster there."""
    import torch

    stored = {key: torch_dtype(checkpoint.table[name].dtype) for name, key in names.items()}
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if k in stored and v.is_floating_point()}
    if not own or {stored[k] for k in own} != {torch.bfloat16}:
        return
    for value in own.values():
        value.data = value.data.to(torch.bfloat16)


def _live(module: nn.Module, reading: Reading, run: Run) -> Loaded:
    from mergeid.basics.state import evaluating, tensors_of
    from mergeid.models.carried import copyable
    from mergeid.models.offload import in_memory

    arch, given = reading.arch, reading.example
    source = type(module).__name__
    try:
        module = _on(evaluating(copyable(in_memory(module))), run.place)
    except NotImplementedError as error:
        raise MergeidError(
            f"{source} cannot be put into evaluation mode ({error}); give the module that it was exported from"
        ) from error
    names = {k: k for k in tensors_of(module)}
    has_values = not any(p.is_meta for p in module.parameters())
    if given.inputs is not None and arch is None:
        example = _there(as_batch(given.inputs), run.place, module) if has_values else as_batch(given.inputs)
        library = _library(module)
        architecture = Architecture("torch", source)
        adapter: Any = ModuleAdapter(library, takes_labels=takes_labels(module, example))
        found = Loaded(source, module, adapter, architecture, None, names, example, given.outputs)
        if library is not None and adapter.takes_labels:
            # the models of a library take their targets under this name, and a few make other inputs of them
            plain: Any = ModuleAdapter(library)
            without = replace(found, adapter=plain)
            found = without if not has_values or _runs(without) or not _runs(found) else found
        return found
    try:
        adapter, known = find_architecture(open_checkpoint(module), arch)
    except MergeidError as error:
        raise MergeidError(f"{error}; for a live module, you can also pass example_inputs") from None
    inputs = given.inputs
    example = as_batch(inputs) if inputs is not None else adapter.example_inputs(known, module, run.generator())
    example = _there(example, run.place, module) if has_values else example
    return Loaded(source, module, adapter, known, None, names, example, given.outputs)


def _runs(loaded: Loaded) -> bool:
    try:
        check_runs(loaded, loaded.inputs, "example_inputs")
    except MergeidError:
        return False
    return True


def _on(module: nn.Module, place: str) -> nn.Module:
    """The module itself where all of it lies there, or has no values; else a copy."""
    import torch

    here = torch.empty(0, device=place).device
    elsewhere = any(not t.is_meta and t.device != here for t in (*module.parameters(), *module.buffers()))
    return copy.deepcopy(module).to(place) if elsewhere else module


def _there(batch: Batch, place: str, module: nn.Module) -> Batch:
    import torch

    from mergeid.data.batches import input_dtype, to_model

    return to_model(batch, torch.device(place), input_dtype(module))


def _library(module: nn.Module) -> KnowsModules | None:
    """The adapter whose library the module comes from."""
    known = (get_adapter(name) for name in adapter_names())
    return next((a for a in known if isinstance(a, KnowsModules) and a.owns(module)), None)


def bare(arch: str, run: Run) -> Loaded:
    """A model of that architecture (a name, or the path of a config.json) with random weights; on the meta device
    where it is too large to be run here and its adapter can make a smaller one to verify."""
    if arch.endswith(".json"):
        from mergeid.basics.reading import read_table

        adapter, found = described_by(arch, read_table(arch, "the model's config.json"))
    else:
        adapter, found = resolve_name(arch, None, None)
    model = build(adapter, found, BARE, device="meta")
    size = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if size < HUGE or not hasattr(adapter, "shrink"):
        model = build(adapter, found, BARE)
    model = model.eval()
    example = adapter.example_inputs(found, model, run.generator())
    return Loaded(arch, model, adapter, found, None, {k: k for k in model.state_dict()}, example)
