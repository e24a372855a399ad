"""ZipIt!: two models, perhaps of different tasks, with one trunk (`mergeid.combine.zip`), from and to checkpoints."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.basics.reading import read_table
from mergeid.errors import MergeidError, shown
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.opening import Source, is_live
from mergeid.io.output import RECORD
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import LIMIT, Calibration, Example, Output, Progress, Reading, Run
from mergeid.results.zip import ZipResult
from mergeid.stages.open import Met, Pair, open_models, output_path

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.combine.zip import TwoHeads, Zipped
    from mergeid.models.examples import Examples
    from mergeid.models.loaded import Loaded
    from mergeid.plugins import Batch

LEAST = 16
"""Calibration examples that correlations need."""


@verb
def zip_models(
    a: Source,
    b: Source,
    *,
    data: Annotated[
        Any,
        o.examples("Examples of both tasks, to find out which features are alike; same forms as in mergeid merge."),
    ],
    arch: o.Arch = None,
    config: o.Config = None,
    limit: o.Limit = LIMIT,
    image_size: o.ImageSize = None,
    output: Annotated[
        str | os.PathLike[str] | None,
        o.out("A folder. Default: ./zipped. With --one-head, as for mergeid merge."),
    ] = None,
    up_to: Annotated[
        str | None,
        o.Option(
            "Zip up to this module (such as layer3) and keep what follows separate. Default: all but the heads.",
            o.HOW,
            "MODULE",
        ),
    ] = None,
    across: Annotated[
        bool,
        o.switch("Only merge features of A with features of B, as matching does, never two of the same model."),
    ] = False,
    one_head: Annotated[bool, o.switch("For models of one task: also average the heads, and write one model.")] = False,
    repair: bool = True,
    allow_pickle: o.AllowPickle = False,
    dequantise: o.Dequantise = False,
    force: o.Force = False,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 32,
    device: o.Device = "cpu",
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
        image_size: height and width of the data's images; None: the model's own.
        repair: estimate BatchNorm statistics again on `data`.

    Raises:
        MergeidError: anything wrong with the input; nothing was written.
    """
    run = Run.of(progress, device=device, seed=seed, batch_size=batch_size)
    calibration = Calibration(data, limit)
    if not calibration.given:
        raise MergeidError("zipping compares activations; give examples with --data")
    if one_head and up_to is not None:
        raise MergeidError("--one-head averages the heads of a whole zip; leave out --up-to, or keep both heads")
    live = is_live(a)
    if live != is_live(b):
        raise MergeidError("one model is a live module and the other a path; load the path into a module first")
    target = None
    if not (live and output is None):
        target = _target(Output(output, force=force), [a, b, data, arch], one_head)
    example = Example.of(example_inputs)
    reading = Reading(arch, config, (), allow_pickle, example, dequantise=dequantise, image_size=image_size)
    bench = Workbench(reading, run)
    met = open_models(bench, [a, b], heads=one_head, widths=False)
    pair = _pair(met, one_head)
    _same_trunk(pair)
    from mergeid.models.examples import enough

    examples = enough(bench.examples(calibration, pair.a), LEAST, "to zip by")
    zipped = _zipped(pair, examples, run, up_to, across)
    result = _result(pair, zipped, one_head)
    result = replace(result, notes=[*result.notes, *met.notes])
    if repair:
        run.tell("estimating BatchNorm statistics", 0, 1)
        result = _renormalised(result, pair, examples, run)
    elif _has_batchnorm(pair.a):
        note = "the BatchNorm statistics are averages, not those of the zipped network"
        result = replace(result, notes=[*result.notes, note])
    if target is None:
        return result
    run.tell("writing", 0, 1)
    how = {"up_to": up_to, "across": across, "seed": seed, **met.agreed.record()}
    return replace(result, files=_write(result, (pair.a, pair.b), target, how, force))


@verb
def load_zipped(folder: str | os.PathLike[str], *, device: str = "cpu") -> TwoHeads:
    """The two heads that ``mergeid zip`` wrote, on one trunk that lies in memory once; calling it gives both outputs.

    Raises `MergeidError` where the folder holds no zip.
    """
    path = Path(folder)
    wanted = f"{path} is not an output of mergeid zip with two heads; expected a folder with a, b and {RECORD}"
    try:
        found = read_table(path / RECORD)
    except MergeidError:
        raise MergeidError(wanted) from None
    if not isinstance(found.get("zip"), dict):
        raise MergeidError(wanted)
    from mergeid.combine.zip import TwoHeads
    from mergeid.io.schema import ZipRecord, validated

    record = validated(ZipRecord, found, str(path / RECORD)).zip
    bench = Workbench(Reading(record.arch), Run(device=device))
    one, two = (bench.load(path / part) for part in ("a", "b"))
    unknown = [name for name in record.trunk if name not in one.names]
    if unknown:
        raise MergeidError(f"{path / RECORD} names the tensor {shown(unknown[0])}, which {path / 'a'} does not have")
    return TwoHeads((one.model, two.model), [one.names[name] for name in record.trunk])


def _target(output: Output, reads: Sequence[Any], one_head: bool) -> Path:
    from mergeid.io.output import is_single_file

    if one_head:
        return output_path(output, reads)
    path = "zipped" if output.path is None else output.path
    if is_single_file(path):
        raise MergeidError(
            f"output {os.fspath(path)} is the name of a file; two heads are written to a folder with one model each "
            f"(option -o), or give --one-head"
        )
    return output_path(replace(output, path=path), reads)


