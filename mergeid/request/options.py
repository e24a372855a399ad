"""The options that verbs have in common, each said once: the Python keyword's type, and how a terminal asks for it.

A verb's signature uses them as annotations (``seed: o.Seed = 0``); its keyword and its default are the command's too
(`mergeid.commands.terminal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from mergeid.request.request import LARGEST_SEED, MATCHES, TARGETS

INPUT, OUTPUT, HOW = "Input", "Output", "How"
"""Panels of a command's help."""


@dataclass(frozen=True)
class Option:
    """How a terminal asks for a keyword.

    Attributes:
        help: what it does.
        panel: where it stands in the help.
        metavar: what its value is called there; empty: a switch.
        flags: its names; none: the keyword, with hyphens.
        kind: what is read: str, int, float, bool, or a list of words.
        choices: the words that are accepted; none: any.
        least, most: bounds of a number.
        shown: whether the help shows the default.
    """

    help: str
    panel: str = HOW
    metavar: str = ""
    flags: tuple[str, ...] = ()
    kind: type = str
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    shown: bool = True
    several: bool = False


def switch(help: str, panel: str = HOW, *flags: str) -> Option:
    """An option that is given or not."""
    return Option(help, panel, flags=flags, kind=bool)


def out(help: str) -> Option:
    """Where the result goes."""
    return Option(help, OUTPUT, "OUT", ("-o", "--output"), Path)


def count(help: str, panel: str, least: int, most: int | None = None) -> Option:
    """A whole number."""
    return Option(help, panel, "N", kind=int, least=least, most=most)


def examples(help: str) -> Option:
    """Examples that models are run on."""
    return Option(help, INPUT, "DATA")


Arch = Annotated[
    Union[str, None],
    Option(
        "Architecture (timm/resnet18, transformers/bert, or the path of a config.json); found by itself where the "
        "files say enough.",
        INPUT,
        "NAME",
    ),
]
Config = Annotated[
    Union[str, None],
    Option(
        "Whose config counts where the models' configs differ in what the network computes: a (the first model), b, …; "
        "such models are refused if not given.",
        INPUT,
        "a|b",
        shown=False,
    ),
]
Tokenizer = Annotated[
    Union[str, None],
    Option(
        "Whose tokens the result has where vocabularies differ: union, a, b, … or base; rows are brought together by "
        "token. Such models are refused if not given.",
        INPUT,
        "union|a|b",
        shown=False,
    ),
]
ChatTemplate = Annotated[
    Union[str, None],
    Option(
        "Chat template of the result: auto (what most models have), a, b, …, chatml, a file, or a template in Jinja; "
        "A's if not given.",
        OUTPUT,
        "TEMPLATE",
        shown=False,
    ),
]
Data = Annotated[
    Any,
    Option(
        "Real examples: image folder, text or jsonl file, .npz or .safetensors with inputs (and labels), Hugging Face "
        "data set, or module:function.",
        INPUT,
        "DATA",
    ),
]
Labelled = Annotated[
    Any,
    Option(
        "Labelled examples to measure on: image folder, text or jsonl file, .npz or .safetensors with inputs and "
        "labels, Hugging Face data set, or module:function.",
        INPUT,
        "DATA",
    ),
]
Base = Annotated[
    Any,
    Option(
        "What A and B were fine-tuned from: what structure identifies by it, and with --data the margins.",
        INPUT,
        "BASE",
        shown=False,
    ),
]
Certify = Annotated[
    bool,
    switch("Also by how much every layer's inputs may shift; needs --data (slow above about a thousand neurons)."),
]
Skip = Annotated[
    Sequence[str],
    Option("Tensors to take from A as they are (may be given several times).", INPUT, "GLOB", several=True),
]
AllowPickle = Annotated[bool, switch("Also read .bin and .pt files.", INPUT)]
Dequantise = Annotated[
    bool, switch("Read float8 and bitsandbytes weights as floating-point ones; the result is not quantised.", INPUT)
]
Limit = Annotated[
    Union[int, None],
    Option("Calibration examples taken from DATA.", INPUT, "N", kind=int, least=1),
]
Force = Annotated[bool, switch("Replace an earlier output.", OUTPUT)]
ShardSize = Annotated[
    Union[str, int, None],
    Option("Most bytes of one weight file of a folder, such as 5GB; files as A has them if not given.", OUTPUT, "SIZE"),
]
Resume = Annotated[
    bool,
    switch(
        "Go on with the merge to OUT that was stopped, if there is one; and keep what is done if this one is stopped.",
        OUTPUT,
    ),
]
AsAdapter = Annotated[
    Union[int, None],
    Option(
        "Write the result as a LoRA adapter of this rank, on --base or on what the adapters lie on, and say what that "
        "costs.",
        OUTPUT,
        "RANK",
        kind=int,
        least=1,
        shown=False,
    ),
]
Push = Annotated[
    Union[str, None],
    Option(
        "Then upload the result to this repository on the Hugging Face hub, with a model card, the plan and a plot.",
        OUTPUT,
        "ORG/NAME",
        shown=False,
    ),
]
Dtype = Annotated[
    Union[str, None],
    Option(
        "Number format of the result: float32, float16, bfloat16 or float64; as in A if not given.", OUTPUT, "DTYPE"
    ),
]
Match = Annotated[
    str,
    Option(
        "auto: as decided for every space; never: take B's neurons as they are; always: match every space.",
        choices=MATCHES,
    ),
]
Target = Annotated[
    Union[str, None],
    Option(
        "What a solved merge imitates where each model has its own data (--data a=…,b=…): own (that model) or mean.",
        choices=TARGETS,
        shown=False,
    ),
]
Matcher = Annotated[
    Union[str, None],
    Option(
        "How neurons are matched: weight, activation, combined, layerwise, cycle, sinkhorn, straight_through, ot; "
        "combined with --data and weight without if not given.",
        HOW,
        "NAME",
    ),
]
Transport = Annotated[
    bool,
    switch(
        "OT fusion: carry neurons onto A's by optimal transport instead of matching them one to one; convolutional "
        "networks and multilayer perceptrons may then have other widths than A."
    ),
]
RefuseAbove = Annotated[
    float,
    Option(
        "With --data: write nothing if even the nearest merge is farther from the models' own predictions than this, "
        "in nats (for outputs other than class scores, as a share of their variance). inf: never refuse.",
        HOW,
        "NATS",
        kind=float,
    ),
]
Seed = Annotated[int, Option("Seed of every draw.", HOW, "N", kind=int, least=0, most=LARGEST_SEED)]
BatchSize = Annotated[int, Option("Examples per forward pass.", HOW, "N", kind=int, least=1)]
Device = Annotated[str, Option("cpu, cuda, cuda:1, mps …", HOW, "DEVICE")]
