"""Sketch a model once, and predict every pair of sketches without running a model again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.errors import MergeidError
from mergeid.io.opening import Source, open_checkpoint
from mergeid.io.output import check_files, check_new
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Calibration, Example, Progress, Reading, Run, config_file
from mergeid.verbs.predict import TOLERATED, check_tolerated

if TYPE_CHECKING:
    from mergeid.neuron_graph.neuron_graph import Element
    from mergeid.prediction.features import Features
    from mergeid.prediction.sketch import Sketch
    from mergeid.prediction.sketched import Standard
    from mergeid.results.prediction import Finding, PredictionMatrix, PredictResult

EXAMPLES = 256


@verb
def sketch(
    source: Source,
    *,
    data: Annotated[
        Any,
        o.Option("Inputs to run the model on; sketches can only be compared if these are the same.", o.INPUT, "DATA"),
    ],
    output: str | os.PathLike[str] | None = None,
    arch: o.Arch = None,
    limit: Annotated[int, o.Option("Number of inputs to take from DATA.", o.INPUT, "N", kind=int, least=2)] = EXAMPLES,
    image_size: o.ImageSize = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    allow_pickle: o.AllowPickle = False,
    dequantise: o.Dequantise = False,
    example_inputs: Any = None,
    force: o.Force = False,
    progress: Progress | None = None,
) -> Sketch:
    """Record what a model does on fixed inputs: activations, outputs, and how sensitive it is to averaging
    (`mergeid.prediction.sketch`).

    Args:
        source: file, folder, hub id, or a live module whose outputs are logits.
        data: inputs; only sketches of the same inputs can be compared.
        output: file to write; None: nothing is written.
        image_size: height and width of the data's images; None: the model's own.
        limit: most inputs. force: replace an earlier output.

    Raises `MergeidError` for anything wrong with the input."""
    target = None if output is None else check_sketch_output(output, force, [source, data, config_file(arch)])
    if limit < 2:
        raise MergeidError(f"--limit must be at least 2 for a sketch, got {limit}")
    from mergeid.models.architecture import stated_config
    from mergeid.prediction.sketch import make_sketch, save_sketch

    run = Run.of(progress, device=device, seed=seed)
    example = Example.of(example_inputs)
    reading = Reading(arch, allow_pickle=allow_pickle, dequantise=dequantise, example=example, image_size=image_size)
    bench = Workbench(reading, run)
    loaded = bench.load(source)
    examples = bench.examples(Calibration(data, limit), loaded)
    if examples is None:
        raise MergeidError("a sketch records what a model does on some inputs; give them with --data")
    made = make_sketch(
        loaded,
        bench.graph(loaded),
        examples.batched("sketch").items,
        examples.collate,
        limit=limit,
        progress=lambda done, total: run.tell("sketching", done, total),
    )
    made.config = stated_config(loaded.checkpoint or open_checkpoint(loaded.model), arch)
    if target is not None:
        save_sketch(made, target)
    return made


def check_sketch_output(output: str | os.PathLike[str], force: bool, reads: Sequence[Any] = ()) -> Path:
    """Raises `MergeidError` where the sketch cannot be written, or is something that is read."""
    path = Path(os.fspath(output))
    if path.suffix != ".sketch":
        raise MergeidError(f"-o {path}: a sketch needs the ending .sketch, such as {path.stem}.sketch")
    check_files({"-o": path}, [x for x in reads if isinstance(x, (str, os.PathLike))])
    if not force:
        check_new({"-o": path})
    return path


@verb
def predict_sketches(
    sketches: Sequence[str | os.PathLike[str] | Sketch],
    *,
    tolerate: float = TOLERATED,
    progress: Progress | None = None,
) -> PredictionMatrix:
    """The barrier of every pair among N sketches.

    Args:
        sketches: files, or what `sketch` returned; at least two, of one architecture and the same inputs.

    Raises `MergeidError` for sketches that do not compare."""
    check_tolerated(tolerate)
    if len(sketches) < 2:
        raise MergeidError("a single sketch makes no pair; give at least two")
    from mergeid.evaluate.agreement import agreement_of
    from mergeid.prediction.model import shipped
    from mergeid.prediction.sketch import Sketch, load_sketch
    from mergeid.prediction.sketched import Standard, as_elements, check_alike, output_features
    from mergeid.results.prediction import PredictionMatrix, PredictResult, outlooks_of

    made = [Standard(s if isinstance(s, Sketch) else load_sketch(Path(os.fspath(s)))) for s in sketches]
    names = [f"sketch {i}" if isinstance(s, Sketch) else Path(os.fspath(s)).stem for i, s in enumerate(sketches)]
    for other in made[1:]:
        check_alike(made[0].sketch, other.sketch)
    found: dict[tuple[int, int], PredictResult] = {}
    predictor, total = shipped(), len(made) * (len(made) - 1) // 2
    for i, a in enumerate(made):
        for j in range(i + 1, len(made)):
            if progress:
                progress("comparing sketches", len(found), total)
            b = made[j]
            outputs = output_features(a, b)
            seen = agreement_of(a.sketch.logits, b.sketch.logits)
            findings = [_finding(a, b, name, e, outputs) for name, e in as_elements(a, b).items()]
            found[i, j] = PredictResult(
                names[i],
                names[j],
                a.sketch.arch,
                "sketches",
                len(a.sketch.logits),
                tolerate,
                outlooks_of(predictor, "sketches", findings, tolerate),
                None,
                predictor.version,
                [] if seen.told else [seen.held_against],
            )
    return PredictionMatrix(names, tolerate, found)


def _finding(a: Standard, b: Standard, name: str, element: Element, outputs: Features) -> Finding:
    from mergeid.prediction.sketched import sketch_features
    from mergeid.results.prediction import Finding

    features, layers = sketch_features(a, b, element, outputs, repaired=False)
    repaired = sketch_features(a, b, element, outputs, repaired=True)[0] if a.sketch.repairable else None
    return Finding(name, features, repaired, layers)