def _pair(met: Met, one_head: bool) -> Pair:
    """Both models with A's graph; what is wrong with files is said from their headers where it can be."""
    if not met.live:
        from mergeid.combine.by_torch import check_finite
        from mergeid.combine.tensor_plan import mergeable, plan_tensors
        from mergeid.io.dequantise import refuse_quantised

        opened = met.models
        for checkpoint in opened:
            refuse_quantised(checkpoint, list(checkpoint.table))
        if one_head:
            for name in (n for n in opened[0].table if n in opened[1].table):
                ours, theirs = (c.table[name].shape for c in opened)
                if ours != theirs:
                    raise MergeidError(
                        f"tensor {name!r} has shape {list(ours)} in {opened[0].source} and {list(theirs)} in "
                        f"{opened[1].source}; --one-head needs models with the same classes: leave it out"
                    )
            plan_tensors(*opened)
        for checkpoint in opened:
            check_finite(checkpoint, mergeable(checkpoint))
    from mergeid.models.graph import graph_of

    bench, (first, second) = met.bench, met.models
    one = bench.load(first)
    given = bench.reading.example
    if given.inputs is not None:
        bench = bench.under(replace(bench.reading, example=Example(one.example, given.outputs)))
    return Pair(one, bench.load(second).apart_from(one), graph_of(one, seed=bench.run.seed))


def _same_trunk(pair: Pair) -> None:
    """Raises `MergeidError` where a tensor is missing in B, or has another shape along an axis that may be permuted."""
    graph, one, two = pair.graph, pair.a, pair.b
    shapes = {k: tuple(v.shape) for k, v in two.state().items()}
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


def _zipped(pair: Pair, examples: Examples, run: Run, up_to: str | None, across: bool) -> Zipped:
    from mergeid.combine.zip import joint_correlations, spaces_up_to
    from mergeid.combine.zip import zip_models as zip_in_memory

    graph, one, models = pair.graph, pair.a, (pair.a.model, pair.b.model)
    chosen = None
    if up_to is not None:
        chosen = spaces_up_to(graph, one.model, up_to)
        if not chosen:
            raise MergeidError(
                f"nothing is zipped up to {up_to!r}: what it writes is also written by later layers; name a later one"
            )
    if not graph.spaces:
        raise MergeidError(f"no features of {one.source} can be permuted, so none can be zipped")

    def batches() -> Iterator[Batch]:
        import torch

        run.tell("correlations of the features", 0, 1)
        return examples.unlabelled(run.batch_size, one, torch.device(run.place))

    correlations = joint_correlations(graph, models, one.forward, batches)
    return zip_in_memory(graph, models, correlations, spaces=chosen, within=not across)


def _result(pair: Pair, zipped: Zipped, one_head: bool) -> ZipResult:
    graph, states = pair.graph, zipped.states
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


def _renormalised(result: ZipResult, pair: Pair, examples: Examples, run: Run) -> ZipResult:
    """BatchNorm statistics estimated again in every state; those of the trunk once."""
    from mergeid.basics.state import load_weights
    from mergeid.models.running import make_accelerator
    from mergeid.repair.batchnorm import reestimated

    accelerator, forward = make_accelerator(run.place), pair.a.forward
    shared: dict[str, Tensor] = {}
    states: list[dict[str, Tensor]] = []
    repaired = set(result.repaired)
    for old, one in zip(result.states, (pair.a, pair.b), strict=False):
        work, state = copy.deepcopy(one.model), dict(old)
        load_weights(work, state)
        found = reestimated(work, examples, forward, accelerator)
        for key, value in found.items():
            state[key] = shared.get(key, value.detach().cpu())
            if key in result.trunk:
                shared[key] = state[key]
        repaired |= set(found)
        states.append(state)
    return replace(result, states=tuple(states), repaired=sorted(repaired))


def _has_batchnorm(loaded: Loaded) -> bool:
    from mergeid.repair.batchnorm import batchnorm_layers

    return bool(batchnorm_layers(loaded.model))


def _write(result: ZipResult, loaded: Sequence[Loaded], target: Path, how: dict[str, Any], force: bool) -> list[Path]:
    from importlib.metadata import version

    from mergeid.io.companions import default_companions
    from mergeid.io.stream import CheckpointWriter
    from mergeid.io.together import write_together
    from mergeid.models.configs import config_files

    checkpoints = [x.checkpoint or Checkpoint.from_tensors(x.state(), source=x.source) for x in loaded]
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

    def write(i: int, place: Path, *, record: Mapping[str, Any] | None = None, force: bool = False) -> list[Path]:
        like, names, state = checkpoints[i], loaded[i].names, result.states[i]
        beside, config = default_companions(like), config_files(like)
        out = Output(place, force=force)
        with CheckpointWriter(out, like=like, companions=beside, replace=config, inputs=inputs) as writer:
            writer.record = record
            for name in writer.order():
                value, key = like.tensor(name), names.get(name)
                writer.write(name, (state[key].to(value.dtype) if key in state else value).contiguous())
        return writer.paths()

    if len(result.states) == 1:
        return write(0, target, record=record, force=force)
    parts = {name: partial(write, i) for i, name in enumerate("ab")}
    return write_together(target, parts, record=record, inputs=inputs, force=force)
