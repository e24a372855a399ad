"""The arguments and options that several commands share, each described once."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

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
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, rich_help_panel=HOW, help="Seed of every draw.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, rich_help_panel=HOW, help="Examples per forward pass.")
]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", rich_help_panel=HOW, help="cpu, cuda, cuda:1, mps …")
]
NoRepair = Annotated[
    bool,
    typer.Option("--no-repair", rich_help_panel=HOW, help="Leave BatchNorm statistics averaged: do not re-estimate."),
]
