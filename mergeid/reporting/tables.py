"""Tables for the terminal that keep to its width: text is shortened in the middle, extra columns step aside.

show([Column("space", shrink=True), Column("size", align="right")], [["layer1.0 conv1", 64]], title="Spaces")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mergeid.results.barrier import BarrierResult
    from mergeid.results.similarity import SimilarityResult

GAP = 2  # blanks between two columns
NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """How one column is shown.

    Attributes:
        header: its title.
        align: "right" for numbers.
        shrink: its text may be shortened in the middle, down to `min_width`.
        min_width: narrowest useful width of a column that shrinks.
        optional: 0 keeps the column always; else columns are left out in a narrow terminal, the highest number (and
            all columns that share it) first.
    """

    header: str
    align: Literal["left", "right", "center"] = "left"
    shrink: bool = False
    min_width: int = 12
    optional: int = 0


class _Described(Table):
    """A table whose title and caption are as wide as the terminal, not as the table."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        about, self.title, self.caption = (self.title, self.caption), None, None
        try:
            if about[0]:
                yield about[0]
            yield from super().__rich_console__(console, options)
            if about[1]:
                yield about[1]
        finally:
            self.title, self.caption = about


def number(value: float | None, digits: int = 3) -> str:
    """A measured number in fixed digits; a dash for None, exponents only where the digits would all be zero."""
    if value is None:
        return NOTHING
    text = f"{value:.{digits}f}"
    if value and not float(text):
        return f"{value:.0e}"
    return f"{value:.1e}" if abs(value) >= 1e6 else text


def percent(value: float | None, digits: int = 1) -> str:
    """A share of 1 in percent."""
    return NOTHING if value is None else f"{100 * value:.{digits}f} %"


def middle(text: str, width: int) -> str:
    """The text in at most `width` cells, its middle replaced by … (names differ at both ends)."""
    if cell_len(text) <= width:
        return text
    if width < 3:
        return set_cell_size(text, width)
    tail = (width - 1) // 2
    end = text
    while cell_len(end) > tail:
        end = end[1:]
    return set_cell_size(text, width - 1 - cell_len(end)).rstrip() + "…" + end


def make_table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[Any]],
    *,
    width: int,
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """A Rich table that fits into `width` cells.

    Args:
        columns: what to show.
        rows: one sequence per row. A cell is a string, a number (integers get thousands separators, floats three
            digits), None (a dash) or a `rich.text.Text` for styled text; never read as Rich markup.
        width: of the terminal.
        title: above the table.
        caption: below it; columns that were left out are named there.

    Raises:
        ValueError: a row with another number of cells than columns.
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns: {[str(c) for c in row]}")
    natural = [
        max([cell_len(column.header), *(cell_len(row[i].plain) for row in cells)]) for i, column in enumerate(columns)
    ]
    shown, widths = _fit(columns, natural, width)
    hidden = [column.header for i, column in enumerate(columns) if i not in shown and column.header]
    notes = [f"not shown at this width: {', '.join(hidden)}"] if hidden else []
    notes += [caption] if caption else []
    table = _Described(
        title=Text(title, style="bold") if title else None,
        caption=Text("\n".join(notes), style="dim") if notes else None,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
    )
    for i in shown:
        column = columns[i]
        head = Text(middle(column.header, widths[i]))
        table.add_column(head, justify=column.align, no_wrap=True, min_width=widths[i], max_width=widths[i])
    for row in cells:
        table.add_row(*(_cut(row[i], widths[i]) for i in shown))
    return table


def show(
    columns: Sequence[Column],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    caption: str | None = None,
    console: Console | None = None,
) -> None:
    """Prints `make_table` at the console's width."""
    console = console or Console()
    console.print(make_table(columns, rows, width=console.width, title=title, caption=caption))


def barrier_points(results: Sequence[BarrierResult], *, width: int, title: str | None = None) -> Table:
    """Loss and accuracy at every λ, one group of columns per curve. The curves must share their λ grid.

    Raises:
        ValueError: curves on different grids.
    """
    first = results[0]
    if any(result.lambdas != first.lambdas for result in results):
        raise ValueError("curves on different λ grids do not fit into one table")
    columns = [Column("λ", "right")]
    for result in results:
        prefix = f"{result.label} " if result.label and len(results) > 1 else ""
        columns.append(Column(f"{prefix}loss", "right"))
        if len(results) == 1:
            columns.append(Column("above chord", "right"))
        if result.accuracies is not None:
            columns.append(Column(f"{prefix}accuracy", "right", optional=1))
    if len(results) == 1:
        columns.append(Column("", optional=9))
    caption = "λ: share of B. above chord: the loss above the straight line between both ends, in nats."
    rows = []
    for i, x in enumerate(first.lambdas):
        row: list[Any] = [f"{x:g}"]
        for result in results:
            row.append(number(result.losses[i]))
            if len(results) == 1:
                row.append(number(result.excess[i]))
            if result.accuracies is not None:
                row.append(percent(result.accuracies[i]))
        if len(results) == 1:
            row.append(Text(_bar(first.excess[i], first.barrier), style="red"))
        rows.append(row)
    return make_table(columns, rows, width=width, title=title, caption=caption)


