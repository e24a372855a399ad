"""``mergeid sketch``: run a model once, and keep what comparing it with others needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import working
from mergeid.verbs.sketch import sketch

if TYPE_CHECKING:
    from mergeid.prediction.sketch import Sketch


@command_of(sketch)
def command(
    call: Call[Sketch],
    model: Annotated[str, o.model()],
    output: Annotated[Path, o.written("NAME.sketch.")],
    as_json: o.Json = False,
) -> int:
    """Record what a model does on some inputs, so that `mergeid predict *.sketch` need not run it again."""
    with working(as_json) as work:
        made = call(model, output=output, progress=work.progress)
        if as_json:
            rows = {s: list(v.shape) for s, v in made.activations.items()}
            work.emit({"output": output, "arch": made.arch, "inputs": made.inputs, "activations": rows})
        else:
            work.wrote([output])
    return 0
