"""The arguments and options that several commands share, each described once."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any

import typer

INPUT, OUTPUT, HOW = "Input", "Output", "How"

MODEL = ".safetensors file, model folder, or hub id (org/name, org/name@revision)"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Endings of files of weights."""


class Match(str, Enum):
    """What ``--match`` accepts."""

    auto = "auto"
    never = "never"
    always = "always"


class Repair(str, Enum):
    """What ``--repair`` accepts."""

    auto = "auto"
    bn = "bn"
    repair = "repair"
    solve = "solve"
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
            f"--weights {text!r} is no list of numbers; expected one weight per model, such as --weights 0.5,0.5"
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
            raise MergeidError(f"--weights are given twice for {pattern or 'all tensors'!r}; expected them once")
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
                f"--set {text!r} is not understood; expected NAME=NUMBER (or a word: true, false, …), each name once"
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


A = Annotated[str, typer.Argument(metavar="A", help=f"First model: {MODEL}.", show_default=False)]
B = Annotated[str, typer.Argument(metavar="B", help="Second model, likewise.", show_default=False)]

Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="NAME",
        rich_help_panel=INPUT,
        help="Architecture (timm/resnet18, transformers/bert, or the path of a config.json); "
        "found by itself where the files say enough.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="a|b",
        rich_help_panel=INPUT,
        show_default=False,
        help="Whose config counts where the models' configs differ in what the network computes: a (the first model), "
        "b, …; such models are refused if not given.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        rich_help_panel=INPUT,
        help="Real examples: image folder, text or jsonl file, .npz or .safetensors with inputs (and labels), "
        "Hugging Face data set, or module:function.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        rich_help_panel=INPUT,
        show_default=False,
        help="What A and B were fine-tuned from: what structure identifies by it, and with --data the margins.",
    ),
]
Certify = Annotated[
    bool,
    typer.Option(
        "--certify",
        rich_help_panel=HOW,
        help="Also by how much every layer's inputs may shift; needs --data (slow above about a thousand neurons).",
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="GLOB",
        rich_help_panel=INPUT,
        help="Tensors to take from A as they are (may be given several times).",
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", rich_help_panel=INPUT, help="Also read .bin and .pt files."),
]
Limit = Annotated[
    int,
    typer.Option("--limit", metavar="N", min=1, rich_help_panel=INPUT, help="Calibration examples taken from DATA."),
]
Force = Annotated[
    bool,
    typer.Option("--force", rich_help_panel=OUTPUT, help="Replace an earlier output."),
]
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUTPUT, help="Print the result as JSON on stdout, and nothing else there."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        rich_help_panel=OUTPUT,
        help="Number format of the result: float32, float16, bfloat16 or float64; as in A if not given.",
    ),
]
MatchOption = Annotated[
    Match,
    typer.Option(
        "--match",
        rich_help_panel=HOW,
        help="auto: as decided for every space; never: take B's neurons as they lie; always: match every space.",
    ),
]
Matcher = Annotated[
    str | None,
    typer.Option(
        "--matcher",
        metavar="NAME",
        rich_help_panel=HOW,
        help="How neurons are matched: weight, activation, combined, layerwise, cycle, sinkhorn, straight_through, ot; "
        "combined with --data and weight without if not given.",
    ),
]
Transport = Annotated[
    bool,
    typer.Option(
        "--transport",
        rich_help_panel=HOW,
        help="OT fusion: carry neurons onto A's by optimal transport instead of matching them one to one; "
        "convolutional networks and multilayer perceptrons may then have other widths than A.",
    ),
]
RefuseAbove = Annotated[
    float,
    typer.Option(
        "--refuse-above",
        metavar="NATS",
        rich_help_panel=HOW,
        help="With --data: write nothing where even the nearest merge is farther from the models than that: nats of "
        "excess over the models' own predictions (outputs that are no classes: share of their variance); inf: never.",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, rich_help_panel=HOW, help="Seed of every draw.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, rich_help_panel=HOW, help="Examples per forward pass.")
]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", rich_help_panel=HOW, help="cpu, cuda, cuda:1, mps …")
]
