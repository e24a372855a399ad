"""``merge``: two models or more into one.

From top to bottom: open → plan, match or transport → combine → repair → compare → write.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.basics import processes
from mergeid.basics.stopping import TemporaryFolder
from mergeid.errors import MergeidError, WillNotMerge
from mergeid.io.opening import Source, is_live, open_checkpoint, values_of
from mergeid.io.plans import heads_of
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MergeSettings, MethodRequest, setting_of_weights
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import REFUSE_ABOVE, Matching, Output, OwnData, Reading, Repairing, Run, bytes_of
from mergeid.request.usual import Usual, calibration_of, requests_of
from mergeid.results.merge import MergeResult
from mergeid.stages.merge_request import MergeRequest
from mergeid.stages.open import Met, open_models, output_path

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack

    from mergeid.stages.in_place import Places
    from mergeid.stages.members import Members
    from mergeid.stages.repair import Repair


@verb
def merge(
    a: Source | Sequence[Source],
    b: Source | None = None,
    *more: Source,
    base: Annotated[
        Source | None,
        o.Option(
            "Model that the others were fine-tuned from, for methods that merge task vectors.",
            o.INPUT,
            "MODEL",
            shown=False,
        ),
    ] = None,
    output: Annotated[
        str | os.PathLike[str] | None,
        o.out("A .safetensors file or a folder. Default: ./merged.safetensors, or ./merged for folders."),
    ] = None,
    weights: Sequence[Any] | Mapping[str, Sequence[float]] | None = None,
    normalize: Annotated[
        bool | None,
        o.Option(
            "Scale the weights so that they sum to 1, or use them as given.",
            flags=("--normalize/--no-normalize",),
            kind=bool,
            shown=False,
        ),
    ] = None,
    method: Annotated[
        str,
        o.Option(
            "linear, slerp, nuslerp, multislerp, karcher; with --base task_arithmetic, ties, dare_linear, dare_ties, "
            "della, della_linear, breadcrumbs, breadcrumbs_ties, sce, ram, ramplus_tl, model_stock, tsv, iso_c, "
            "iso_cts, wudi, emr, knots_ties; B into A: nearswap, arcee_fusion; with --data fisher, regmean.",
            o.HOW,
            "NAME",
            words=o.METHODS,
        ),
    ] = "linear",
    density: float | Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    match: o.Match = "auto",
    matcher: o.Matcher = None,
    plan: o.SavedPlan = None,
    transport: o.Transport = False,
    data: o.Data = None,
    heads: o.Heads = None,
    repair: bool | str = True,
    target: o.Target = None,
    refuse_above: o.RefuseAbove = REFUSE_ABOVE,
    tokenizer: o.Tokenizer = None,
    chat_template: o.ChatTemplate = None,
    dtype: o.Dtype = None,
    shard_size: o.ShardSize = None,
    resume: o.Resume = False,
    push: o.Push = None,
    as_adapter: o.AsAdapter = None,
    force: Annotated[
        bool,
        o.switch(
            "Overwrite an existing output, and write even if mergeid says that the models will not merge.", o.OUTPUT
        ),
    ] = False,
    batch_size: o.BatchSize = 32,
    **usual: Unpack[Usual],
) -> MergeResult:
    """Merge two models or more, matched where the plan says so.

    Args:
        a, b, more: files, folders, hub ids, or live modules (then `MergeResult.state` holds the result); or one list
            of them. Every further model is brought into the first one's order.
        base: the model that they were fine-tuned from, for methods that need it.
        output: ``.safetensors`` file or folder; default ``./merged.safetensors``, for folders ``./merged``.
        weights: one per model (shares with sum 1; factors of any size for task vectors), or glob of tensor names ->
            one per model, of which the first that matches counts. Default: equal shares.
        normalize: True: scale the weights to sum 1; False: take them as they are; None: shares of another sum are
            refused.
        method: name in the registry (`mergeid.methods.registry`).
        density: the method's parameter of that name, one or one per model.
        parameters: further parameters of the method by name: one value, or a list with one per model.
        match: "auto": as decided per space; "never": a plain merge, no model is built; "always": match every space.
        matcher: how neurons are matched (`mergeid.matchers.matcher_names`); default: combined with data, else weight.
            "cycle" brings more than two models into one common order.
        plan: file that `mergeid plan --output` wrote for these two models: its decisions and permutations are taken,
            and no neurons are compared again.
        transport: map the neurons of every further model onto the first one's by optimal transport instead of matching
            them one to one (OT fusion); layers of plain networks may then differ in width. Takes no `base`.
        data: calibration data for the evidence, for the repair, and for methods that measure something; models of
            different tasks each have their own: {"a": …, "b": …} or ``a=…,b=…``.
        heads: "both": for classifiers with different classes; the result is a model like the first one with a head for
            the classes of all, the first one's before the second one's (`mergeid.models.both_heads`).
        repair: "bn": estimate the BatchNorm statistics of the merged network again on `data`; "repair": rescale its
            pre-activations (REPAIR); "regmean": RegMean's linear layers (`mergeid.stages.regressed`); "solve": every
            layer in closed form, towards the models' own answers (`mergeid.repair.solve`); "solve+lean": the same, with
            hidden layers that answer almost as one model's do; "solve+polish": solved, then distilled
            (`mergeid.repair.polish`); True or "auto": "solve", "solve+lean", "regmean", "bn" or "repair", where the
            merge is nearer to the models with it; False or "none": nothing.
        target: where each model has its own data: "own", on its examples a model is imitated alone (default); "mean",
            all are, by their weights.
        refuse_above: with `data`, the distance from the models beyond which no merge is written: nats by which it is
            farther from their predictions than they are themselves, for outputs that are no classification the share
            of their variance (`mergeid.evaluate.nearness`).
        shard_size: most bytes of one weight file of a folder (5_000_000_000, "5GB"); None: files as the first model's.
        resume: go on with the merge to `output` that was stopped, if there is one; else begin, and keep what is done
            if this process is stopped. Models and settings must be the same.
        push: repository on the hub (``"org/name"``) that the result is uploaded to, with a model card, the plan and a
            plot; it is made if there is none.
        as_adapter: rank of the adapter that the result is written as (`mergeid.extract`), on `base` or on what all
            models are adapters on; None: a whole model.
        tokenizer: "union", "a", "b", …, "base" or a folder with a tokenizer: whose tokens the result has, where
            vocabularies differ; or a `mergeid.Vocabulary`, which also says where single rows come from.
        chat_template: "auto", "a", "b", …, "alpaca", "chatml", "exaone", "llama3", "mistral", a file, or a template:
            what the result's tokenizer gets; None: the first model's.
        force: overwrite, and merge even when the plan, or the last look, says that it will not work.
        usual: how models are read and the work is done, see `mergeid.request.usual.Usual`; `config`: whose config the
            result gets.

    Raises:
        WillNotMerge: the plan says no, or even the nearest merge is too far from the models (and `force` is not
            given); nothing was written.
        MergeidError: anything wrong with the input; nothing was written.
    """
    if b is None and base is None and not isinstance(a, (list, tuple)):  # a list may be what a recipe makes of slices
        raise MergeidError("there is only one model; name two or more, or one and the base that it was fine-tuned from")
    heads = heads or heads_of(plan)
    run, reading = requests_of(usual, batch_size, tokenizer, chat_template, heads)
    listed: list[Any] = [*a, b, *more] if isinstance(a, (list, tuple)) else [a, b, *more]
    request = MergeRequest(
        tuple(m for m in listed if m is not None),
        base,
        MethodRequest(
            get_method(method), setting_of_weights(weights), _with_density(parameters, density), normalize, run.seed
        ),
        calibration_of(data, usual),
        Matching(match, matcher, plan),
        Repairing(repair if isinstance(repair, str) else "auto" if repair else "none", refuse_above, target),
        Output(output, dtype, force, bytes_of(shard_size), resume, push),
        transport,
        heads,
    )
    if as_adapter is not None:
        return _adapter(request, Workbench(reading, run), as_adapter)
    return merge_models(request, Workbench(reading, run))


def _adapter(request: MergeRequest, bench: Workbench, rank: int) -> MergeResult:
    """The merge, written as an adapter; the whole model lies in a hidden folder beside it until then."""
    from mergeid.io.lora_forming import shared_base
    from mergeid.verbs.extract import extract

    if request.output.push is not None or is_live(request.models[0]):
        raise MergeidError("--as-adapter writes a folder of files; it does not work with live modules or --push")
    if request.heads is not None:
        raise MergeidError("--as-adapter writes an update of the base, which has another head; leave out --heads")
    named = [*request.models, *([request.base] if request.base is not None else [])]
    opened = [bench.open(m) for m in request.models]
    on = shared_base([bench.open(m) for m in named])
    origin = on if on is not None else None if request.base is None else bench.open(request.base)
    if origin is None:
        raise MergeidError("--as-adapter needs the model that the adapter is for; give --base")
    target = output_path(replace(request.output, path=request.output.path or "merged-adapter"), named)
    with TemporaryFolder(target.parent) as folder:
        whole = os.path.join(folder, "merged")
        result = merge_models(replace(request, output=replace(request.output, path=whole)), bench)
        merged = replace(open_checkpoint(whole), source=f"the merge of {' and '.join(m.source for m in opened)}")
        done = extract(
            merged, base=origin, output=target, rank=rank, arch=bench.reading.arch, force=request.output.force
        )
    note = f"written as an adapter of rank {rank} on {origin.source}, which leaves out {done.left_out} of the update"
    return _noted(replace(result, files=done.files), note)


def merge_models(request: MergeRequest, bench: Workbench) -> MergeResult:
    """The merge that is asked for, stage by stage. Raises as `merge`."""
    run, config = bench.run, bench.reading.config
    if is_live(request.models[0]) and len(request.models) > 2 and config not in (None, "a"):
        raise MergeidError("with more than two live modules the first one's config counts (a); put that module first")
    output = _target(request, bench.reading)
    repo = request.output.push
    if repo is not None:
        from mergeid.io.push import check_push

        if output is None:
            raise MergeidError(f"--push {repo}: a merge of live modules stays in memory; give an output to upload")
        check_push(repo)
    met = open_models(bench, request.models, request.base, widths=not request.transport)
    matching, notes, places = _shared(request, met)
    added = frozenset(met.joined.tensors if met.joined is not None else ())
    request = replace(request, matching=matching, asked=replace(request.asked, added=added))
    settings = request.asked.over(len(met.models), met.float_names)
    members = _members(request, met, settings, places)
    if members is not None and members.examples is not None and request.repairing.target == "mean":
        members = replace(members, examples=replace(members.examples, owners=None))
    result = MergeResult("direct", notes=[*met.notes, *notes], in_place=places.to_json() if places else None)
    repaired: dict[str, Tensor] = {}
    if members is not None:
        members = members.measured(run)
        result = _planned(result, members, request)
        if members.examples is not None:
            members, result, kind = _looked(result, members, request, met, run)
            asked = request.repairing.stage != "auto"
            result, repaired = _repaired(result, members, kind, met, run, asked=asked)
        elif result.verdict in ("match", "transported") and _has_batchnorm(members):
            result = _noted(
                result,
                "the BatchNorm statistics are averages, not those of the merged network, which costs much of its "
                "accuracy: give --data (without --no-repair) to re-estimate them",
            )
    if output is None:
        return replace(result, state={**met.others, **_state(met, members, settings), **repaired})
    from mergeid.stages.write import inputs_of, write

    processes.everyones(None)  # all have looked at what lies there
    if processes.place()[0]:
        return result
    result = write(result, met, inputs_of(met, members, repaired), request.asked, output)
    if repo is None:
        return result
    from mergeid.stages.push import push_merge

    return push_merge(result, met, request.asked.method.name, repo)


def _target(request: MergeRequest, reading: Reading) -> Output | None:
    """Where the merge is written; None: a merge of live modules stays in memory."""
    if is_live(request.models[0]) and request.output.path is None:
        return None
    data = request.calibration.data
    given = data.data if isinstance(data, OwnData) else [data]
    reads = [*request.models, request.base, request.matching.plan, *given, reading.config_file]
    return replace(request.output, path=output_path(request.output, reads))


def _shared(request: MergeRequest, met: Met) -> tuple[Matching, list[str], Places | None]:
    """How neurons are still to be matched, and what was seen, where the models may share theirs."""
    matching = request.matching
    asked = request.calibration.given or request.transport or matching.plan is not None
    if matching.mode != "auto" or asked or met.live or len(met.everyone) < 2:
        return matching, [], None
    from mergeid.stages.in_place import seen_in_files

    return seen_in_files(met, matching)


def _members(request: MergeRequest, met: Met, settings: MergeSettings, places: Places | None) -> Members | None:
    """The models, each with its neurons in the first one's order; None: a plain merge, and no model is built."""
    if request.transport:
        from mergeid.stages.transport import transported_members

        return transported_members(met, settings, request.calibration)
    if len(met.everyone) < 2 or (request.matching.mode == "never" and not request.calibration.given):
        return None
    from mergeid.stages.match import planned_members

    return planned_members(met, settings, request.matching, request.calibration, request.output, places)


