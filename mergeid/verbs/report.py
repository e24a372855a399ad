"""One page about a pair: planned, predicted, merged and measured, with everything that the verdict rests on."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.basics.stopping import TemporaryFolder
from mergeid.errors import MergeidError, WillNotMerge
from mergeid.io.opening import Source, is_live
from mergeid.io.output import check_new, default_name, free_name
from mergeid.methods.settings import MethodRequest
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Calibration, Matching, Output, Progress, Reading, Repairing, Run
from mergeid.stages.open import Met, Pair, open_models

if TYPE_CHECKING:
    from mergeid.evaluate.measure import Metrics
    from mergeid.models.examples import Examples
    from mergeid.reporting.page import FileRecord, Measured, Report
    from mergeid.results.barrier import BarrierResult
    from mergeid.results.merge import MergeResult
    from mergeid.results.plan import Plan
    from mergeid.results.prediction import PredictResult

BATCH = 64
POINTS = 9
"""Points of a curve, both ends and the midpoint among them."""
SHARES = (0.0, 0.25, 0.75, 1.0)
"""Of B, in the networks that are solved beside the default merge: each takes as long as the merge."""


@dataclass(frozen=True)
class _Task:
    """What was asked for, and what was made of it so far."""

    a: Source
    b: Source
    data: Calibration
    held: Calibration
    points: int
    run: Run
    met: Met
    pair: Pair
    plan: Plan

    @property
    def reading(self) -> Reading:
        return self.met.bench.reading

    @property
    def examples(self) -> Examples:
        """To measure on."""
        return _examples(self.met, self.data, self.pair)


@verb
def report(
    a: Source,
    b: Source,
    *,
    data: o.Labelled,
    calibration: Annotated[
        Any, o.Option("Examples to match on (no labels needed). Default: DATA.", o.INPUT, "DATA")
    ] = None,
    output: str | os.PathLike[str] | None = None,
    force: o.Force = False,
    merge: Annotated[
        bool,
        o.Option("Also make the default merge and measure it.", flags=("--merge/--no-merge",), kind=bool),
    ] = True,
    points: Annotated[int, o.count("Number of points on each curve, including both ends.", o.HOW, 3, 1_000)] = POINTS,
    arch: o.Arch = None,
    config: o.Config = None,
    skip: o.Skip = (),
    limit: Annotated[int | None, o.count("Number of examples to measure on. Default: all.", o.INPUT, 1)] = None,
    image_size: o.ImageSize = None,
    batch_size: o.BatchSize = BATCH,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    allow_pickle: o.AllowPickle = False,
    dequantise: o.Dequantise = False,
    progress: Progress | None = None,
) -> Report:
    """Plan, predict, merge and measure a pair, and put it on one HTML page. No weights are written.

    Args:
        a, b: files, folders or hub ids.
        data: labelled examples to measure on.
        calibration: examples to match on, labels unused; default: `data`.
        output: the page; None: only the result is returned (`mergeid.reporting.page.render` makes the page of it).
        force: replace an earlier page.
        merge: also make the merge that `mergeid merge` makes by default, in a temporary folder, and measure it.
        points: number of points of every curve, at least 3.
        limit: most examples to measure on; None: all.
        image_size: height and width of the data's images; None: the model's own.

    Raises `MergeidError` for anything wrong with the input.
    """
    from mergeid.reporting.page import Report, write_page
    from mergeid.reporting.page.results import versions

    if is_live(a) or is_live(b):
        raise MergeidError("a report is about files; save the live modules first")
    if points < 3:
        raise MergeidError(f"--points must be at least 3, got {points}")
    if output is not None and not force:
        check_new({"-o": Path(output)})
    began = time.perf_counter()
    held = Calibration(calibration if calibration is not None else data)
    run = Run.of(progress, device=device, seed=seed, batch_size=batch_size)
    reading = Reading(arch, config, tuple(skip), allow_pickle, dequantise=dequantise, image_size=image_size)
    met = open_models(Workbench(reading, Run.of(progress, device=device, seed=seed)), [a, b])
    from mergeid.stages.plan import plan_pair

    pair, plan = plan_pair(met, Matching(), held)
    task = _Task(a, b, Calibration(data, limit), held, points, run, met, pair, plan)
    curves = _curves(task)
    prediction, unpredicted = _predicted(task)
    tried = _tried(task) if merge else _Tried()
    notes = [*plan.notes, *unpredicted, *tried.notes, *(prediction.notes if prediction is not None else ())]
    if calibration is None:
        notes.append("the models were matched and measured on the same data; give --calibration to keep them apart")
    own = ["--limit", str(limit)] if limit is not None else []
    own += ["--points", str(points)] if points != POINTS else []
    own += ["--batch-size", str(batch_size)] if batch_size != BATCH else []
    own += [] if merge else ["--no-merge"]
    found = Report(
        plan.a,
        plan.b,
        plan.arch,
        plan,
        (*curves, *tried.solved),
        tried.measured,
        prediction,
        tried.merge,
        tried.refused,
        inputs=_files(pair),
        data=_said(data),
        calibration=_said(held.data),
        command=_command("report", task, *own, "-o", os.fspath(output or "report.html")),
        seconds=time.perf_counter() - began,
        seed=seed,
        versions=versions(),
        notes=tuple(dict.fromkeys(notes)),
    )
    found = _with_next(found, task)
    if output is not None:
        write_page(found, Path(output))
    return found


def _examples(met: Met, asked: Calibration, pair: Pair) -> Examples:
    found = met.bench.examples(asked, pair.a)
    if found is None:
        raise MergeidError("a report measures its models on examples; give them with --data")
    return found


def _curves(task: _Task) -> tuple[BarrierResult, ...]:
    """Loss from A to B as they are, with every space matched, and as planned where that is neither; with the
    BatchNorm statistics estimated again too, where there are some."""
    import numpy as np

    from mergeid.evaluate.interpolate import Line, Measuring, Reestimate, barrier_curve
    from mergeid.models.running import make_accelerator
    from mergeid.nn.folding import fold_line
    from mergeid.repair.batchnorm import batchnorm_layers

    pair, plan, examples = task.pair, task.plan, task.examples
    held = _examples(task.met, task.held, pair)
    how = Measuring(task.run.batch_size, accelerator=make_accelerator(task.run.place))
    grid = tuple(np.linspace(0, 1, task.points).tolist())
    repairs = (False, True) if batchnorm_layers(pair.a.model) else (False,)
    wanted = [(name, each, repair) for name, each in _orders(plan).items() for repair in repairs]
    out: list[BarrierResult] = []
    for name, each, repair in wanted:
        state_b = each.carry_state(pair.b.state())
        state_a, state_b, model = fold_line(pair.a.state(), state_b, pair.a.model)
        done = len(out) * task.points
        out.append(
            barrier_curve(
                Line(
                    state_a,
                    state_b,
                    model,
                    pair.a.adapter.forward,
                    pair.a.loss,
                    grid,
                    f"{name}, repaired" if repair else name,
                ),
                examples,
                how,
                repair=Reestimate(held, as_merged=True) if repair else None,
                progress=_counted(task.run.tell, done, len(wanted) * task.points),
            )
        )
    return tuple(out)


def _counted(progress: Progress, done: int, total: int) -> Callable[..., None]:
    count = iter(range(done + 1, total + 1))
    return lambda *_: progress("measuring", next(count), total)


def _orders(plan: Plan) -> dict[str, Plan]:
    """The orders of B that are measured, by name."""
    from mergeid.neuron_graph.group import same_element

    found = {"direct": plan.plain()}
    if plan.matched is not None and plan.full().moves:
        found["matched"] = plan.full()
    if plan.moves and not ("matched" in found and same_element(plan.element, found["matched"].element)):
        found["planned"] = plan
    return found


def _predicted(task: _Task) -> tuple[PredictResult | None, tuple[str, ...]]:
    """The prediction, or why there is none (no logits, models that do not run side by side)."""
    from mergeid.verbs.predict import predict_pair

    try:
        return predict_pair(task.met, Matching("always"), task.held), ()
    except MergeidError as error:
        return None, (f"no prediction: {error}",)


@dataclass(frozen=True)
class _Tried:
    """The merge that `mergeid merge` makes by itself, made beside nothing.

    Attributes:
        measured: where it lies off the lines between the models. refused: why it is none. solved: the curve that it
            lies on.
    """

    merge: MergeResult | None = None
    measured: tuple[Measured, ...] = ()
    solved: tuple[BarrierResult, ...] = ()
    refused: str | None = None
    notes: tuple[str, ...] = ()


def _tried(task: _Task) -> _Tried:
    from mergeid.evaluate.measure import evaluate_loaded
    from mergeid.methods.registry import get_method
    from mergeid.models.load import load_model
    from mergeid.reporting.page import Measured
    from mergeid.stages.merge_request import MergeRequest
    from mergeid.stages.repair import SOLVE
    from mergeid.verbs.merge import merge_models

    with TemporaryFolder() as folder:
        output = Path(folder) / default_name(task.a)  # type: ignore[arg-type]
        try:
            request = MergeRequest(
                (task.a, task.b),
                None,
                MethodRequest(get_method("linear"), seed=task.run.seed),
                task.held,
                Matching(),
                Repairing(),
                Output(output),
                transport=False,
            )
            made = merge_models(request, task.met.bench)
        except WillNotMerge as error:
            return _Tried(refused=str(error))
        except MergeidError as error:
            return _Tried(notes=(f"no merge was made: {error}",))
        kind = "" if made.repair is None else str(made.repair["kind"])
        said = tuple(made.notes)
        if not kind.startswith(SOLVE):
            return _Tried(made, notes=said)
        loaded = load_model(output, Reading(task.reading.arch), task.met.bench.run)
        found = evaluate_loaded(loaded, task.examples, task.run)
    curves = (_solved(task, made, found),) if kind == SOLVE else ()  # one that leans has no twin at other shares
    return _Tried(made, (Measured("solved", found.loss, found.accuracy),), curves, notes=said)


def _solved(task: _Task, made: MergeResult, found: Metrics) -> BarrierResult:
    """Merges of other shares, solved as the default merge was, which is the one in the middle."""
    from mergeid.evaluate.interpolate import Line, Measuring, Solve, barrier_curve
    from mergeid.models.running import make_accelerator
    from mergeid.nn.folding import fold_line
    from mergeid.results.comparison import MATCHED, PLAIN

    pair, chosen = task.pair, (made.comparison or {}).get("chosen")
    plan = {PLAIN: task.plan.plain, MATCHED: task.plan.full}.get(str(chosen), lambda: task.plan)()
    ends = fold_line(pair.a.state(), plan.carry_state(pair.b.state()), pair.a.model)
    curve = barrier_curve(
        Line(*ends, pair.a.adapter.forward, pair.a.loss, SHARES, "solved"),
        task.examples,
        Measuring(task.run.batch_size, accelerator=make_accelerator(task.run.place)),
        repair=Solve(_examples(task.met, task.held, pair), pair.a.inputs_of),
        progress=_counted(task.run.tell, 0, len(SHARES)),
    )
    right = curve.accuracies
    return replace(
        curve,
        lambdas=(*SHARES[:2], 0.5, *SHARES[2:]),
        losses=(*curve.losses[:2], found.loss, *curve.losses[2:]),
        accuracies=None if right is None else (*right[:2], found.accuracy or 0.0, *right[2:]),
    )


def _files(pair: Pair) -> tuple[FileRecord, ...]:
    """The models' weight files."""
    from mergeid.reporting.page.results import file_records

    out: list[FileRecord] = []
    for role, loaded in (("model A", pair.a), ("model B", pair.b)):
        if loaded.checkpoint is not None:
            out += file_records(role, loaded.checkpoint.files)
    return tuple(out)


