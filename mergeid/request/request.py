"""What a user asks for, as values that are checked once and then travel whole."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeid.basics.precision import full_precision
from mergeid.errors import MergeidError, shown
from mergeid.request.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)"""

LIMIT = 512
"""Calibration examples that are used unless told otherwise."""
LARGEST_SEED = 2**63 - 1
MATCHES = ("auto", "never", "always")
TARGETS = ("own", "mean")
BOTH = "both"
HEADS = (BOTH,)
REPAIRS = ("auto", "bn", "repair", "regmean", "solve", "solve+lean", "solve+polish", "none")
REFUSE_ABOVE = 0.5
"""Distance from the models beyond which a merge is not written: half a nat, or half of an output's variance."""


def _silent(what: str, done: int, total: int) -> None:
    """Nobody is told."""


def _device_here(name: str) -> str:
    """The device that `name` means on this machine; raises `MergeidError` where there is no such device."""
    import torch

    there = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    there["mps"] = int(torch.backends.mps.is_available())
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"  # mps has no float64
    kind, _, index = name.partition(":")
    try:
        torch.device(name)
        if kind not in ("cpu", *there):
            torch.zeros((), device=name)
    except (RuntimeError, NotImplementedError, AssertionError):
        raise MergeidError(
            f"device {name!r} cannot be used here; expected auto, cpu, cuda, cuda:1 (the second GPU) or mps (--device)"
        ) from None
    if kind in there and int(index if index.isdecimal() else 0) >= there[kind]:
        raise MergeidError(f"device {name!r} cannot be used here: there is none; use --device auto or --device cpu")
    return name


@dataclass(frozen=True)
class Run:
    """How the work is done; nothing of it changes a result but the seed.

    Attributes:
        device: where networks run; "auto": a GPU of CUDA if there is one, else the CPU; None: where Accelerate chooses.
        seed: of every draw.
        batch_size: examples in a forward pass.
        tell: is told how far long work is.

    Raises `MergeidError` for a seed, batch size or device that makes no sense.
    """

    device: str | None = "cpu"
    seed: int = 0
    batch_size: int = 32
    tell: Progress = _silent

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if str(self.device or "").partition(":")[0] == "meta":
            raise MergeidError("device 'meta' has no values; expected cpu, cuda, cuda:1, mps, … (option --device)")
        if self.device not in (None, "cpu"):
            object.__setattr__(self, "device", _device_here(self.device))
        if self.device != "cpu":
            full_precision()
        check_count("batch_size", self.batch_size)

    @classmethod
    def of(cls, progress: Progress | None, *, device: str | None = "cpu", seed: int = 0, batch_size: int = 32) -> Run:
        """`progress`: None tells nobody."""
        return cls(device, seed, batch_size, progress or _silent)

    @property
    def place(self) -> str:
        """The device by name, for work that Accelerate has no part in."""
        return self.device or "cpu"

    def generator(self) -> torch.Generator:
        """A fresh generator of this seed."""
        import torch

        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Example:
    """Attributes:
    inputs: of a live module: a tensor, tuple or dict of keywords; None: those that its library's adapter makes.
    outputs: names or globs of those outputs that count; none: all of them.
    """

    inputs: Any = None
    outputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Any, outputs: Sequence[str] = ()) -> Example:
        """Example inputs as a caller gives them, with the outputs that are named beside them."""
        if isinstance(given, Iterator):
            raise MergeidError("example_inputs is an iterator; expected a tensor, a tuple of inputs or a dict of them")
        return given if isinstance(given, cls) and not outputs else cls(given, tuple(outputs))


def config_file(arch: str | None) -> str | None:
    """What ``--arch`` gives, if it is a file."""
    return arch if arch is not None and arch.endswith(".json") else None


@dataclass(frozen=True)
class Reading:
    """How models are read.

    Attributes:
        arch: their architecture, where the files do not say.
        config: "a", "b", …: whose config counts where they differ in what the network computes; None: that is refused.
        skip: globs of tensor names that are taken from the first model as they are.
        allow_pickle: whether pickled weights may be read.
        example: of live modules.
        tokenizer: whose tokens the embeddings have; None: all have the same.
        chat_template: what the result's tokenizer gets (`mergeid.models.chat_templates.with_chat_template`); None: the
            first model's.
        dequantise: whether quantised weights are read as floating-point ones.
        image_size: height and width that the images of the data are brought to; None: the model's own.
        heads: "both": classifiers get one head with the classes of all; None: their heads are merged.

    Raises `MergeidError` for an empty name, a size that is no whole number, and for an unknown choice of heads.
    """

    arch: str | None = None
    config: str | None = None
    skip: tuple[str, ...] = ()
    allow_pickle: bool = False
    example: Example = field(default_factory=Example)
    tokenizer: Vocabulary | None = None
    chat_template: str | None = None
    dequantise: bool = False
    image_size: int | None = None
    heads: str | None = None

    def __post_init__(self) -> None:
        if self.arch is not None and not self.arch.strip():
            raise MergeidError("--arch is empty; expected a name such as timm/resnet18, or leave it out")
        if self.heads not in (None, *HEADS):
            raise MergeidError(f"--heads {shown(self.heads)} is not one of {', '.join(HEADS)}")
        if self.image_size is not None:
            check_count("image_size", self.image_size)

    @property
    def config_file(self) -> str | None:
        """The file that the architecture is read off; None where it is a name."""
        return config_file(self.arch)