def _planned(result: MergeResult, members: Members, request: MergeRequest) -> MergeResult:
    """What the plans say."""
    if request.transport:
        return replace(result, verdict="transported")
    from mergeid.stages.match import notes_of, verdict_of

    plans = members.plans
    return replace(result, verdict=verdict_of(plans), plans=plans, notes=[*result.notes, *notes_of(members)])


def _looked(
    result: MergeResult, members: Members, request: MergeRequest, met: Met, run: Run
) -> tuple[Members, MergeResult, str]:
    """The nearest merge, of all where the plan decides and else of what was asked for, and the repair that it takes.

    Raises `WillNotMerge` where even that is too far from the models."""
    from mergeid.results.comparison import MATCHED, PLAIN
    from mergeid.stages.compare import last_look
    from mergeid.stages.repair import POLISHED

    among, stage = request.matching.mode == "auto", request.repairing.stage
    one_task = request.repairing.target is None  # else each model has been given its own data
    chosen, found = last_look(members, stage, among=among, one_task=one_task, skip=met.skip, run=run)
    result = replace(result, comparison=found.to_json())
    if found.note:
        verdict = result.verdict
        if found.chosen == PLAIN:
            verdict = "direct"
        elif found.chosen == MATCHED and verdict == "direct":
            verdict = "match"
        result = _noted(replace(result, verdict=verdict, plans=chosen.plans), found.note)
    if found.about_inputs is not None:
        result = _noted(result, found.about_inputs)
    if found.about_repair is not None:
        result = _noted(result, found.about_repair)
    why = found.refused(request.repairing.refuse_above)
    if why and not request.output.force:
        names = " and ".join(m.loaded.source for m in members.models)
        raise WillNotMerge(f"{names} will not merge: {why}; nothing was written (--force writes anyway)")
    if why:
        result = _noted(result, f"{why}: written anyway, as requested by --force")
    polished = stage == POLISHED  # which the look has judged without its polish
    return chosen, result, POLISHED if polished else found.repair


