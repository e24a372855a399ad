"""ZipIt!: two models, perhaps of different tasks, with one trunk (`mergeid.combine.zip`), from and to checkpoints."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, shown
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.output import RECORD
from mergeid.io.reading import read_table
from mergeid.models.load import Loaded, graph_of, load
from mergeid.models.pair import LIMIT, Progress, Source, dataset_of, is_module, open_models
from mergeid.request.boundary import verb

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.combine.zip import TwoHeads, Zipped
    from mergeid.neuron_graph.neuron_graph import NeuronGraph
    from mergeid.plugins import Batch

LEAST = 16
"""Calibration examples that correlations need."""


@dataclass
class ZipResult:
    """Two models with one trunk.

    Attributes:
        states: A's and B's state dicts, equal on the trunk; one alone with ``one_head``.
        trunk: state-dict keys that both share.
        share: parameters of the trunk / parameters of A.
        within: label of each zipped space -> share of its features that were merged inside one model.
        apart: labels of the spaces that were not zipped.
        repaired: state-dict keys whose BatchNorm statistics were estimated again.
        files: what was written.
        notes: what the user should know.
    """

    states: tuple[dict[str, Tensor], ...]
    trunk: tuple[str, ...]
    share: float
    within: dict[str, float]
    apart: list[str]
    repaired: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {
            "heads": len(self.states),
            "trunk": list(self.trunk),
            "share": self.share,
            "within": self.within,
            "apart": self.apart,
            "repaired": self.repaired,
            "files": [str(f) for f in self.files],
            "notes": self.notes,
        }


@verb
def zip_models(
    a: Source,
    b: Source,
    *,
    data: Any,
    output: str | os.PathLike[str] | None = None,
    up_to: str | None = None,
    across: bool = False,
    one_head: bool = False,
    repair: bool = True,
    arch: str | None = None,
    config: str | None = None,
    force: bool = False,
    seed: int = 0,
    limit: int | None = LIMIT,
    batch_size: int = 32,
    device: str = "cpu",
    allow_pickle: bool = False,
    example_inputs: Any = None,
    progress: Progress | None = None,
) -> ZipResult:
    """Zip two models: merge their features where they are alike, within each model too (ZipIt!, Stoica et al. 2024).

    Convolutional networks and multilayer perceptrons of one architecture; the classes may differ.

    Args:
        a, b: files, folders, hub ids, or live modules.
        data: calibration examples; labels are not looked at.
        output: with two heads a folder, default ``./zipped``, that holds ``a`` and ``b``: each loads where its input
            loaded, and `load_zipped` loads both with the trunk in memory once. With one head as for `merge`.
        up_to: name of the last module that is zipped; what comes after it stays apart. Default: all but the heads.
        across: pair features of A with features of B only, as matching does.
        one_head: also average the heads, for models of one task: the result is one model of A's architecture whose
            outputs are the mean of both heads'.
        config: "a" or "b": whose config both get where they differ in what the trunk computes.
        repair: estimate BatchNorm statistics again on `data`.

    Raises:
        MergeidError: anything wrong with the input; nothing was written.
    """
    if data is None:
        raise MergeidError("zipping compares activations; give examples with --data")
    if one_head and up_to is not None:
        raise MergeidError("--one-head averages the heads of a whole zip; leave out --up-to, or keep both heads")
    tell = progress or (lambda *_: None)
    live = is_module(a)
    if live != is_module(b):
        raise MergeidError("one model is a live module and the other a path; load the path into a module first")
    target = None
    if not (live and output is None):
        target = _target(output, [a, b, data, arch], one_head, force)
    opened = open_models([a, b], config=config, arch=arch, heads=one_head, widths=False, allow_pickle=allow_pickle)
    agreed = opened.agreed
    if not live:
        a, b = agreed.models
    one, two = _loaded(a, b, arch, device, seed, example_inputs, one_head, tell)
    tell("tracing and verifying the neuron graph", 0, 1)
    graph = graph_of(one, seed=seed)
    _same_trunk(graph, one, two)
    dataset, collate = dataset_of(data, one, limit, seed)
    if len(dataset) < LEAST:
        raise MergeidError(f"--data holds {len(dataset)} examples; zipping needs at least {LEAST}")

    def batches() -> Iterator[Batch]:
        import torch

        from mergeid.evaluate.batches import FixedBatches, input_dtype, to_model

        for i, batch in enumerate(found := FixedBatches(dataset, batch_size, collate)):
            tell("correlations of the features", i, len(found))
            given = to_model(batch, torch.device(device), input_dtype(one.model))
            yield one.inputs_of(given)

    zipped = _zipped(graph, one, two, batches, up_to, across)
    result = _result(graph, one, zipped, one_head)
    result.notes += agreed.notes
    if repair:
        tell("estimating BatchNorm statistics", 0, 1)
        _renormalise(result, (one, two), dataset, collate, device)
    elif _has_batchnorm(one):
        result.notes.append("the BatchNorm statistics are averages, not those of the zipped network")
    if target is not None:
        tell("writing", 0, 1)
        how = {"up_to": up_to, "across": across, "seed": seed, **agreed.record()}
        result.files = _write(result, (one, two), target, how, force)
    return result


@verb
def load_zipped(folder: str | os.PathLike[str], *, device: str = "cpu") -> TwoHeads:
    """The two heads that ``mergeid zip`` wrote, on one trunk that lies in memory once; calling it gives both outputs.

    Raises `MergeidError` where the folder holds no zip.
    """
    path = Path(folder)
    wanted = f"{path} is no output of mergeid zip with two heads; expected a folder with a, b and {RECORD}"
    try:
        found = read_table(path / RECORD)
    except MergeidError:
        raise MergeidError(wanted) from None
    if not isinstance(found.get("zip"), dict):
        raise MergeidError(wanted)
    from mergeid.combine.zip import TwoHeads
    from mergeid.io.schema import ZipRecord, validated

    record = validated(ZipRecord, found, str(path / RECORD)).zip
    one, two = (load(path / part, arch=record.arch, device=device) for part in ("a", "b"))
    unknown = [name for name in record.trunk if name not in one.names]
    if unknown:
        raise MergeidError(f"{path / RECORD} names the tensor {shown(unknown[0])}, which {path / 'a'} does not have")
    return TwoHeads((one.model, two.model), [one.names[name] for name in record.trunk])


def _target(output: Any, reads: Sequence[Any], one_head: bool, force: bool) -> Path:
    from mergeid.io.output import is_single_file
    from mergeid.models.pair import output_path

    if one_head:
        return output_path(output, reads, force)
    chosen = "zipped" if output is None else output
    if is_single_file(chosen):
        raise MergeidError(
            f"output {os.fspath(chosen)} is the name of a file; two heads are written as a folder with one model each "
            "(option -o), or give --one-head"
        )
    return output_path(chosen, reads, force)


def _loaded(
    a: Source,
    b: Source,
    arch: str | None,
    device: str,
    seed: int,
    example_inputs: Any,
    one_head: bool,
    tell: Progress,
) -> tuple[Loaded, Loaded]:
    """Both models; what is wrong with files is said from their headers where it can be."""
    if isinstance(a, Checkpoint) and isinstance(b, Checkpoint):
        from mergeid.combine.by_torch import check_finite
        from mergeid.combine.tensor_plan import MERGEABLE, plan_tensors, refuse_quantised

        opened = [a, b]
        if one_head:
            for name in (n for n in opened[0].table if n in opened[1].table):
                ours, theirs = (c.table[name].shape for c in opened)
                if ours != theirs:
                    raise MergeidError(
                        f"tensor {name!r} has shape {list(ours)} in {opened[0].source} and {list(theirs)} in "
                        f"{opened[1].source}; --one-head takes models of the same classes: leave it out"
                    )
            plan_tensors(*opened)
        for checkpoint in opened:
            refuse_quantised(checkpoint, list(checkpoint.table))
            check_finite(checkpoint, [n for n, info in checkpoint.table.items() if info.dtype in MERGEABLE])
    found: list[Loaded] = []
    for i, source in enumerate((a, b)):
        tell("loading", i, 2)
        example = found[0].example if found and example_inputs is not None else example_inputs
        found.append(load(source, arch=arch, example_inputs=example, device=device, seed=seed))
    return found[0], found[1]


def _same_trunk(graph: NeuronGraph, one: Loaded, two: Loaded) -> None:
    """Raises `MergeidError` where a tensor is missing in B, or has another shape along an axis that may be permuted."""
    shapes = {k: tuple(v.shape) for k, v in two.model.state_dict().items()}
    for name, on in graph.on_tensor.items():
        ours, theirs = graph.tensors[name], shapes.get(name)
        if theirs is None:
            raise MergeidError(
                f"{two.source} has no tensor {name!r}, which {one.source} has; expected one architecture"
            )
        if len(ours) != len(theirs) or any(ours[a.axis] != theirs[a.axis] for _, a in on):
            raise MergeidError(
                f"tensor {name!r} has shape {list(ours)} in {one.source} and {list(theirs)} in {two.source}; expected "
                "equal widths (models of different widths: mergeid merge --transport)"
            )


def _zipped(graph: NeuronGraph, one: Loaded, two: Loaded, batches: Any, up_to: str | None, across: bool) -> Zipped:
    from mergeid.combine.zip import joint_correlations, spaces_up_to
    from mergeid.combine.zip import zip_models as zip_in_memory

    models = one.model, two.model
    chosen = None
    if up_to is not None:
        chosen = spaces_up_to(graph, one.model, up_to)
        if not chosen:
            raise MergeidError(
                f"nothing is zipped up to {up_to!r}: what it writes is also written by later layers; name a later one"
            )
    if not graph.spaces:
        raise MergeidError(f"no features of {one.source} may trade places, so none can be zipped")
    return zip_in_memory(
        graph, models, joint_correlations(graph, models, one.forward, batches), spaces=chosen, within=not across
    )


def _result(graph: NeuronGraph, one: Loaded, zipped: Zipped, one_head: bool) -> ZipResult:
    states = zipped.states
    if one_head:
        for key, ours in states[0].items():
            theirs = states[1][key]
            if ours.is_floating_point() and ours.shape != theirs.shape:
                raise MergeidError(
                    f"tensor {key!r} has shape {list(ours.shape)} in A and {list(theirs.shape)} in B; expected heads "
                    "of the same classes with --one-head"
                )
        mean = {
            k: ((v.double() + states[1][k].double()) / 2).to(v.dtype)
            if v.is_floating_point() and k not in zipped.trunk
            else v
            for k, v in states[0].items()
        }
        states = (mean,)  # type: ignore[assignment]
    sizes = {k: v.numel() for k, v in states[0].items() if v.is_floating_point()}
    return ZipResult(
        states=tuple(states),
        trunk=zipped.trunk,
        share=sum(sizes.get(k, 0) for k in zipped.trunk) / max(sum(sizes.values()), 1),
        within={graph.by_id[k].label: v for k, v in zipped.within.items()},
        apart=[s.label for s in graph.spaces if s.id not in zipped.within],
    )


def _renormalise(result: ZipResult, loaded: Sequence[Loaded], dataset: Any, collate: Any, device: str) -> None:
    """BatchNorm statistics estimated again in every state; those of the trunk once."""
    from mergeid.evaluate.measure import make_accelerator
    from mergeid.models.state import load_weights
    from mergeid.repair.batchnorm import calibration_batches, reestimate_batchnorm

    accelerator = make_accelerator(device)
    shared: dict[str, Tensor] = {}
    for state, one in zip(result.states, loaded, strict=False):
        work = copy.deepcopy(one.model)
        load_weights(work, state)
        forward = loaded[0].forward
        given = calibration_batches(work, dataset, forward=forward, collate=collate, accelerator=accelerator)
        found = reestimate_batchnorm(work, given, forward=forward, accelerator=accelerator)
        for key, value in found.items():
            state[key] = shared.get(key, value.detach().cpu())
            if key in result.trunk:
                shared[key] = state[key]
        result.repaired = sorted({*result.repaired, *found})


def _has_batchnorm(loaded: Loaded) -> bool:
    from mergeid.repair.batchnorm import batchnorm_layers

    return bool(batchnorm_layers(loaded.model))


def _write(result: ZipResult, loaded: Sequence[Loaded], target: Path, how: dict[str, Any], force: bool) -> list[Path]:
    from importlib.metadata import version

    from mergeid.io.companions import default_companions
    from mergeid.io.stream import write_checkpoint
    from mergeid.io.together import write_together
    from mergeid.models.configs import config_files

    checkpoints = [c for x in loaded if (c := x.checkpoint or _in_memory(x)) is not None]
    in_file = {key: name for name, key in loaded[0].names.items()}
    record = {
        "format": "mergeid.record/1",
        "method": "zip",
        "inputs": [
            {"source": c.source, "path": str(c.path.absolute()), "sha256": c.fingerprint()} for c in checkpoints
        ],
        "zip": {
            **{k: v for k, v in result.to_json().items() if k not in ("files", "notes")},
            **how,
            "arch": loaded[0].arch.id,
            "trunk": [in_file[key] for key in result.trunk if key in in_file],
        },
        "versions": {name: version(name) for name in ("mergeid", "torch", "safetensors")},
    }
    inputs = [p for c in checkpoints if c.files for p in (c.path, *c.files)]

    def writer(i: int, place: Path, **more: Any) -> list[Path]:
        like, names, state = checkpoints[i], loaded[i].names, result.states[i]

        def tensor(name: str) -> Tensor:
            value = like.tensor(name)
            key = names.get(name)
            return state[key].to(value.dtype).contiguous() if key in state else value.contiguous()

        return write_checkpoint(
            place,
            tensor,
            like=like,
            companions=default_companions(like),
            replace=config_files(like),
            inputs=inputs,
            **more,
        )

    if len(result.states) == 1:
        return writer(0, target, record=record, force=force)
    parts = {name: (lambda place, i=i: writer(i, place)) for i, name in enumerate("ab")}
    return write_together(target, parts, record=record, inputs=inputs, force=force)


def _in_memory(loaded: Loaded) -> Any:
    from mergeid.io.checkpoint import Checkpoint

    return Checkpoint.from_tensors(loaded.state(), source=loaded.source)
