"""Sketch a model once, and predict every pair of sketches without running a model again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.io.output import check_files
from mergeid.models.pair import Progress, Source, dataset_of
from mergeid.request.boundary import verb
from mergeid.verbs.predict import TOLERATED, check_tolerated

if TYPE_CHECKING:
    from mergeid.prediction.result import PredictResult
    from mergeid.prediction.sketch import Sketch

FORMAT = "mergeid.predictions/1"
EXAMPLES = 256


@dataclass
class PredictionMatrix:
    """Every pair of N sketches.

    Attributes:
        names: of the models. pairs: (i, j), i < j -> what is predicted.
    """

    names: list[str]
    tolerated: float
    pairs: dict[tuple[int, int], PredictResult] = field(default_factory=dict)

    def expected(self) -> list[list[float]]:
        """Barrier in nats under the best assignment, 0 on the diagonal."""
        n = len(self.names)
        return [
            [self.pairs[min(i, j), max(i, j)].best.nats.expected if i != j else 0.0 for j in range(n)] for i in range(n)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "models": self.names,
            "tolerated": self.tolerated,
            "barrier_nats": self.expected(),
            "pairs": [{"i": i, "j": j, **result.to_json()} for (i, j), result in self.pairs.items()],
        }


@verb
def sketch(
    source: Source,
    *,
    data: Any,
    output: str | os.PathLike[str] | None = None,
    arch: str | None = None,
    limit: int = EXAMPLES,
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
    example_inputs: Any = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Sketch:
    """What a model does on fixed inputs: activations, outputs, how it answers to averaging
    (`mergeid.prediction.sketch`).

    Args:
        source: file, folder, hub id, or a live module whose outputs are logits.
        data: inputs; sketches compare only where these are the same.
        output: file to write; None: nothing is written.
        limit: most inputs. force: replace an earlier output.

    Raises `MergeidError` for anything wrong with the input."""
    target = None if output is None else check_sketch_output(output, force, [source, data, arch])
    if limit < 2:
        raise MergeidError(f"--limit must be at least 2 for a sketch, got {limit}")
    from mergeid.models.load import graph_of, load, opened, stated_config
    from mergeid.prediction.sketch import make_sketch, save_sketch

    tell = progress or (lambda *_: None)
    tell("loading", 0, 1)
    loaded = load(source, arch=arch, example_inputs=example_inputs, allow_pickle=allow_pickle, device=device, seed=seed)
    dataset, collate = dataset_of(data, loaded, limit, seed)
    tell("tracing and verifying the neuron graph", 0, 1)
    graph = graph_of(loaded, seed=seed)
    made = make_sketch(
        loaded, graph, dataset, collate, limit=limit, progress=lambda done, total: tell("sketching", done, total)
    )
    made.config = stated_config(loaded.checkpoint or opened(loaded.model), arch)
    if target is not None:
        save_sketch(made, target)
    return made


def check_sketch_output(output: str | os.PathLike[str], force: bool, reads: Sequence[Any] = ()) -> Path:
    """Raises `MergeidError` where the sketch cannot be written, or is something that is read."""
    path = Path(os.fspath(output))
    if path.suffix != ".sketch":
        raise MergeidError(f"-o {path}: a sketch needs the ending .sketch, such as {path.stem}.sketch")
    check_files({"-o": path}, [x for x in reads if isinstance(x, (str, os.PathLike))])
    if path.exists() and not force:
        raise MergeidError(f"output {path} exists already; choose another name (option -o) or pass --force")
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
        raise MergeidError("one sketch has no pair; give at least two")
    from mergeid.prediction.model import shipped
    from mergeid.prediction.result import PredictResult, outlook
    from mergeid.prediction.sketch import Sketch, load_sketch
    from mergeid.prediction.sketched import Standard, as_elements, check_alike, output_features, sketch_features

    made = [Standard(s if isinstance(s, Sketch) else load_sketch(Path(os.fspath(s)))) for s in sketches]
    names = [f"sketch {i}" if isinstance(s, Sketch) else Path(os.fspath(s)).stem for i, s in enumerate(sketches)]
    for other in made[1:]:
        check_alike(made[0].sketch, other.sketch)
    found = PredictionMatrix(names, tolerate)
    predictor, total = shipped(), len(made) * (len(made) - 1) // 2
    for i, a in enumerate(made):
        for j in range(i + 1, len(made)):
            if progress:
                progress("comparing sketches", len(found.pairs), total)
            b = made[j]
            outputs, outlooks = output_features(a, b), []
            for name, element in as_elements(a, b).items():
                for repaired in (False, True) if a.sketch.repairable else (False,):
                    features, layers = sketch_features(a, b, element, outputs, repaired=repaired)
                    outlooks.append(outlook(predictor, "sketches", name, repaired, features, layers, tolerate))
            found.pairs[i, j] = PredictResult(
                names[i],
                names[j],
                a.sketch.arch,
                "sketches",
                len(a.sketch.logits),
                tolerate,
                outlooks,
                None,
                predictor.version,
            )
    return found
