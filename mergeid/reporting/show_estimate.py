"""The table of an estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeid.reporting.tables import Column, make_table

if TYPE_CHECKING:
    from rich.console import Console

    from mergeid.results.estimate import Estimate


def print_estimate(found: Estimate, console: Console) -> None:
    """One row per way that a merge can go."""
    columns = [Column("merge"), *(Column(what, align="right") for what in ("memory", "disk", "time"))]
    rows = [(c.way, size(c.memory), size(c.disk), about(c.seconds)) for c in found.costs]
    count = f"{found.parameters / 1e9:.2f} billion" if found.parameters > 1e8 else f"{found.parameters:,}"
    title = f"{count} parameters a model, {size(sum(found.bytes))} to read"
    console.print(make_table(columns, rows, width=console.width, title=title))
    for cost in found.costs:
        console.print(f"{cost.way}: {cost.note}.", markup=False)
    console.print(
        "Time is that of one core with a disk that keeps up, right within a factor of about two. With --data, forward "
        "passes come on top.",
        style="dim",
    )
    if not found.fits:
        console.print(f"The result does not fit: {size(found.free)} are free here.", markup=False)


def size(count: int) -> str:
    """``300 MiB``, ``4.5 GiB``."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{max(1, round(count / 2**20))} MiB"


def about(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
