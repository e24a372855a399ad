"""``mergeid zip``: two models, perhaps of different tasks, with one trunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import working
from mergeid.request.options import HOW
from mergeid.verbs.zip import zip_models

if TYPE_CHECKING:
    from mergeid.results.zip import ZipResult


@command_of(zip_models)
def command(
    call: Call[ZipResult],
    a: o.A,
    b: o.B,
    as_json: o.Json = False,
    no_repair: Annotated[
        bool,
        typer.Option("--no-repair", rich_help_panel=HOW, help="Do not re-estimate BatchNorm statistics."),
    ] = False,
) -> int:
    """Zip two models (ZipIt!): merge similar features, also within each model, up to the heads or to a given layer.

    For convolutional networks and multilayer perceptrons of one architecture; the classes may differ. OUT will contain
    a and b, two models with equal tensors up to where the zip ends. Each loads wherever its input loaded. In Python,
    mergeid.load_zipped(OUT) loads both and shares the common part.
    """
    with working(as_json) as work:
        result = call(a, b, repair=not no_repair, progress=work.progress)
        if as_json:
            work.emit(result.to_json())
            return 0
        zipped = len(result.within)
        inside = sum(result.within.values()) / max(zipped, 1)
        rest = f" of {zipped + len(result.apart)}" if result.apart else ""
        work.say(
            f"Zipped {zipped}{rest} spaces; the common trunk holds {100 * result.share:.1f} % of the parameters, and "
            f"{100 * inside:.0f} % of its features are merged within one model."
        )
        for note in result.notes:
            work.say(f"Note: {note}")
        if result.repaired:
            work.say("BatchNorm statistics were re-estimated on the calibration data.")
        work.wrote(result.files)
    return 0
