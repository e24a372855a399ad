"""What several commands ask for in the terminal's own way: models by name, JSON, weights and settings as text."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mergeid.request.options import HOW, OUTPUT

MODEL = ".safetensors file, model folder, or hub id (org/name, org/name@revision)"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Endings of files of weights."""


class Repair(str, Enum):
    """What ``--repair`` accepts."""

    auto = "auto"
    bn = "bn"
    repair = "repair"
    regmean = "regmean"
    solve = "solve"
    lean = "solve+lean"
    polish = "solve+polish"
    none = "none"


def parse_weights(text: str) -> tuple[float, ...]:
    """``"0.3,0.7"`` as numbers.

    Raises:
        MergeidError: something that is not a list of numbers."""
    from mergeid.errors import MergeidError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise MergeidError(
            f"--weights {text!r} is not a list of numbers; expected one weight per model, such as --weights 0.5,0.5"
        ) from None


def parse_all_weights(given: Sequence[str]) -> tuple[float, ...] | dict[str, tuple[float, ...]] | None:
    """``["layers.0.*=0.2,0.8", "0.5,0.5"]`` as a table from glob to weights; one list alone as numbers; None: nothing
    was given. Weights without a glob are for all tensors that no glob matches.

    Raises:
        MergeidError: no numbers, or two lists for one glob."""
    from mergeid.errors import MergeidError

    found: dict[str, tuple[float, ...]] = {}
    for text in given:
        pattern, _, numbers = text.rpartition("=")
        if (pattern or "*") in found:
            raise MergeidError(f"--weights is given twice for {pattern or 'all tensors'!r}; expected it once")
        found[pattern or "*"] = parse_weights(numbers)
    if list(found) == ["*"]:
        return found["*"]
    everywhere = found.pop("*", None)  # the first that matches counts, so this one comes last
    return {**found, **({"*": everywhere} if everywhere is not None else {})} or None


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """``["lambda=0.8", "density=0.5,0.3", "rescale_norm=l1"]`` as values; several are one per model.

    Raises:
        MergeidError: something else."""
    from mergeid.errors import MergeidError

    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            values = [_value(part) for part in value.split(",")]
        except ValueError:
            values = []
        if not name or not equals or not values or name in found:
            raise MergeidError(
                f"--set {text!r} is not NAME=VALUE; expected a number or a word (true, false, …) as value, and each "
                f"name once"
            )
        found[name] = values if len(values) > 1 else values[0]
    return found


def _value(text: str) -> bool | int | float | str:
    word = text.strip().lower()
    if word in ("true", "false"):
        return word == "true"
    try:
        return int(word) if word.lstrip("+-").isdigit() else float(word)
    except ValueError:
        if word.isidentifier():
            return word
        raise


def written(help: str, metavar: str = "FILE") -> Any:
    """``-o``: where something is written."""
    return typer.Option("-o", "--output", metavar=metavar, rich_help_panel=OUTPUT, help=help, show_default=False)


def drawn(help: str) -> Any:
    """``--plot``: what is drawn, into which file."""
    return typer.Option("--plot", metavar="FILE", rich_help_panel=OUTPUT, help=f"{help}: .png or .svg.")


def how(flag: str, metavar: str, help: str) -> Any:
    """How it is done, as text that is read later."""
    return typer.Option(flag, metavar=metavar, rich_help_panel=HOW, help=help)


def several(metavar: str, help: str) -> Any:
    """Models, one or more."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def model(what: str = "") -> Any:
    """The one model that a command is about; `what`: which it is."""
    return typer.Argument(metavar="MODEL", help=f"{what}{MODEL}.", show_default=False)


A = Annotated[str, typer.Argument(metavar="A", help=f"First model: {MODEL}.", show_default=False)]
B = Annotated[str, typer.Argument(metavar="B", help="Second model, in the same form.", show_default=False)]

Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUTPUT, help="Print only the result on stdout, as JSON."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", rich_help_panel=OUTPUT, help="Show all columns of the table and explain them.")
]
Page = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", rich_help_panel=OUTPUT, help="Also write the result as an HTML page."),
]
JsonFile = Annotated[Path | None, written("Also write the result as a JSON file.")]
Force = Annotated[
    bool, typer.Option("--force", rich_help_panel=OUTPUT, help="Overwrite an existing output.", show_default=False)
]