def _said(data: Any) -> str:
    return os.fspath(data) if isinstance(data, (str, os.PathLike)) else "data handed over in Python"


def _command(verb_name: str, task: _Task, *rest: str) -> str:
    """What a terminal makes the same of."""
    words = ["mergeid", verb_name, os.fspath(task.a), os.fspath(task.b)]  # type: ignore[arg-type]
    words += ["--data", _said(task.data.data if verb_name == "report" else task.held.data)]
    if verb_name == "report" and task.held.data is not task.data.data:
        words += ["--calibration", _said(task.held.data)]
    reading = task.reading
    size = None if reading.image_size is None else str(reading.image_size)
    for option, value in (("--arch", reading.arch), ("--config", reading.config), ("--image-size", size)):
        words += [option, value] if value is not None else []
    for pattern in task.reading.skip:
        words += ["--skip", pattern]
    words += ["--seed", str(task.run.seed)] if task.run.seed else []
    words += ["--device", task.run.place] if task.run.place != "cpu" else []
    words += ["--allow-pickle"] if task.reading.allow_pickle else []
    words += ["--dequantise"] if task.reading.dequantise else []
    return shlex.join([*words, *rest])


def _with_next(found: Report, task: _Task) -> Report:
    """The report with the command that makes its best merge, where one is worth making."""
    from mergeid.reporting.page.verdict import merges, sentence

    best = next((f for f in merges(found) if f.best), None)
    if best is None or sentence(found)[0] == "no":
        return found
    way, _, repaired = best.kind.partition(", ")
    words: list[str] = []
    if way != "solved":  # which is what is made by default
        match = {"direct": "never", "matched": "always"}.get(way)
        words = ["--match", match] if match else []
        words += ["--repair", "bn" if repaired else "none"]
    name = free_name(task.a)  # type: ignore[arg-type]
    return replace(found, next_command=_command("merge", task, *words, "-o", name))
