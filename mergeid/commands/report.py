"""``mergeid report``: one HTML page about a pair."""

from __future__ import annotations

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
) -> int:
    """Write everything about a pair to one HTML page: verdict, curves, network, prediction, commands to reproduce it.

    The page works offline and on a phone, and shows measured values only. No weights are written.
    """
    check_outputs((a, b, *call.reads), output=output)
    with working() as work:
        found = call(a, b, output=output, progress=work.progress)
        from mergeid.reporting.page.verdict import sentence

        work.say(sentence(found)[1])
        work.wrote([output])
        if found.next_command:
            work.say(f"Next: {found.next_command}")
    return 0
