"""``align``: one model brought into another's order of neurons."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.io.opening import Source, is_live
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Calibration, Matching, Output, bytes_of, check_transport
from mergeid.request.usual import Usual, calibration_of, requests_of
from mergeid.results.merge import MergeResult
from mergeid.stages.open import Met, check_matching, open_models, output_path, skipped_keys

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack


@verb
def align(
    b: Source,
    to: Source,
    *,
    output: Annotated[
        str | os.PathLike[str] | None,
        o.out("A .safetensors file or a folder. Default: ./aligned.safetensors, or ./aligned for folders."),
    ] = None,
    force: o.Force = False,
    shard_size: o.ShardSize = None,
    resume: o.Resume = False,
    data: o.Data = None,
    match: o.Match = "auto",
    matcher: o.Matcher = None,
    plan: o.SavedPlan = None,
    transport: o.Transport = False,
    base: Annotated[
        Any,
        o.Option(
            "Model that A and B were fine-tuned from; the record then says which spaces it identifies.",
            o.INPUT,
            "BASE",
            shown=False,
        ),
    ] = None,
    certify: o.Certify = False,
    batch_size: o.BatchSize = 32,
    **usual: Unpack[Usual],
) -> MergeResult:
    """Put B's neurons into A's order: the same function, ready for any other merging tool.

    Args:
        b: the model to permute; to: the model whose order it takes. Others as for `merge`.
        base, certify: as for `plan`.
        usual: how models are read and the work is done, see `mergeid.request.usual.Usual`; `config`: whose config B
            gets if they differ in what the network computes.
        transport: map B's neurons onto A's by optimal transport, as in `merge`: the result has A's shapes, and its
            function is only close to B's.
        output: default ``./aligned.safetensors``, for folders ``./aligned``.
        resume, shard_size: as for `merge`.

    Raises `MergeidError` for anything wrong with the input; nothing was written.
    """
    run, reading = requests_of(usual, batch_size)
    matching, calibration = Matching(match, matcher, plan), calibration_of(data, usual)
    asked, target = Output(output, force=force, shard_size=bytes_of(shard_size), resume=resume), None
    if not (is_live(b) and output is None):
        asked = replace(asked, path=output or _default(b))
        target = replace(asked, path=output_path(asked, [to, b, base, data, plan, reading.config_file]))
    if transport:
        check_transport(matching, base=base is not None)
        met = open_models(Workbench(reading, run), [to, b], widths=False)
        return _transported(met, calibration, target)
    check_matching(matching, calibration.given)
    met = open_models(Workbench(reading, run), [to, b])
    from mergeid.basics.state import others_of
    from mergeid.stages.plan import plan_pair
    from mergeid.stages.write import digest_of, reordered, rewrite

    pair, made = plan_pair(met, matching, calibration, base=base, certify=certify)
    if met.skip:  # no part of the match, but of B: without it B's function would be another
        shapes = {key: tuple(value.shape) for key, value in pair.b.state().items()}
        made = made.over(met.bench.graph(pair.a).of_shapes(shapes))
    result = MergeResult(made.verdict, plans=[made], notes=list(made.notes))
    if target is None:
        return replace(result, state={**others_of(pair.b.model), **made.carry_state(pair.b.state())})
    assert pair.b.checkpoint is not None
    record = {"align": made.to_json(), **met.agreed.record()}
    request = {k: v for k, v in made.to_json().items() if k in ("turns", "maps")}
    request["order of neurons"] = digest_of(made.element)
    checkpoint, pieces = reordered(pair.b.checkpoint, made.carries_files(pair.b.names))
    files = rewrite(checkpoint, target, pieces, record, run, request)
    return replace(result, files=files)


def _default(b: Source) -> str:
    """The output's name where none is given."""
    return "aligned" if isinstance(b, (str, os.PathLike)) and os.path.isdir(b) else "aligned.safetensors"


def _transported(met: Met, calibration: Calibration, target: Output | None) -> MergeResult:
    """B on A's neurons, in the files that A has."""
    from mergeid.basics.state import others_of
    from mergeid.combine.tensor_plan import plan_tensors
    from mergeid.methods.registry import get_method
    from mergeid.methods.settings import MergeSettings
    from mergeid.stages.transport import transported_members
    from mergeid.stages.write import digest_of, rewrite

    members = transported_members(met, MergeSettings.of(get_method("linear"), 2, []), calibration)
    one, two = (m.loaded.checkpoint for m in members.models)
    result = MergeResult("transported")
    if target is None:
        return replace(result, state={**others_of(members.models[1].loaded.model), **members.models[1].state})
    assert one is not None and two is not None
    plan_tensors(one, two, skip=met.skip)  # what else differs (heads, labels) is said here
    record = {"align": {"transport": True, "a": one.source, "b": two.source}}
    keys = skipped_keys(members.first, met.skip)
    skipped = {n for n, k in members.first.names.items() if k in keys}
    moved = {n: two.tensor(n) for n in one.table if n in two.table and n not in skipped}
    request = {"transported tensors": digest_of({n: t.double().numpy() for n, t in moved.items()})}
    pieces = partial(_pieces, moved)
    files = rewrite(one, target, pieces, record, met.bench.run, request)
    return replace(result, files=files)


def _pieces(moved: Mapping[str, Tensor], name: str, tensor: Tensor) -> list[Tensor]:
    return [moved.get(name, tensor).to(tensor.dtype).contiguous()]
