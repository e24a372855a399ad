"""The options that verbs over several models take besides their own: how models are read, and how the work is done.

A verb takes them as ``**usual: Unpack[Usual]``, which type checkers and editors read; `mergeid.request.boundary.verb`
writes them out in its signature, from where `help` and the terminal have them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypedDict, Union

from mergeid.request import options as o
from mergeid.request.request import LIMIT, Calibration, Example, OwnData, Progress, Reading, Run
from mergeid.request.vocabulary import Vocabulary


class Usual(TypedDict, total=False):
    """Keyword -> value, with the defaults of `DEFAULTS`.

    Attributes:
        arch: the models' architecture, where the files do not say.
        config: "a", "b", …: whose config counts where they differ in what the network computes; None: that is refused.
        skip: globs of tensor names that are taken from the first model as is.
        allow_pickle: whether pickled weights may be read.
        dequantise: whether float8 and bitsandbytes weights are read as floating-point ones.
        example_inputs: of live modules: a tensor, tuple or dict of keywords.
        outputs: names or globs of those outputs of live modules that count (``"logits"``, ``"0"``); none: all.
        limit: most calibration examples; None: all.
        image_size: height and width in pixels that the images of the data are brought to; None: the model's own.
        seed: random seed.
        device: where networks run.
        progress: is told (what is being done, steps done, steps in all).
    """

    arch: o.Arch
    config: o.Config
    skip: o.Skip
    allow_pickle: o.AllowPickle
    dequantise: o.Dequantise
    example_inputs: Any
    outputs: Sequence[str]
    limit: o.Limit
    image_size: o.ImageSize
    seed: o.Seed
    device: o.Device
    progress: Union[Progress, None]


DEFAULTS: Usual = {
    "arch": None,
    "config": None,
    "skip": (),
    "allow_pickle": False,
    "dequantise": False,
    "example_inputs": None,
    "outputs": (),
    "limit": LIMIT,
    "image_size": None,
    "seed": 0,
    "device": "cpu",
    "progress": None,
}


def parameters() -> list[inspect.Parameter]:
    """As a signature has them, annotations as they are written here."""
    keyword, default = inspect.Parameter.KEYWORD_ONLY, dict(DEFAULTS)
    written = {name: getattr(hint, "__forward_arg__", hint) for name, hint in Usual.__annotations__.items()}
    return [inspect.Parameter(n, keyword, default=default[n], annotation=hint) for n, hint in written.items()]


def requests_of(
    given: Usual,
    batch_size: int,
    tokenizer: str | Vocabulary | None = None,
    chat_template: str | None = None,
    heads: str | None = None,
) -> tuple[Run, Reading]:
    """What was asked for. Raises `MergeidError` as `Run` does."""
    told: Usual = {**DEFAULTS, **given}
    run = Run.of(told["progress"], device=told["device"], seed=told["seed"], batch_size=batch_size)
    example = Example.of(told["example_inputs"], told["outputs"])
    skip, pickle = tuple(told["skip"]), told["allow_pickle"]
    words = Vocabulary.of(tokenizer)
    dequantise, size = told["dequantise"], told["image_size"]
    arch, config = told["arch"], told["config"]
    return run, Reading(arch, config, skip, pickle, example, words, chat_template, dequantise, size, heads)


def calibration_of(data: Any, given: Usual) -> Calibration:
    """The examples that were asked for. Raises `MergeidError` for a limit that counts nothing."""
    return Calibration(OwnData.of(data), given.get("limit", LIMIT))
