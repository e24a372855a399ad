"""``mergeid report``: one HTML page about a pair."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import check_outputs, working
from mergeid.request.options import OUTPUT
from mergeid.verbs.report import report

if TYPE_CHECKING:
    from mergeid.reporting.page import Report


@command_of(report)
def command(
    call: Call[Report],
    a: o.A,
    b: o.B,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", rich_help_panel=OUTPUT, help="The HTML file to write."),
    ] = Path("report.html"),
    as_json: o.Json = False,
) -> int:
    """Write everything about a pair to one HTML page: verdict, curves, network, prediction, commands to reproduce it.

    The page works offline and on a phone, and shows measured values only. No weights are written.
    """
    check_outputs((a, b, *call.reads), call.given("force"), output=output)
    with working(as_json) as work:
        found = call(a, b, output=output, progress=work.progress)
        from mergeid.reporting.page.verdict import ends, merges, sentence

        verdict, said = sentence(found)
        if as_json:
            figures = [asdict(figure) for figure in (*ends(found), *merges(found))]
            told = {"verdict": verdict, "sentence": said, "figures": figures, "next": found.next_command}
            work.emit({**told, "file": str(output)})
            return 0
        work.say(said)
        work.wrote([output])
        if found.next_command:
            work.say(f"Next: {found.next_command}")
    return 0
