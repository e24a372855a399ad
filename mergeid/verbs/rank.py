"""Which of these models should be merged? Every candidate's merge with one model predicted, or every pair's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mergeid.errors import MergeidError
from mergeid.io.opening import Source, is_live
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Calibration, Matching
from mergeid.request.usual import Usual, calibration_of, requests_of
from mergeid.stages.open import check_matching, open_models
from mergeid.verbs.predict import TOLERATED, Tolerate, Trial, check_tolerated, predict_pair

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergeid.results.prediction import PredictionMatrix, PredictResult
    from mergeid.results.ranking import Ranking

WEIGHTS = (".safetensors",)
MODELS = ("config.json", "adapter_config.json")


@verb
def rank(
    models: Sequence[Source],
    *,
    data: o.Data = None,
    every: Annotated[bool, o.switch("Predict every pair, not only those with the first model.")] = False,
    tolerate: Tolerate = TOLERATED,
    trial: Trial = False,
    matcher: o.Matcher = None,
    batch_size: o.BatchSize = 128,
    **usual: Unpack[Usual],
) -> Ranking | PredictionMatrix:
    """Find out which models merge best with the first one, or with `every`, how each pair would merge.

    Args:
        models: the model to find partners for, and the candidates: files, folders, hub ids, live modules. A folder that
            holds several models or adapters stands for all of them.
        data: inputs of the kind that the merged model is meant for, which the first model knows; without them all run
            on random inputs, which says less.
        every: predict every pair.
        tolerate: loss in nats whose probability is asked for.
        trial: also make the merges in memory and run them on the data; candidates are then ranked by that.
        batch_size: of matching; for speed and memory only.
        usual: how models are read and the work is done, see `mergeid.request.usual.Usual`.

    Candidates are ranked by the loss that the merged network is expected to have (`Partner.beyond`).

    Returns:
        the ranking of the candidates, or with `every` the matrix of all pairs.

    Raises `MergeidError` for anything wrong with the input; a candidate that does not fit is only named in the
    ranking, unless `every` is given."""
    check_tolerated(tolerate)
    run, reading = requests_of(usual, batch_size)
    calibration, matching = calibration_of(data, usual), Matching("always", matcher)
    check_matching(matching, calibration.given)
    asked = models if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    found = [model for source in asked for model in models_in(source)]
    if len(found) < 2:
        raise MergeidError(
            "a single model has no partner; name the candidates too, or a folder that holds several models"
        )
    bench, names = Workbench(reading, run), names_of(found)
    from mergeid.results.prediction import PredictionMatrix
    from mergeid.results.ranking import Ranking

    # what all comparisons share is loaded, traced and read once
    first = bench.load(bench.open(found[0]))
    bench.graph(first)
    bench.examples(calibration, first)

    def predicted(i: int, j: int, done: int, total: int) -> PredictResult:
        run.tell(f"comparing {names[i]} and {names[j]}", done, total)
        return _predicted(bench.apart(), (found[i], found[j]), matching, calibration, tolerate, trial)

    if every:
        pairs = [(i, j) for i in range(len(found)) for j in range(i + 1, len(found))]
        made = {(i, j): predicted(i, j, k, len(pairs)) for k, (i, j) in enumerate(pairs)}
        return PredictionMatrix(names, tolerate, made)
    results: list[tuple[str, PredictResult]] = []
    failed: list[tuple[str, str]] = []
    for k in range(1, len(found)):
        try:
            results.append((names[k], predicted(0, k, k - 1, len(found) - 1)))
        except MergeidError as error:
            failed.append((names[k], str(error)))
    if not results:
        raise MergeidError(f"none of the candidates can be merged with {names[0]}: {failed[0][0]}: {failed[0][1]}")
    return Ranking.of(names[0], tolerate, results, failed)


def _predicted(
    bench: Workbench,
    models: tuple[Source, Source],
    matching: Matching,
    calibration: Calibration,
    tolerate: float,
    trial: bool,
) -> PredictResult:
    met = open_models(bench, models)
    return predict_pair(met, matching, calibration, tolerate=tolerate, trial=trial)


def models_in(source: Source) -> list[Source]:
    """The model itself, or those of a folder that is none: its subfolders with weights, and its files of weights."""
    if is_live(source) or not isinstance(source, (str, os.PathLike)):
        return [source]
    folder = Path(os.fspath(source))
    try:
        if not folder.is_dir() or any((folder / name).exists() for name in MODELS) or any(folder.glob("*.index.json")):
            return [source]
        inside = sorted(p for p in folder.iterdir() if p.suffix in WEIGHTS or (p.is_dir() and _holds_weights(p)))
    except (OSError, ValueError):  # opening it says what is wrong
        return [source]
    return list(inside) if len(inside) > 1 or any(p.is_dir() for p in inside) else [source]


def _holds_weights(folder: Path) -> bool:
    return any(p.suffix in WEIGHTS for p in folder.iterdir())


def names_of(models: Sequence[Source]) -> list[str]:
    """As short as they can be told apart: the last part of a path, or all of it where two would be called alike."""
    whole = [os.fspath(m) if isinstance(m, (str, os.PathLike)) else f"model {i + 1}" for i, m in enumerate(models)]
    short = [Path(w).name or w for w in whole]
    return short if len(set(short)) == len(short) else whole
