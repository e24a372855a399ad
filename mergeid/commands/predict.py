"""``mergeid predict``: how much a merge would lose, said before it is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of, merge_after
from mergeid.commands.work import Work, check_outputs, to_text, working, write_report
from mergeid.errors import MergeidError
from mergeid.io.publish import write_whole
from mergeid.verbs.predict import predict

if TYPE_CHECKING:
    from mergeid.results.prediction import PredictionMatrix, PredictResult

LEAST_SCALE = 0.1
"""Nats that the scale of a drawn matrix reaches at least: losses next to nothing must not look like large ones."""


@command_of(predict)
def command(
    call: Call[PredictResult],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B", help=f"Two models ({o.MODEL}), or two or more files of mergeid sketch.", show_default=False
        ),
    ],
    output: o.JsonFile = None,
    plot: Annotated[Path | None, o.drawn("For sketches: draw the matrix")] = None,
    page: o.Page = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Predict the barrier between A and B, as is and matched, without merging them.

    Both models run on the inputs of --data (no labels are needed), or on random inputs without it. Given files made by
    mergeid sketch, it predicts every pair without running a model.
    """
    sketched = [m.endswith(".sketch") for m in models]
    if any(sketched) != all(sketched):
        raise MergeidError("some of the inputs are sketches and some are models; expected only sketches or only models")
    if not all(sketched) and len(models) != 2:
        raise MergeidError(f"predict takes two models, got {len(models)}; to compare more, make sketches of them")
    if all(sketched) and (call.given("data") or call.given("base") or call.given("trial")):
        raise MergeidError(
            "sketches already hold what was measured on their inputs; leave out --data, --base and --try"
        )
    if plot is not None and not all(sketched):
        raise MergeidError("--plot draws the matrix of sketches; expected files made by mergeid sketch")
    if page is not None and all(sketched):
        raise MergeidError("--report is about one pair of models; sketches have a matrix (--plot)")
    check_outputs((*models, *call.reads), force, output=output, plot=plot, report=page)
    with working(as_json) as work:
        if all(sketched):
            return _matrix(work, models, call.number("tolerate"), output, plot)
        result = call(*models, progress=work.progress)
        written(work, result, output)
        if page is not None:
            write_report(page, result, models)
        if not work.as_json:
            _shown(work, result)
            work.wrote([p for p in (output, page) if p is not None])
            if following := _next(result, call, *models):
                work.say(following)
    return 0


def written(work: Work, result: Any, output: Path | None) -> None:
    """As JSON, in a file and on stdout, where that was asked for."""
    if output is not None:
        write_whole(output, to_text(result.to_json()) + "\n", "-o")
    if work.as_json:
        work.emit(result.to_json())


def _shown(work: Work, result: PredictResult) -> None:
    from mergeid.reporting.predictions import interference_table, prediction_table, trials_table

    work.close()
    work.console.print(prediction_table(result, width=work.console.width))
    if result.trials:
        work.console.print(trials_table(result, width=work.console.width))
    if result.interference:
        work.console.print(interference_table(result, width=work.console.width))
    work.say("")
    work.say(result.advice)
    if result.said_of_worth:
        work.say(result.said_of_worth)
    if result.bound is not None and result.bound.layers:
        work.say(f"Note: {result.bound.statement}.")
    for note in result.notes:
        work.say(f"Note: {note}.")


def _next(result: PredictResult, call: Call[PredictResult], a: str, b: str) -> str | None:
    """What to run after this prediction: the merge where it is sure or was tried, else what says more; None where the
    trials could not tell."""
    if not result.trials and (way := result.sure) is not None:
        return f"Next: {merge_after(call, a, b, way.options)}"
    if result.mode == "weights":
        return f"Next, to run the models on examples of their kind: {call.next(predict, a, b)} --data DATA"
    if not result.trials:
        return f"Next, to make the merges in memory and measure them: {call.next(predict, a, b, also=('--try',))}"
    best = result.best_trial
    if best is None or best.says_nothing:
        return None
    how = best.options if best.lost <= result.tolerated else ()
    return f"Next: {merge_after(call, a, b, how)}"


def _matrix(work: Work, models: list[str], tolerate: float, output: Path | None, plot: Path | None) -> int:
    from mergeid.verbs.sketch import predict_sketches

    matrix = predict_sketches(models, tolerate=tolerate, progress=work.progress)
    written(work, matrix, output)
    matrix_shown(work, matrix, plot)
    if not work.as_json:
        if len(matrix.names) == 2:
            _shown(work, next(iter(matrix.pairs.values())))
        work.wrote([p for p in (output, plot) if p is not None])
    return 0


def matrix_shown(work: Work, matrix: PredictionMatrix, plot: Path | None) -> None:
    """The matrix in the terminal, and drawn where that was asked for."""
    if plot is not None:
        import numpy as np

        from mergeid.reporting.plots import plot_heat_map

        values = np.array(matrix.expected(), dtype=float)
        np.fill_diagonal(values, np.nan)  # no pair
        largest = float(values[np.isfinite(values)].max(initial=LEAST_SCALE))
        plot_heat_map(matrix.names, matrix.names, values, plot, label="expected barrier in nats", largest=largest)
    if not work.as_json:
        from mergeid.reporting.predictions import matrix_table

        work.close()
        work.console.print(matrix_table(matrix, width=work.console.width))