def _repaired(
    result: MergeResult, members: Members, kind: str, met: Met, run: Run, *, asked: bool
) -> tuple[MergeResult, dict[str, Tensor]]:
    """The result with what was repaired, and the tensors themselves.

    Args:
        asked: this repair was asked for by name; else what cannot be solved with all inputs is written unsolved.
    """
    from mergeid.stages.repair import repair_merged

    def repaired(how: str) -> Repair:
        return repair_merged(members, mode=how, skip=met.skip, device=run.place, progress=run.tell)

    try:
        done = repaired(kind)
    except MergeidError:
        if asked or kind in ("none", "bn", "repair"):
            raise
        done = repaired("bn")  # nothing without BatchNorm
        done.notes.append("the merge could be solved with half of the inputs, but not with all: it is written unsolved")
    result = _noted(result, *done.notes)
    return replace(result, repair=done.to_json(), repaired=sorted(done.tensors)), done.tensors


def _noted(result: MergeResult, *notes: str) -> MergeResult:
    return replace(result, notes=[*result.notes, *notes])


def _with_density(parameters: Mapping[str, Any] | None, density: float | Sequence[float] | None) -> dict[str, Any]:
    found = dict(parameters or {})
    if density is not None:
        found["density"] = density if isinstance(density, (int, float)) else list(density)
    return found


def _state(met: Met, members: Members | None, settings: MergeSettings) -> dict[str, Tensor]:
    """The merged state dict of live modules.

    Raises `MergeidError` where a tensor of it would hold NaN or an infinite number."""
    from mergeid.combine.by_torch import is_finite, why_not_finite
    from mergeid.stages.members import merged_tensors

    if members is not None:
        state, names = members.merged_state(met.skip), members.names()
    else:
        states, names = [values_of(c.module) for c in met.models if c.module is not None], {}
        base = None if met.base is None or met.base.module is None else values_of(met.base.module).__getitem__
        state = dict(merged_tensors(states, settings, base=base, skip=met.skip))
    merged = set(met.float_names)
    for key, value in state.items():  # as a merge of files refuses them
        name = names.get(key, key)
        if name in merged and not is_finite(value):
            inputs = [(c.tensor(name), c) for c in met.everyone if name in c.table]
            raise MergeidError(why_not_finite(name, inputs, value.dtype, settings))
    return state


def _has_batchnorm(members: Members) -> bool:
    from mergeid.repair.batchnorm import batchnorm_layers

    return bool(batchnorm_layers(members.first.model))
