"""``mergeid adapters``: the libraries whose models are known."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer

from mergeid.commands import arguments as o
from mergeid.commands.work import working


def command(
    find: Annotated[
        str | None,
        typer.Argument(
            metavar="[GLOB]",
            help="List the architecture names that match this pattern (resnet*, timm/vit_*).",
            show_default=False,
        ),
    ] = None,
    as_json: o.Json = False,
) -> int:
    """List the installed adapters, or the architecture names that --arch accepts."""
    from mergeid.plugins import adapter_names, get_adapter

    with working(as_json) as work:
        names = {name: sorted(get_adapter(name).architectures()) for name in adapter_names()}
        if find is not None:
            ids = [f"{adapter}/{name}" for adapter, all_of in names.items() for name in all_of]
            found = [i for i in ids if fnmatchcase(i, find) or fnmatchcase(i.partition("/")[2], find)]
            if as_json:
                work.emit(found)
            elif found:
                work.say("\n".join(found))
            else:
                near = get_close_matches(find, [i.partition("/")[2] for i in ids], n=3)
                work.note(
                    f"no architecture name matches {find!r}" + f"; did you mean {' or '.join(near)}?" * bool(near)
                )
            return 0 if found else 1
        rows = [_row(name, all_of) for name, all_of in names.items()]
        if as_json:
            work.emit(rows)
        else:
            from mergeid.reporting.tables import Column, show

            columns = [Column("adapter"), Column("package"), Column("version"), Column("architectures", "right")]
            work.close()
            show(columns, [list(row.values()) for row in rows], console=work.console)
            work.say("To list their names: mergeid adapters 'GLOB', for example mergeid adapters 'resnet*'.")
    return 0


def _row(name: str, names: list[str]) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    from mergeid.plugins import get_adapter

    package = type(get_adapter(name)).__module__.partition(".")[0]
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "–"
    return {
        "adapter": name,
        "package": package,
        "version": found,
        "architectures": len(names),
    }
