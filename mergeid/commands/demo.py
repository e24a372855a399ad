"""``mergeid demo``: the whole line on two small networks that it trains itself."""

from __future__ import annotations

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import working
from mergeid.verbs.demo import DemoResult, run


@command_of(run)
def command(call: Call[DemoResult], as_json: o.Json = False) -> int:
    """Train two small networks on handwritten digits, merge them directly and with mergeid, and compare.

    Nothing is downloaded: the digits come with scikit-learn. A second run reuses the two networks.
    """
    with working(as_json) as work:
        result = call(progress=work.progress)
        if as_json:
            work.emit(result.to_json())
        else:
            work.close()
            result.print(work.console)
    return 0
