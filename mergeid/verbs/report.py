"""One page about a pair: planned, predicted, merged and measured, with everything that the verdict rests on."""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, WillNotMerge
from mergeid.models.pair import LIMIT, Progress, Source, dataset_of, is_module
from mergeid.request.boundary import verb
from mergeid.stages.planned import Planned, plan_pair

if TYPE_CHECKING:
    from mergeid.evaluate.result import BarrierResult
    from mergeid.neuron_graph.neuron_graph import Element
    from mergeid.prediction.result import PredictResult
    from mergeid.reporting.page import FileRecord, Measured, Report
    from mergeid.verbs.merge import MergeResult

POINTS = 9
"""Points of a curve, both ends and the midpoint among them."""
LIBRARIES = ("mergeid", "torch", "timm", "transformers")
"""What the page names the versions of."""


@dataclass(frozen=True)
class _Task:
    """What was asked for, for all steps."""

    a: Source
    b: Source
    data: Any
    calibration: Any
    arch: str | None
    config: str | None
    skip: Sequence[str]
    allow_pickle: bool
    limit: int | None
    seed: int
    batch_size: int
    device: str
    points: int
    progress: Progress | None

    def common(self) -> dict[str, Any]:
        """The arguments that the verbs share."""
        return {
            "data": self.calibration,
            "arch": self.arch,
            "config": self.config,
            "skip": self.skip,
            "allow_pickle": self.allow_pickle,
            "seed": self.seed,
            "device": self.device,
            "progress": self.progress,
        }


