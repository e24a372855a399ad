"""``barrier``: loss and accuracy on the straight line between two models, measured."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.errors import MergeidError
from mergeid.io.dtypes import parse_dtype, torch_dtype
from mergeid.io.opening import Source
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import LIMIT, Calibration, Example, Matching, Progress, Reading, Run, check_count
from mergeid.stages.open import Pair, check_matching, open_models, pair_of, skipped_keys

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeid.models.examples import Examples
    from mergeid.results.barrier import BarrierResult

LABELS = {"never": "direct", "auto": "mergeid", "always": "matched"}


@verb
def barrier(
    a: Source,
    b: Source,
    *,
    data: o.Labelled,
    match: o.Match = "never",
    matcher: o.Matcher = None,
    repair: Annotated[bool, o.switch("Re-estimate BatchNorm statistics at every point.")] = False,
    solve: Annotated[
        bool,
        o.switch("Also solve the merge anew at every point, on --calibration. It then lies off the straight line."),
    ] = False,
    points: Annotated[int, o.count("Number of points on the line, including both ends.", o.HOW, 2, 10_000)] = 11,
    calibration: Annotated[
        Any,
        o.Option("Examples for matching and re-estimating BatchNorm. Default: DATA.", o.INPUT, "DATA"),
    ] = None,
    arch: o.Arch = None,
    config: o.Config = None,
    skip: o.Skip = (),
    heads: o.Heads = None,
    limit: Annotated[int | None, o.count("Number of examples to take from DATA. Default: all.", o.INPUT, 1)] = None,
    image_size: o.ImageSize = None,
    calibration_limit: int | None = LIMIT,
    batch_size: o.BatchSize = 64,
    seed: o.Seed = 0,
    device: Annotated[
        str | None, o.Option("auto, cpu, cuda, cuda:1, mps … Default: chosen by Accelerate.", o.HOW, "DEVICE")
    ] = None,
    dtype: Annotated[str | None, o.Option("Evaluate in this dtype.", o.HOW, "DTYPE")] = None,
    mixed_precision: Annotated[
        str | None, o.Option("Mixed precision, through Accelerate.", o.HOW, "no|bf16|fp16")
    ] = None,
    resume: Annotated[
        str | os.PathLike[str] | None,
        o.Option("Keep finished points in this file, and continue from them.", o.HOW, "FILE", kind=Path),
    ] = None,
    allow_pickle: o.AllowPickle = False,
    dequantise: o.Dequantise = False,
    example_inputs: Any = None,
    outputs: Sequence[str] = (),
    label: str = "",
    progress: Progress | None = None,
) -> BarrierResult:
    """Measure loss (and accuracy) along the line from A to B, through Accelerate.

    Args:
        data: labelled data.
        match: "never" measures the pair as it is, "auto" and "always" align B first (evidence from `calibration`).
        matcher, config: as for `plan`.
        heads: "both": for classifiers with different classes, as for `merge`: every network on the line has both heads,
            and labels count A's classes, then B's. The ends then know one model's classes only.
        repair: estimate the BatchNorm statistics again at every point, on `calibration`, as `merge` does.
        solve: measure also what solving (`merge --repair solve`) makes of every network between the ends. The result is
            then that curve, and `beside` holds the pair as it is and, unless `match` is "never", as matched.
        points: grid points λ from 0 to 1, at least 2.
        calibration: data for matching and repair; default: `data`.
        limit: most examples to measure on; None: all.
        image_size: height and width of the data's images; None: the model's own.
        dtype: "float64" measures in float64; "float32", "bfloat16" and "float16" are taken too, with their short names.
        outputs: names or globs of those outputs of live modules that count (``"logits"``, ``"0"``); default: all.
        resume: JSON file of finished points.

    Raises `MergeidError` for anything wrong with the input.
    """
    run = Run.of(progress, device=device, seed=seed, batch_size=batch_size)
    if calibration_limit is not None:
        check_count("calibration_limit", calibration_limit)
    measured, matching = Calibration(data, limit), Matching(match, matcher)
    held = Calibration(data if calibration is None else calibration, calibration_limit)
    if points < 2:
        raise MergeidError(f"--points must be at least 2, got {points}")
    if heads is not None and solve:
        raise MergeidError("--solve imitates both ends, which with --heads know one model's classes; leave out one")
    number_format = None if dtype is None else parse_dtype(dtype)
    check_matching(matching, True)
    example = Example.of(example_inputs, outputs)
    reading = Reading(
        arch, config, tuple(skip), allow_pickle, example, dequantise=dequantise, image_size=image_size, heads=heads
    )
    opening = Run.of(progress, seed=seed)  # networks are compared on the CPU, and measured on the device
    met = open_models(Workbench(reading, opening), [a, b])
    pair = pair_of(met, met.models[1])
    import numpy as np

    from mergeid.evaluate.interpolate import Line, Measuring, Reestimate, Solve, barrier_curve
    from mergeid.models.running import make_accelerator

    examples = met.bench.examples(measured, pair.a)
    if examples is None:
        raise MergeidError("a barrier is measured on labelled examples; give them with --data")
    used = met.bench.examples(held, pair.a) if repair or solve or match != "never" else None
    named = label or LABELS[match]
    fix = Reestimate(used, as_merged=True) if repair else None
    lines: list[tuple[str, Matching, Reestimate | Solve | None]] = [(named, matching, fix)]
    if solve and match != "never":
        lines.insert(0, (LABELS["never"], Matching("never"), fix))
    if solve and used is not None:
        lines.append((f"{named}, solved", matching, Solve(used, pair.a.inputs_of)))
    count, every = itertools.count(1), points * len(lines)
    how = Measuring(
        batch_size,
        None if number_format is None else torch_dtype(number_format),
        mixed_precision,
        make_accelerator(run.device),
    )
    fixed = skipped_keys(pair.a, met.skip)
    ends = {order: _ends(pair, order, opening, used, fixed) for _, order, _ in lines}
    curves = [
        barrier_curve(
            Line(*ends[order], pair.a.adapter.forward, pair.a.loss, tuple(np.linspace(0, 1, points).tolist()), name),
            examples,
            how,
            repair=fix,
            resume=Path(resume) if resume else None,
            progress=lambda *_: run.tell("measuring", next(count), every),
        )
        for name, order, fix in lines
    ]
    return replace(curves[-1], beside=tuple(curves[:-1]))


def _ends(
    pair: Pair, matching: Matching, run: Run, examples: Examples | None, fixed: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], nn.Module]:
    """The ends of the line, B in A's order, and a network for them; of asymmetric layers the effective weights, also
    where B's masks were permuted. Tensors that are `fixed` are A's at both ends, and a joined head is both models'."""
    from mergeid.nn.folding import fold_line
    from mergeid.stages.plan import Structural, make_plan

    state_b = pair.b.state()
    if matching.mode != "never":
        made = make_plan(pair, matching, run, examples=examples, structural=Structural(beside=False))
        state_b = made.carry_state(state_b)
    state_a = pair.a.state()
    heads = {key: state_a[key] + state_b[key] for key in pair.a.head}
    both = {**heads, **{key: state_a[key] for key in fixed}}
    return fold_line({**state_a, **both}, {**state_b, **both}, pair.a.model)