@dataclass(frozen=True)
class OwnData:
    """Examples of every model's own.

    Attributes:
        data: one for each model, in their order.
    """

    data: tuple[Any, ...]

    @classmethod
    def of(cls, given: Any) -> Any:
        """`{"a": …, "b": …}` or ``a=…,b=…`` as what it says; anything else as it is.

        Raises `MergeidError` where models are left out, or named twice."""
        if isinstance(given, str) and given.startswith("a="):
            parts = re.split(r",(?=[a-z]=)", given)
            letters = [part[0] for part in parts]
            twice = next((name for name in letters if letters.count(name) > 1), None)
            if twice is not None:
                raise MergeidError(f"--data gives data for {twice} twice; expected it once for each model: a=…,b=…")
            given = {part[0]: part[2:] for part in parts}
        if not isinstance(given, Mapping) or "a" not in given or not all(re.fullmatch("[a-z]", str(k)) for k in given):
            return given  # {"x": …, "y": …}, say: inputs of the network by name
        wanted = [chr(ord("a") + i) for i in range(len(given))]
        if sorted(given) != wanted or len(given) < 2:
            raise MergeidError(
                f"data names {', '.join(map(str, given))}; expected data for each of two or more models: a, b, …"
            )
        return cls(tuple(given[name] for name in wanted))


@dataclass(frozen=True)
class Calibration:
    """Examples that the models are run on, labels unused.

    Attributes:
        data: see `mergeid.data.load_data`, or `OwnData`; None: there are none.
        limit: most examples; None: all.
    """

    data: Any = None
    limit: int | None = LIMIT

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_count("limit", self.limit)

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.data is not None


@dataclass(frozen=True)
class Matching:
    """How neurons are made to correspond.

    Attributes:
        mode: "auto" as decided per space, "always", "never".
        matcher: name in the registry; None: the usual one.
        plan: file with what was decided (`mergeid.plan`); None: it is still to be decided.

    Raises `MergeidError` for an unknown mode, and where a plan leaves nothing to ask for.
    """

    mode: str = "auto"
    matcher: str | None = None
    plan: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.plan is not None and (self.mode != "auto" or self.matcher is not None):
            raise MergeidError("--plan says how neurons are matched; leave out --match and --matcher, or --plan")
        if self.mode not in MATCHES:
            raise MergeidError(f"--match {self.mode!r} is not one of {', '.join(MATCHES)}")


@dataclass(frozen=True)
class Repairing:
    """What is done to a merged network before it is written.

    Attributes:
        stage: "auto", "bn", "repair", "regmean", "solve", "solve+lean", "solve+polish" or "none".
        refuse_above: distance from the models beyond which no merge is written.
        target: what is imitated on a model's own examples: "own", that model; "mean", all by their shares. None: "own"
            where every model has its own examples.

    Raises `MergeidError` for an unknown stage, or what is no distance.
    """

    stage: str = "auto"
    refuse_above: float = REFUSE_ABOVE
    target: str | None = None

    def __post_init__(self) -> None:
        if self.target not in (None, *TARGETS):
            raise MergeidError(f"--target {self.target!r} is not one of {', '.join(TARGETS)}")
        if self.stage not in REPAIRS:
            raise MergeidError(f"--repair {self.stage!r} is not one of {', '.join(REPAIRS)}")
        above = self.refuse_above
        if isinstance(above, bool) or not isinstance(above, (int, float)) or not above >= 0:
            raise MergeidError(f"--refuse-above is {above!r}; expected 0 or more (inf: never refuse)")


@dataclass(frozen=True)
class Output:
    """Where the result goes.

    Attributes:
        path: ``.safetensors`` file or folder; None: a name beside the working directory's files, or nothing is written.
        dtype: number format of the result; None: as it lies.
        force: replace an earlier output, and write what mergeid advises against.
        shard_size: most bytes of one weight file of a folder; None: files as the first model has them.
        resume: go on with work on this output that was stopped.
        push: the repository on the hub that it goes to once it is written; None: none.
    """

    path: str | os.PathLike[str] | None = None
    dtype: str | None = None
    force: bool = False
    shard_size: int | None = None
    resume: bool = False
    push: str | None = None


_UNITS = {"": 1, "B": 1} | {p + i + "B": (1024 if i else 1000) ** n for n, p in enumerate("KMGT", 1) for i in ("", "I")}


def bytes_of(size: float | str | None) -> int | None:
    """A number of bytes as people write it: 5000000, "5GB", "500 MiB".

    Raises `MergeidError` for what is no size."""
    if size is None:
        return None
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?)\s*([A-Z]*)", str(size).strip().upper())
    number = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if isinstance(size, bool) or number < 1:
        raise MergeidError(f"shard size is {shown(size)}; expected a number of bytes such as 5GB (option --shard-size)")
    return number


def check_transport(matching: Matching, *, base: bool) -> None:
    """Raises `MergeidError` for what optimal transport has no use for."""
    for option, given in (
        ("--match", matching.mode != "auto"),
        ("--matcher", matching.matcher is not None),
        ("--plan", matching.plan is not None),
        ("--base", base),
    ):
        if given:
            raise MergeidError(
                f"{option} cannot be combined with --transport, which does not match neurons one to one; leave it out"
            )


def check_seed(seed: object) -> int:
    """Raises `MergeidError` for a seed that is no whole number from 0 to 2^63 - 1."""
    number = _whole(seed)
    if number is None or not 0 <= number <= LARGEST_SEED:
        raise MergeidError(f"seed is {shown(seed)}; expected a whole number from 0 to 2^63 - 1 (option --seed)")
    return number


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises `MergeidError` for what counts nothing."""
    number = _whole(value)
    if number is None or number < least:
        raise MergeidError(
            f"{name} is {shown(value)}; expected a whole number of at least {least} (option --{name.replace('_', '-')})"
        )


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