@verb
def report(
    a: Source,
    b: Source,
    *,
    data: Any,
    calibration: Any = None,
    output: str | os.PathLike[str] | None = None,
    solve: bool = True,
    points: int = POINTS,
    arch: str | None = None,
    config: str | None = None,
    skip: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Plan, predict, merge and measure a pair, and put it on one HTML page. No weights are written.

    Args:
        a, b: files, folders or hub ids.
        data: labelled examples to measure on.
        calibration: examples to match on, labels unused; default: `data`.
        output: the page; None: only the result is returned (`mergeid.reporting.page.render` makes the page of it).
        solve: try the merge that is solved layer by layer too.
        points: of every curve, at least 3.
        limit: most examples to measure on; None: all.

    Raises `MergeidError` for anything wrong with the input.
    """
    from mergeid.reporting.page import Report, write_page

    if is_module(a) or is_module(b):
        raise MergeidError("a report is about files; save the live modules first")
    if points < 3:
        raise MergeidError(f"--points must be at least 3, got {points}")
    began = time.perf_counter()
    held = calibration if calibration is not None else data
    task = _Task(a, b, data, held, arch, config, skip, allow_pickle, limit, seed, batch_size, device, points, progress)
    planned = plan_pair(a, b, match="auto", limit=LIMIT, batch_size=32, example_inputs=None, **task.common())
    plan = planned.plan
    curves = _curves(task, planned)
    prediction = _predicted(task)
    merged, solved, refused = _solved(task, planned) if solve else (None, (), None)
    notes = [n for n in plan.notes]
    if calibration is None:
        notes.append("the models were matched and measured on the same data; give --calibration to keep them apart")
    found = Report(
        plan.a,
        plan.b,
        plan.arch,
        plan,
        curves,
        solved,
        prediction,
        merged,
        refused,
        inputs=_files(planned),
        data=_said(data),
        calibration=_said(held),
        command=_command("report", task, "-o", os.fspath(output or "report.html")),
        seconds=time.perf_counter() - began,
        seed=seed,
        versions=versions(),
        notes=tuple(dict.fromkeys(notes)),
    )
    found = _with_next(found, task)
    if output is not None:
        write_page(found, Path(output))
    return found


def versions() -> dict[str, str]:
    """Of the libraries that a result may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def file_records(role: str, paths: Sequence[Path]) -> tuple[FileRecord, ...]:
    """Files with their hashes and sizes."""
    import hashlib

    from mergeid.reporting.page import FileRecord

    found = []
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        found.append(FileRecord(role, str(path), digest.hexdigest(), path.stat().st_size))
    return tuple(found)


def _digest(file: Any) -> Any:
    import hashlib

    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _curves(task: _Task, planned: Planned) -> tuple[BarrierResult, ...]:
    """Loss from A to B as they are, with every space matched, and as planned where that is neither; with the
    BatchNorm statistics estimated again too, where there are some."""
    import numpy as np

    from mergeid.evaluate.interpolate import barrier_curve
    from mergeid.evaluate.measure import make_accelerator
    from mergeid.nn.folding import fold_line
    from mergeid.repair.batchnorm import batchnorm_layers

    pair, plan = planned.pair, planned.plan
    dataset, collate = dataset_of(task.data, pair.a, task.limit, task.seed)
    adapter, arch = pair.a.adapter, pair.a.arch
    repairs = (False, True) if batchnorm_layers(pair.a.model) else (False,)
    elements = _elements(planned)
    wanted = [(name, element, repair) for name, element in elements.items() for repair in repairs]
    out: list[BarrierResult] = []
    for name, element, repair in wanted:
        state_b = plan.graph.apply_state(element, pair.b.state())
        state_a, state_b, model = fold_line(pair.a.state(), state_b, pair.a.model)
        done = len(out) * task.points
        out.append(
            barrier_curve(
                state_a,
                state_b,
                model,
                dataset,
                forward=adapter.forward,
                loss=lambda output, batch: adapter.loss(arch, output, batch),
                lambdas=tuple(np.linspace(0, 1, task.points).tolist()),
                repair=repair,
                calibration=planned.dataset,
                batch_size=task.batch_size,
                accelerator=make_accelerator(task.device),
                collate=collate,
                label=f"{name}, repaired" if repair else name,
                progress=_counted(task.progress, done, len(wanted) * task.points),
            )
        )
    return tuple(out)


def _counted(progress: Progress | None, done: int, total: int) -> Callable[..., None] | None:
    if progress is None:
        return None
    count = iter(range(done + 1, total + 1))
    return lambda *_: progress("measuring", next(count), total)


def _elements(planned: Planned) -> dict[str, Element]:
    """The orders of B that are measured, by name."""
    from mergeid.neuron_graph.group import same_element

    plan = planned.plan
    found: dict[str, Element] = {"direct": plan.graph.identity()}
    if plan.matched is not None and not same_element(plan.matched, found["direct"]):
        found["matched"] = plan.matched
    if plan.moves and not any(same_element(plan.element, e) for e in found.values()):
        found["planned"] = plan.element
    return found


def _predicted(task: _Task) -> PredictResult | None:
    """None where the models have no logits, or do not run side by side."""
    from mergeid.verbs.predict import predict

    try:
        return predict(task.a, task.b, **task.common())
    except MergeidError:
        return None


def _solved(task: _Task, planned: Planned) -> tuple[MergeResult | None, tuple[Measured, ...], str | None]:
    """The merge that is solved layer by layer, made beside nothing and measured; or why there is none."""
    from mergeid.evaluate.measure import evaluate, make_accelerator
    from mergeid.models.load import load
    from mergeid.reporting.page import Measured
    from mergeid.verbs.merge import merge

    with tempfile.TemporaryDirectory(prefix="mergeid-report-") as folder:
        single = Path(os.fspath(task.a)).suffix == ".safetensors"  # type: ignore[arg-type]
        output = Path(folder) / ("merged.safetensors" if single else "merged")
        try:
            made = merge(task.a, task.b, output=output, repair="solve", **task.common())
        except WillNotMerge as error:
            return None, (), str(error)
        except MergeidError:
            return None, (), None
        if made.repair is None or made.repair.get("kind") != "solve":
            return made, (), None
        loaded = load(output, arch=task.arch, allow_pickle=task.allow_pickle, seed=task.seed)
        dataset, collate = dataset_of(task.data, planned.pair.a, task.limit, task.seed)
        found = evaluate(
            loaded.model,
            dataset,
            forward=loaded.forward,
            loss=lambda out, batch: loaded.adapter.loss(loaded.arch, out, batch),
            batch_size=task.batch_size,
            accelerator=make_accelerator(task.device),
            collate=collate,
        )
    return made, (Measured("solved", found.loss, found.accuracy),), None


def _files(planned: Planned) -> tuple[FileRecord, ...]:
    """The models' weight files."""
    out: list[FileRecord] = []
    for role, loaded in (("model A", planned.pair.a), ("model B", planned.pair.b)):
        if loaded.checkpoint is not None:
            out += file_records(role, loaded.checkpoint.files)
    return tuple(out)


def _said(data: Any) -> str:
    return os.fspath(data) if isinstance(data, (str, os.PathLike)) else "data handed over in Python"


def _command(verb_name: str, task: _Task, *rest: str) -> str:
    """What a terminal makes the same of."""
    words = ["mergeid", verb_name, os.fspath(task.a), os.fspath(task.b)]  # type: ignore[arg-type]
    words += ["--data", _said(task.data if verb_name == "report" else task.calibration)]
    if verb_name == "report" and task.calibration is not task.data:
        words += ["--calibration", _said(task.calibration)]
    for option, value in (("--arch", task.arch), ("--config", task.config)):
        words += [option, value] if value is not None else []
    for pattern in task.skip:
        words += ["--skip", pattern]
    words += ["--seed", str(task.seed)] if task.seed else []
    return shlex.join([*words, *rest])


def _with_next(found: Report, task: _Task) -> Report:
    """The report with the command that makes its best merge, where one is worth making."""
    from dataclasses import replace

    from mergeid.reporting.page.verdict import merges, sentence

    best = next((f for f in merges(found) if f.best), None)
    if best is None or sentence(found)[0] == "no":
        return found
    way, _, repaired = best.kind.partition(", ")
    match = {"direct": "never", "matched": "always"}.get(way)
    words = ["--match", match] if match else []
    words += ["--repair", "solve" if way == "solved" else "bn" if repaired else "none"]
    return replace(found, next_command=_command("merge", task, *words, "-o", "merged.safetensors"))
