"""``mergeid rank``: which of these models should be merged?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.predict import matrix_shown, written
from mergeid.commands.terminal import Call, command_of, merge_after
from mergeid.commands.work import check_outputs, working
from mergeid.request.options import OUTPUT
from mergeid.verbs.rank import rank

if TYPE_CHECKING:
    from mergeid.results.prediction import PredictionMatrix
    from mergeid.results.ranking import Ranking


@command_of(rank)
def command(
    call: Call[Ranking | PredictionMatrix],
    models: Annotated[
        list[str],
        o.several("MODEL CANDIDATE ...", f"The model, then its candidates ({o.MODEL}), or a folder of several."),
    ],
    output: o.JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", rich_help_panel=OUTPUT, help="With --every: draw the matrix: .png or .svg."
        ),
    ] = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Predict which of several models merges best with the first one, without merging them.

    The models run on the inputs of --data (no labels are needed), or on random inputs without it. With --every, each
    pair is predicted.
    """
    from mergeid.errors import MergeidError
    from mergeid.results.prediction import PredictionMatrix

    if plot is not None and not call.given("every"):
        raise MergeidError("--plot draws the matrix of every pair; add --every")
    check_outputs((*models, *call.reads), force, output=output, plot=plot)
    with working(as_json) as work:
        result = call(models, progress=work.progress)
        written(work, result, output)
        if isinstance(result, PredictionMatrix):
            matrix_shown(work, result, plot)
        elif not work.as_json:
            from mergeid.reporting.predictions import ranking_table

            work.close()
            work.console.print(ranking_table(result, width=work.console.width))
            work.say("")
            work.say(result.advice)
            for name, why in result.failed:
                work.say(f"Left out: {name}: {why}.")
        if not work.as_json:
            work.wrote([p for p in (output, plot) if p is not None])
            if not isinstance(result, PredictionMatrix) and (following := _next(result, call, models)):
                work.say(following)
    return 0


def _next(ranking: Ranking, call: Call[Ranking | PredictionMatrix], models: Sequence[str]) -> str | None:
    """The merge with the best partner; where nothing is gained by it, a closer look; None where no partner can be
    judged, or where no closer look would tell more."""
    best = ranking.best
    if best.same or not best.told:
        return None
    if not ranking.gains_nothing:
        return f"Next: {merge_after(call, best.result.a, best.result.b, best.options)}"
    if best.tried is not None:
        return None
    if not call.given("data"):
        return f"Next, to run the models on examples of their kind: {call.next(rank, *models)} --data DATA"
    return f"Next, to make the merges in memory and measure them: {call.next(rank, *models, also=('--try',))}"
