"""The options that verbs have in common, each said once: the Python keyword's type, and how a terminal asks for it.

A verb's signature uses them as annotations (``seed: o.Seed = 0``); its keyword and its default are the command's too
(`mergeid.commands.terminal`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from mergeid.request.request import HEADS, MATCHES, TARGETS
from mergeid.request.vocabulary import Vocabulary

INPUT, OUTPUT, HOW = "Input", "Output", "How"
"""Panels of a command's help."""

MATCHERS = ("weight", "activation", "combined", "layerwise", "cycle", "sinkhorn", "straight_through", "ot")
METHODS = (
    *("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
    *("della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ramplus_tl", "model_stock", "tsv"),
    *("iso_c", "iso_cts", "wudi", "emr", "knots_ties", "nearswap", "arcee_fusion", "fisher", "regmean"),
)


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
        words: those that a shell offers, where others may be accepted too.
        least, most: bounds of a number.
        shown: whether the help shows the default.
    """

    help: str
    panel: str = HOW
    metavar: str = ""
    flags: tuple[str, ...] = ()
    kind: type = str
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
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
        "Architecture (timm/resnet18, transformers/bert, or the path of a config.json). Default: detected from the "
        "files.",
        INPUT,
        "NAME",
    ),
]
Config = Annotated[
    Union[str, None],
    Option(
        "Which model's config to use if the configs describe different computations: a (the first model), b, … Without "
        "it, such models are refused.",
        INPUT,
        "a|b",
        shown=False,
    ),
]
Tokenizer = Annotated[
    Union[str, Vocabulary, None],
    Option(
        "Which tokens the result gets if the vocabularies differ: union, a, b, …, base, or those of a tokenizer's "
        "folder. Embedding rows are matched by token. Without it, such models are refused.",
        INPUT,
        "union|a|b",
        shown=False,
    ),
]
ChatTemplate = Annotated[
    Union[str, None],
    Option(
        "Chat template of the result: auto (the commonest), a, b, …, alpaca, chatml, exaone, llama3, mistral, a file, "
        "or a Jinja template. Default: A's.",
        OUTPUT,
        "TEMPLATE",
        shown=False,
    ),
]
Data = Annotated[
    Any,
    Option(
        "Examples of the kind that the models were trained on: image folder, text or jsonl file, .npz or .safetensors "
        "with inputs (and labels), Hugging Face dataset, or module:function.",
        INPUT,
        "DATA",
    ),
]
Labelled = Annotated[
    Any,
    Option(
        "Labelled examples to measure on: image folder, text or jsonl file, .npz or .safetensors with inputs and "
        "labels, Hugging Face dataset, or module:function.",
        INPUT,
        "DATA",
    ),
]
Base = Annotated[
    Any,
    Option(
        "Model that A and B were fine-tuned from; the plan then says which spaces it identifies.",
        INPUT,
        "BASE",
        shown=False,
    ),
]
Certify = Annotated[
    bool,
    switch("Also compute how far every layer's inputs may shift; needs --data (slow above a thousand neurons)."),
]
Skip = Annotated[
    Sequence[str],
    Option("Tensors to take from A as is (repeatable).", INPUT, "GLOB", several=True),
]
Heads = Annotated[
    Union[str, None],
    Option(
        "both: for classifiers with different classes, make one head with A's classes, then B's.",
        HOW,
        choices=HEADS,
        shown=False,
    ),
]
AllowPickle = Annotated[bool, switch("Also read pickled weights: .bin, .pt, .pth and .ckpt files.", INPUT)]
Dequantise = Annotated[
    bool, switch("Read float8 and bitsandbytes weights in floating point; the result is not quantised.", INPUT)
]
Limit = Annotated[
    Union[int, None],
    Option("Number of calibration examples to take from DATA.", INPUT, "N", kind=int, least=1),
]
ImageSize = Annotated[
    Union[int, None],
    Option(
        "Height and width in pixels to which the images of DATA are resized, and at which models made for different "
        "sizes are merged. Default: the model's own.",
        INPUT,
        "PIXELS",
        kind=int,
        least=1,
        shown=False,
    ),
]
Force = Annotated[bool, switch("Overwrite an existing output.", OUTPUT)]
ShardSize = Annotated[
    Union[str, float, None],
    Option("Largest size of one weight file in a folder, such as 5GB. Default: files as in A.", OUTPUT, "SIZE"),
]
Resume = Annotated[
    bool,
    switch(
        "Continue interrupted work on OUT, if there is any, and keep what is done if this is interrupted too.",
        OUTPUT,
    ),
]
AsAdapter = Annotated[
    Union[int, None],
    Option(
        "Write the result as a LoRA adapter of this rank, for --base or the adapters' own base, and say how much of "
        "the "
        "update is lost.",
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
        "Upload the result to this repository on the Hugging Face hub, with a model card, the plan and a plot.",
        OUTPUT,
        "ORG/NAME",
        shown=False,
    ),
]
Dtype = Annotated[
    Union[str, None],
    Option(
        "Dtype of the result: float32, float16, bfloat16 or float64. Default: as in A; if the models differ, one that "
        "holds all their numbers.",
        OUTPUT,
        "DTYPE",
    ),
]
Match = Annotated[
    str,
    Option(
        "auto: match the spaces where it helps; never: take B's neurons as is; always: match every space.",
        choices=MATCHES,
    ),
]
Target = Annotated[
    Union[str, None],
    Option(
        "With separate data for each model (--data a=…,b=…), what a solved merge imitates: own (that model) or mean.",
        choices=TARGETS,
        shown=False,
    ),
]
Matcher = Annotated[
    Union[str, None],
    Option(
        f"How neurons are matched: {', '.join(MATCHERS)}. Default: combined with --data, weight without.",
        HOW,
        "NAME",
        words=MATCHERS,
    ),
]
SavedPlan = Annotated[
    Union[str, os.PathLike[str], None],
    Option(
        "Take this plan, written by mergeid plan --output, instead of deciding again how B's neurons are matched.",
        HOW,
        "FILE",
        shown=False,
    ),
]
Transport = Annotated[
    bool,
    switch(
        "OT fusion: map neurons onto A's by optimal transport instead of matching them one to one. Convolutional "
        "networks "
        "and multilayer perceptrons may then differ from A in width."
    ),
]
RefuseAbove = Annotated[
    float,
    Option(
        "With --data: write nothing if even the best merge is farther than this from the models' own predictions, in "
        "nats (for outputs other than class scores, as a share of their variance). inf: never refuse.",
        HOW,
        "NATS",
        kind=float,
    ),
]
Seed = Annotated[int, Option("Random seed.", HOW, "N", kind=int, least=0)]
BatchSize = Annotated[int, Option("Examples per forward pass.", HOW, "N", kind=int, least=1)]
Device = Annotated[
    Union[str, None], Option("cpu, cuda, cuda:1, mps …; auto: cuda if there is a GPU, else cpu.", HOW, "DEVICE")
]