def barrier_summary(results: Sequence[BarrierResult], *, width: int, title: str | None = None) -> Table:
    """One row per curve: the losses at the ends, the barrier, where it is, and the accuracy lost."""
    columns = [
        Column("", shrink=True),
        Column("BatchNorm", optional=1),
        Column("loss a", "right", optional=3),
        Column("loss b", "right", optional=3),
        Column("barrier", "right"),
        Column("at λ", "right", optional=2),
        Column("accuracy lost", "right"),
    ]
    rows = [
        [
            result.label or "a to b",
            "re-estimated" if result.repair else "averaged",
            number(result.losses[0]),
            number(result.losses[-1]),
            Text(number(result.barrier), style="bold"),
            NOTHING if result.barrier_lambda is None else f"{result.barrier_lambda:g}",
            NOTHING if result.barrier_accuracy is None else f"{result.barrier_accuracy:.1f} points",
        ]
        for result in results
    ]
    return make_table(columns, rows, width=width, title=title, caption=_what(results))


def _what(results: Sequence[BarrierResult]) -> str:
    return f"barrier: the loss above chord at its highest, in nats; {results[0].count:,} predictions"


def _bar(value: float, largest: float, cells: int = 20) -> str:
    full = value / largest * cells if 0 < value < float("inf") and largest < float("inf") else 0
    eighths = round(full * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _fit(columns: Sequence[Column], natural: Sequence[int], width: int) -> tuple[list[int], dict[int, int]]:
    """Columns to show and the width of each."""
    shown = list(range(len(columns)))
    while True:
        widths, fits = _shrunk(columns, natural, shown, width, comfort=2)
        droppable = max(columns[i].optional for i in shown)
        if fits or not droppable:
            break
        shown = [i for i in shown if columns[i].optional != droppable]
    for comfort in (1, 0.25):
        if not fits:
            widths, fits = _shrunk(columns, natural, shown, width, comfort)
    return shown, widths


def _shrunk(
    columns: Sequence[Column], natural: Sequence[int], shown: Sequence[int], width: int, comfort: float
) -> tuple[dict[int, int], bool]:
    """Widths with the widest columns shortened first, down to `comfort` minimal widths; and whether that is enough."""
    widths = {i: natural[i] for i in shown}
    room = width - GAP * (len(shown) - 1)
    while sum(widths.values()) > room:
        able = [i for i in shown if columns[i].shrink and widths[i] > comfort * columns[i].min_width]
        if not able:
            return widths, False
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths, True


def _text(cell: Any) -> Text:
    if isinstance(cell, Text):
        return cell
    if cell is None:
        return Text(NOTHING)
    if isinstance(cell, bool):
        return Text("yes" if cell else "no")
    if isinstance(cell, int):
        return Text(f"{cell:,}")
    return Text(number(cell) if isinstance(cell, float) else str(cell))


def _cut(text: Text, width: int) -> Text:
    return text if cell_len(text.plain) <= width else Text(middle(text.plain, width), style=text.style)


def similarity_table(result: SimilarityResult, *, width: int) -> Table:
    """One row per layer that both models have."""
    columns = [
        Column("layer", shrink=True, min_width=16),
        Column("neurons", "right", optional=2),
        Column("CKA", "right"),
        Column("unbiased", "right"),
        Column("SVCCA", "right"),
        Column("PWCCA", "right"),
        Column("rows", "right", optional=1),
    ]
    rows: list[Sequence[Any]] = []
    for layer in result.layers:
        a, b = layer.neurons
        indices = (layer.cka, layer.cka_unbiased, layer.svcca, layer.pwcca)
        neurons = f"{a:,}" if a == b else f"{a:,} / {b:,}"
        rows.append([layer.layer, neurons, *(f"{v + 0.0:.3f}" for v in indices), layer.rows])
    title = f"{len(rows)} layers of {result.a} and {result.b} on {result.examples:,} examples"
    caption = "1: the same features; 0: unrelated ones. Only the unbiased CKA can be compared between layers."
    return make_table(columns, rows, width=width, title=title, caption=caption)
