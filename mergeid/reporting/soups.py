"""What a soup is made of, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeid.reporting.tables import Column, make_table

if TYPE_CHECKING:
    from rich.console import Console

    from mergeid.results.soup import SoupResult


def print_soup(result: SoupResult, console: Console) -> None:
    """How good it is, then what is in it."""
    kept = sum(i.kept for i in result.ingredients)
    of = f"of {kept} of {len(result.ingredients)} models, {result.examples} examples"
    if result.entropy is not None:
        before, after = result.entropy
        console.print(f"Soup ({result.how}) {of}: entropy of its predictions {before:.4f} to {after:.4f} nats.")
    else:
        console.print(f"Soup ({result.how}) {of}: loss {_number(result.loss)}, accuracy {_share(result.accuracy)}.")
    columns = [
        Column("model", shrink=True, min_width=12),
        Column("loss alone", "right"),
        Column("accuracy alone", "right"),
        Column("weight", "right"),
    ]
    rows = [[i.source, _number(i.loss), _share(i.accuracy), f"{i.coefficient:.3f}"] for i in result.ingredients]
    caption = "weight: share of the model in the soup; 0 where it was left out." if result.entropy is None else None
    console.print(make_table(columns, rows, width=console.width, caption=caption))
    for note in result.notes:
        console.print(f"Note: {note}", markup=False)
    for file in result.files:
        console.print(f"wrote {file}", markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
