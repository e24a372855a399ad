"""The configs of models that meet: compared through the library that they belong to, and one chosen where they differ.

Weights say nothing of the base of rotary positions, the activation or the number of heads; two checkpoints with equal
tensors can be two functions. What differs is refused by name, unless the user says whose config the merge gets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from mergeid.basics.reading import json_text
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.folders import PARTS
from mergeid.io.tensors import TensorSource
from mergeid.plugins import ComparesConfigs, ConfigDifference, adapter_names, get_adapter

if TYPE_CHECKING:
    from mergeid.models.loaded import Loaded

UNCOUNTED = frozenset({
    "dtype", "torch_dtype", "transformers_version", "id2label", "label2id", "label_names", "num_labels", "num_classes",
    "vocab_size",
})  # fmt: skip
"""Fields of a config that no adapter understands which say nothing of the function: storage, and what is compared with
the tensors."""
CHANGES = "which changes what the network computes"
SAYS_WHICH = "says which one the merge gets"
SHOWN = 3
"""Differences that a message names."""


@dataclass(frozen=True)
class Disagreement:
    """Fields in which a model's config differs from the first one's in what the network computes."""

    first: str
    other: str
    fields: tuple[ConfigDifference, ...]

    def __str__(self) -> str:
        fields = differing(self.fields) if self.fields else "their code"
        return f"{self.first} and {self.other} differ in {fields}"

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "other": self.other,
            "fields": {d.field: [d.a, d.b] for d in self.fields},
        }


@dataclass
class Agreed:
    """Models that compute one function of their weights.

    Attributes:
        models, base: their configs say the same, those of the chosen one where they differed.
        notes: what the user should know.
        chosen: source of the model whose config was chosen by name; None where nothing differed.
        overruled: what differed.
        resized: models that were made for images of another size, see `mergeid.models.sizes`.
        heads: the head with the classes of all, see `mergeid.models.both_heads`; None: there is none.
    """

    models: list[Checkpoint]
    base: Checkpoint | None
    notes: list[str] = field(default_factory=list)
    chosen: str | None = None
    overruled: list[Disagreement] = field(default_factory=list)
    resized: list[dict[str, Any]] = field(default_factory=list)
    heads: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """For ``mergeid.json``; empty where nothing differed."""
        found: dict[str, Any] = {"resized": self.resized} if self.resized else {}
        if self.heads is not None:
            found["heads"] = self.heads
        if self.chosen is not None:
            found["config"] = {"from": self.chosen, "overruled": [d.to_json() for d in self.overruled]}
        return found


def agree(
    models: Sequence[Checkpoint],
    base: Checkpoint | None = None,
    *,
    config: str | None = None,
    same_head: bool = True,
    widths: bool = True,
    arch: str | None = None,
    layers: bool = True,
) -> Agreed:
    """Compare the configs of all models, and the base's, with the first one's.

    Args:
        config: "a", "b", … : whose config counts where they differ; None: refuse.
        same_head: whether the task heads are merged too, so that their classes must be the same.
        widths: whether to compare the widths of layers (else the tensors' shapes are compared elsewhere).
        arch: what the user named as the architecture; a config.json named there counts for all models.
        layers: whether the layers of live modules are compared too, which say what files leave to their config.

    Raises:
        MergeidError: fields that change what the network computes differ and `config` does not say which counts.
    """
    which = index_of(config, len(models))
    if arch is not None and arch.endswith(".json"):
        return Agreed(list(models), base)
    everyone = [*models, *([base] if base is not None else [])]
    said = [_description(c) for c in everyone]
    donor = next((c for c, (_, words) in zip(everyone, said, strict=True) if c.config is not None and words), None)
    lacking = [
        c
        for c, (_, words) in zip(everyone, said, strict=True)
        if words is None and c.config is None and donor is not None and _alike(c, donor)
    ]
    found = Agreed(list(models), base)
    if donor is not None and lacking:
        everyone = [replace(c, config=donor.config, config_changed=True) if c in lacking else c for c in everyone]
        names = ", ".join(c.source for c in lacking)
        found.notes.append(f"{names} came without config.json; that of {donor.source} was used")
        found.models, found.base = everyone[: len(models)], everyone[-1] if base is not None else None
    modules = [c.module for c in everyone if c.module is not None]  # of which some have a length, and it is 0
    first = everyone[0]
    disagreements = []
    for i, other in enumerate(everyone[1:], 1):
        told = _differences(said[0], said[i])
        if layers and not told and len(modules) == len(everyone):
            from mergeid.models.live import module_differences

            told = module_differences(modules[0], modules[i])
        fields = [d for d in told if (same_head or d.effect != "head") and (widths or d.effect != "width")]
        changed = tuple(d for d in fields if d.effect != "inputs")
        rest = [d for d in fields if d.effect == "inputs"]
        if changed:
            disagreements.append(Disagreement(*called_apart(first, other), changed))
        if rest:
            one, two = called_apart(first, other)
            found.notes.append(
                f"{one} and {two} differ in {differing(rest)}, which only concerns the inputs; the result has that of "
                f"{everyone[which or 0].source}"
            )
    if not disagreements and not which:
        return found
    if disagreements and which is None:
        letters = "|".join(ascii_lowercase[: len(models)])
        raise MergeidError(f"{disagreements[0]}, {CHANGES}; --config {letters} {SAYS_WHICH}")
    chosen = everyone[which or 0]
    heads = same_head and any(d.effect == "head" for x in disagreements for d in x.fields)
    adopted = [c if c is chosen else _adopting(c, chosen, heads) for c in everyone]
    found.base = adopted.pop() if base is not None else None
    found.models, found.overruled = adopted, disagreements
    found.chosen = chosen.source
    found.notes += [f"{d}; the config of {chosen.source} was used for all, as requested" for d in disagreements]
    return found


def disagreement(
    a: tuple[str, Mapping[str, Any] | None], b: tuple[str, Mapping[str, Any] | None]
) -> Disagreement | None:
    """What two models (name, config) compute differently; None where nothing is known to differ."""
    said = [_understood(config, {}) for _, config in (a, b)]
    fields = tuple(d for d in _differences(*said) if d.effect != "inputs")
    return Disagreement(a[0], b[0], fields) if fields else None


def index_of(config: str | None, models: int) -> int | None:
    """Which model "a", "b", … names. Raises `MergeidError` for something else."""
    if config is None:
        return None
    letters = ascii_lowercase[:models]
    if len(config) != 1 or config not in letters:
        raise MergeidError(f"--config {config!r} is not the letter of a model; expected one of {', '.join(letters)}")
    return letters.index(config)


def config_files(checkpoint: Checkpoint) -> dict[str, str]:
    """``config.json`` as text where it is not the one that lies beside the weights, one for each network, and other
    files that are new."""
    if not checkpoint.config_changed or checkpoint.config is None:
        return dict(checkpoint.beside)
    if not checkpoint.parts:
        return {**checkpoint.beside, "config.json": _text(checkpoint.config)}
    configs = checkpoint.config[PARTS]
    files = {f"{p.folder}/config.json".lstrip("/"): _text(configs[p.folder]) for p in checkpoint.parts}
    return {**checkpoint.beside, **files}


def _text(config: Mapping[str, Any]) -> str:
    return json_text(config) + "\n"


def _description(checkpoint: TensorSource) -> tuple[ComparesConfigs | None, Mapping[str, Any] | None]:
    """What is said of a network, and the adapter that understands it; a config that none understands as it is."""
    return _understood(checkpoint.config, checkpoint.metadata)


def _understood(
    config: Mapping[str, Any] | None, metadata: Mapping[str, str]
) -> tuple[ComparesConfigs | None, Mapping[str, Any] | None]:
    if config is None and not metadata:
        return None, None
    for name in adapter_names():
        adapter = get_adapter(name)
        if isinstance(adapter, ComparesConfigs) and (found := adapter.described(config, metadata)) is not None:
            return adapter, found
    return None, config


def _differences(
    a: tuple[ComparesConfigs | None, Mapping[str, Any] | None],
    b: tuple[ComparesConfigs | None, Mapping[str, Any] | None],
) -> list[ConfigDifference]:
    (adapter, mine), (other, theirs) = a, b
    if mine is None or theirs is None or mine == theirs:
        return []
    if adapter is not None and adapter is other:
        return adapter.config_differences(mine, theirs)
    if _kind(mine) != _kind(theirs):
        return [ConfigDifference("architecture", _kind(mine), _kind(theirs))]
    keys = sorted(key for key in {*mine, *theirs} if key not in UNCOUNTED and not key.startswith("_"))
    return [ConfigDifference(k, mine.get(k), theirs.get(k)) for k in keys if mine.get(k) != theirs.get(k)]


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type") or config.get("architecture") or config.get("_class_name") or "unknown")


def _alike(a: TensorSource, b: TensorSource) -> bool:
    """Whether both have tensors of the same names and shapes, so that one's config describes the other too."""
    return {n: info.shape for n, info in a.table.items()} == {n: info.shape for n, info in b.table.items()}


def _adopting(checkpoint: Checkpoint, chosen: Checkpoint, head: bool) -> Checkpoint:
    """The checkpoint with a config that computes what the chosen one's computes."""
    if chosen.config is None:
        return checkpoint
    adapter = _description(chosen)[0]
    mine = checkpoint.config
    if mine is None or adapter is None or _description(checkpoint)[0] is not adapter:
        config = dict(chosen.config)
    else:
        config = adapter.adopted(mine, chosen.config, head=head)
    return replace(checkpoint, config=config, config_changed=True) if config != mine else checkpoint


def called_apart(a: TensorSource | Loaded, b: TensorSource | Loaded) -> tuple[str, str]:
    """What two models are called in one message."""
    if a.source != b.source:
        return a.source, b.source
    return f"{a.source} (the first)", f"{b.source} (another)"


def differing(fields: Sequence[ConfigDifference]) -> str:
    """The first few of them, with both values."""
    shown = [f"{d.field} ({_value(d.a)} and {_value(d.b)})" for d in fields[:SHOWN]]
    if len(fields) > SHOWN:
        shown.append(f"{len(fields) - SHOWN} more fields")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
