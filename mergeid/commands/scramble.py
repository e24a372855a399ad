"""``mergeid scramble``: the same function, its neurons in a random order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import working
from mergeid.verbs.scramble import scramble

if TYPE_CHECKING:
    from mergeid.results.merge import ScrambleResult


@command_of(scramble)
def command(
    call: Call[ScrambleResult],
    a: Annotated[str, typer.Argument(metavar="A", help=f"Model to scramble: {o.MODEL}.", show_default=False)],
    as_json: o.Json = False,
) -> int:
    """Write a copy of A with its neurons in a random order, which computes the same function.

    Use it to check mergeid: merged with A, the copy must give A again.
    """
    with working(as_json) as work:
        result = call(a, progress=work.progress)
        if as_json:
            work.emit(result.to_json())
            return 0
        work.close()
        work.say(
            f"{result.arch}: {100 * result.moved_share:.1f} % of the parameters are in permuted tensors; "
            f"outputs equal to a relative error of {result.max_relative_error:.1e} (seed {result.seed})."
        )
        work.wrote(result.files)
    return 0
