"""Checkpoints of asymmetric networks: recognise, load, fold.

F and D lie in the checkpoint's own tensors (`mergeid.nn.names`). Such a checkpoint is loaded into the ordinary
architecture with its layers made asymmetric again, so that planning, aligning and merging handle F and D like any
other tensor. The neuron graph permutes them together with W: that is a symmetry of the function, since the effective
weight moves as a whole, but not of training: two networks that share F and D do so in the identity arrangement only,
and a permuted one no longer has the F and D that its partner was trained with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.opening import open_checkpoint
from mergeid.nn.effective import Parts, attach
from mergeid.nn.folding import fold_state
from mergeid.nn.names import FIXED, GATE, MASK, asymmetric_parameters, gates, is_asymmetric, plain_table
from mergeid.nn.selection import users
from mergeid.nn.sigma_asymmetric import give_gate

__all__ = ["fold_file", "folded", "is_asymmetric", "plain_table", "restore"]


def folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain tensors of the same function under the ordinary names, see `mergeid.nn.fold_state`."""
    return fold_state(tensors)


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Make the layers of an ordinary model asymmetric that are so in a state dict, in place; W is not loaded.

    Args:
        state: tensors by the model's keys.

    Raises `MergeidError` where the model lacks a layer that `state` has fixed parts for."""
    by_module: dict[str, dict[str, Parts]] = {}
    for parameter in asymmetric_parameters(state):
        owner, _, name = parameter.rpartition(".")
        by_module.setdefault(owner, {})[name] = Parts(state[parameter + FIXED], state.get(parameter + MASK))
    modules = dict(model.named_modules(remove_duplicate=False))
    for owner in [*by_module, *(g.rpartition(".")[0] for g in gates(state))]:
        if owner not in modules:
            raise MergeidError(f"{type(model).__name__} has no layer {owner!r} to put the checkpoint's fixed parts in")
    # a tied tensor is stored under one name, and has its fixed part in every layer that uses it
    tied = users(model)
    for owner, parts in list(by_module.items()):
        for name, part in parts.items():
            for other, _, key in tied.get(id(modules[owner]._parameters.get(name)), []):
                if modules[other] is not modules[owner]:
                    by_module.setdefault(other, {}).setdefault(key, part)
    done: set[int] = set()
    for owner, parts in by_module.items():
        # a layer under two names is one layer
        if id(modules[owner]) not in done:
            done.add(id(attach(modules[owner], parts, owner)))
    for gate in gates(state):
        owner = gate.removesuffix(GATE).removesuffix(".")
        if id(modules[owner]) not in done:
            done.add(id(give_gate(modules[owner], state[gate], owner)))
    return model


def fold_file(
    source: str | os.PathLike[str], output: str | os.PathLike[str], *, force: bool = False, allow_pickle: bool = False
) -> list[Path]:
    """Write the plain checkpoint of an asymmetric one (file or folder), for tools that know ordinary layers only.

    Returns what was written. Raises `MergeidError` where the source is not asymmetric or cannot be folded."""
    from mergeid.io.companions import default_companions
    from mergeid.io.output import check_output
    from mergeid.io.stream import CheckpointWriter
    from mergeid.request.request import Output

    checkpoint = open_checkpoint(source, allow_pickle=allow_pickle)
    if not is_asymmetric(checkpoint.table):
        raise MergeidError(f"{checkpoint.source} has no asymmetric layers (tensors NAME{FIXED}): it is plain already")
    target = check_output(output, inputs=[checkpoint.path], force=force)
    plain = Checkpoint.from_tensors(
        folded(checkpoint.state_dict()),
        source=checkpoint.source,
        path=checkpoint.path,
        config=checkpoint.config,
        is_folder=checkpoint.is_folder,
    )
    plain.metadata = dict(checkpoint.metadata)
    record = {"format": "mergeid.record/1", "folded": {"source": checkpoint.source, "sha256": checkpoint.fingerprint()}}
    with CheckpointWriter(Output(target, force=force), like=plain, companions=default_companions(checkpoint)) as writer:
        writer.record = record
        for name in writer.order():
            writer.write(name, [plain.tensor(name).contiguous()])
    return list(writer.paths())
