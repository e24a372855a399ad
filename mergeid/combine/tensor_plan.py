"""Whether two checkpoints can be merged tensor by tensor, and what happens to each tensor. Reads headers only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.companions import label_map, same_tokenizer_files, vocabulary
from mergeid.io.dequantise import refuse_quantised
from mergeid.io.dtypes import INTEGERS, MERGEABLE, parse_dtype, wider
from mergeid.io.tensors import TensorSource
from mergeid.nn.names import is_asymmetric

HEADS_DIFFER = "the task heads differ"
_IN_LAYERS = re.compile(r"(^|\.)\d+\.")
EITHER_DIFFERS = "task heads and token embeddings often differ like this"


def mergeable(checkpoint: TensorSource) -> list[str]:
    """Names of the tensors that are weighted and added up."""
    return [name for name, info in checkpoint.table.items() if info.dtype in MERGEABLE]


@dataclass(frozen=True)
class TensorPlan:
    """What happens to every tensor of A, and to those that only B has.

    Attributes:
        merged: weighted and added up.
        compared: integers and flags: kept when equal, else taken from A.
        skipped: matched by ``--skip``: taken from A as they are.
        left_out: matched by ``--skip`` and only in B.
        widened: merged tensors whose dtype differs between A and B.
        dtypes: tensor name -> dtype of the output, where it is not that of A.
    """

    merged: tuple[str, ...]
    compared: tuple[str, ...]
    skipped: tuple[str, ...]
    left_out: tuple[str, ...]
    widened: tuple[str, ...]
    dtypes: dict[str, str] = field(default_factory=dict)


def plan_tensors(a: Checkpoint, b: Checkpoint, *, skip: Sequence[str] = (), dtype: str | None = None) -> TensorPlan:
    """Compare the tables, label maps and vocabularies of two checkpoints.

    Args:
        a, b: the pair; the output follows A.
        skip: glob patterns of tensor names to take from A as they are (or to leave out, where only B has them).
        dtype: write all merged tensors in this dtype.

    Raises:
        MergeidError: different architectures, heads, label maps or tokenizers; extra or missing tensors;
            different shapes; quantised or unknown dtypes; a pattern that matches nothing.
    """

    def skipped(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in skip) or _counts(name, a, b)

    names = {**dict.fromkeys(a.table), **dict.fromkeys(b.table)}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise MergeidError(f"--skip {pattern!r} matches no tensor of {a.source} or {b.source}; check the pattern")
    for checkpoint in (a, b):
        refuse_quantised(checkpoint, [n for n in checkpoint.table if not skipped(n)])
    common = [n for n in a.table if n in b.table and not skipped(n)]
    _refuse_other_names(a, b, [n for n in names if not skipped(n)], common)
    _refuse_other_shapes(a, b, common)
    _refuse_other_labels(a, b, [n for n in a.table if skipped(n)])
    merged = [n for n in common if a.table[n].dtype in MERGEABLE]
    for name in common:
        if _kind(a, name) != _kind(b, name):
            raise MergeidError(
                f"tensor {name!r} is {a.table[name].dtype} in {a.source} and {b.table[name].dtype} in {b.source}; "
                f"expected the same kind of numbers: take it from the first with --skip {name!r}"
            )
    if not merged and not skip:
        raise MergeidError(f"{a.source} and {b.source} have no floating-point weights; expected some to merge")
    if not merged:
        raise MergeidError(f"no weights of {a.source} and {b.source} are left to merge; skip fewer tensors (--skip)")
    target = parse_dtype(dtype) if dtype is not None else None
    dtypes = {}
    for name in merged:
        first, second = a.table[name].dtype, b.table[name].dtype
        chosen = first if first == "C64" else target or wider(first, second)
        if chosen != first:
            dtypes[name] = chosen
    return TensorPlan(
        merged=tuple(merged),
        compared=tuple(n for n in common if a.table[n].dtype in INTEGERS),
        skipped=tuple(n for n in a.table if skipped(n)),
        left_out=tuple(n for n in b.table if n not in a.table),
        widened=tuple(n for n in merged if a.table[n].dtype != b.table[n].dtype),
        dtypes=dtypes,
    )


def plan_many(
    models: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    skip: Sequence[str] = (),
    dtype: str | None = None,
) -> TensorPlan:
    """`plan_tensors` for several models: every one, and the base, against the first. The base's dtypes do not count.

    Raises:
        MergeidError: as `plan_tensors`, for the first pair that does not fit.
    """
    first, *rest = models
    compared = [*rest, *([base] if base is not None else [])]
    names = {n for c in (first, *compared) for n in c.table}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            sources = " or ".join(c.source for c in (first, *compared))
            raise MergeidError(f"--skip {pattern!r} matches no tensor of {sources}; check the pattern")

    def plan(other: Checkpoint) -> TensorPlan:
        here = {*first.table, *other.table}
        return plan_tensors(first, other, skip=[p for p in skip if any(fnmatchcase(n, p) for n in here)], dtype=dtype)

    plans = [plan(other) for other in rest or [first]]  # one model alone fits itself
    if base is not None:
        plan(base)
    if len(plans) == 1:
        return plans[0]
    dtypes: dict[str, str] = {}
    for found in plans:
        for name, chosen in found.dtypes.items():  # with `dtype` all plans agree
            dtypes[name] = wider(dtypes.get(name, chosen), chosen)
    return TensorPlan(
        merged=plans[0].merged,
        compared=tuple(n for n in plans[0].compared if all(n in p.compared for p in plans)),
        skipped=tuple(dict.fromkeys(n for p in plans for n in p.skipped)),
        left_out=tuple(dict.fromkeys(n for p in plans for n in p.left_out)),
        widened=tuple(dict.fromkeys(n for p in plans for n in p.widened)),
        dtypes=dtypes,
    )


def _counts(name: str, a: TensorSource, b: TensorSource) -> bool:
    """Whether it is a single whole number of one model alone, such as the step counters that old files lack."""
    found = [c.table[name] for c in (a, b) if name in c.table]
    return len(found) == 1 and found[0].dtype in INTEGERS and math.prod(found[0].shape) == 1


def _kind(checkpoint: TensorSource, name: str) -> str:
    dtype = checkpoint.table[name].dtype
    return "integer" if dtype in INTEGERS else "complex" if dtype == "C64" else "float"


def architecture_name(config: dict[str, Any] | None) -> str | None:
    """What a config calls its architecture, in any of the usual places."""
    if not config:
        return None
    listed = config.get("architectures")
    found = config.get("architecture") or (listed[0] if isinstance(listed, list) and listed else None)
    return str(found or config.get("model_type") or "") or None


def _and_more(names: Sequence[str]) -> str:
    """``'first' (and 3 more)``"""
    return f"{names[0]!r}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _pattern(names: Sequence[str], all_names: Sequence[str]) -> str:
    """The ``--skip`` options that catch exactly these names, as short as they can be said."""
    if len(names) > 1 and "." in names[0]:
        glob = names[0].rsplit(".", 1)[0] + ".*"
        if {n for n in all_names if fnmatchcase(n, glob)} == set(names):
            return f"--skip '{glob}'"
    shown = " ".join(f"--skip '{n}'" for n in names[:3])
    return shown if len(names) <= 3 else f"--skip '{names[0]}' and so on"


def _refuse_other_names(a: TensorSource, b: TensorSource, names: Sequence[str], common: Sequence[str]) -> None:
    only_a = [n for n in names if n not in b.table]
    only_b = [n for n in names if n not in a.table]
    if not only_a and not only_b:
        return
    asymmetric = [is_asymmetric(c.table) for c in (a, b)]
    if asymmetric[0] != asymmetric[1]:
        which, other = (a, b) if asymmetric[0] else (b, a)
        raise MergeidError(
            f"{which.source} has asymmetric layers and {other.source} has ordinary ones; expected "
            "asymmetric layers in both or in neither: fold the former first (mergeid.nn.fold_file)"
        )
    if 2 * len(common) < len(names):
        kinds = [architecture_name(c.config) for c in (a, b)]
        said = f" ({kinds[0]} and {kinds[1]})" if all(kinds) and kinds[0] != kinds[1] else ""
        raise MergeidError(
            f"{a.source} and {b.source} are different architectures{said}: they share {len(common)} of {len(names)} "
            f"tensor names{_prefix_hint(a, b)}; expected two checkpoints of one architecture"
        )
    parts = []
    if only_a:
        parts.append(f"tensor {_and_more(only_a)} is only in {a.source}")
    if only_b:
        parts.append(f"tensor {_and_more(only_b)} is only in {b.source}")
    raise MergeidError(
        f"{' and '.join(parts)}; expected the same tensors in both: merge the rest with "
        f"{_pattern([*only_a, *only_b], names)} (tensors only in the first are kept, those only in the second are "
        f"left out)"
    )


def _prefix_hint(a: TensorSource, b: TensorSource) -> str:
    """Wrappers (data-parallel, compiled) put one prefix before every name. Raises where other tensors lie beside."""
    for first, second in ((a, b), (b, a)):
        name = next(iter(first.table))
        longer = next((n for n in second.table if n.endswith("." + name)), None)
        if longer is not None:
            prefix = longer.removesuffix(name)
            more = [n for n in second.table if not n.startswith(prefix)]
            if not {prefix + n for n in first.table} <= second.table.keys():
                continue
            if not more:
                return f", because every name of {second.source} begins with {prefix!r}"
            raise MergeidError(
                f"{second.source} has the tensors of {first.source} under {prefix!r}, beside {_and_more(more)}; "
                "expected those of the network alone: save its own state dict"
            )
    return ""


def _classes(checkpoint: TensorSource) -> int | None:
    labels = label_map(checkpoint.config)
    config = checkpoint.config or {}
    return len(labels) if labels else config.get("num_classes", config.get("num_labels"))


def _vocab_size(checkpoint: TensorSource) -> int | None:
    config = checkpoint.config or {}
    nested = config.get("text_config")
    return config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, dict) else None)


def _sizes_that_differ(a: TensorSource, b: TensorSource) -> str:
    """Numbers of heads, channels and the like in which the configs differ: "num_key_value_heads (2 and 4)"."""
    one, two = (c.config or {} for c in (a, b))
    sizes = [k for k in one if all(type(c.get(k)) is int and c[k] > 0 for c in (one, two)) and one[k] != two[k]]
    told = [f"{k} ({one[k]} and {two[k]})" for k in sizes if "token" not in k and k not in ("vocab_size", "num_labels")]
    return " and ".join(told[:2])


def _refuse_other_shapes(a: TensorSource, b: TensorSource, common: Sequence[str]) -> None:
    other = [n for n in common if a.table[n].shape != b.table[n].shape]
    if not other:
        return
    first, second = a.table[other[0]].shape, b.table[other[0]].shape
    hint = "the models differ in size or architecture (layers of different widths can be merged with --transport)"
    few = 2 * len(other) < len(common)
    sizes_differ = _sizes_that_differ(a, b) if few and any(_IN_LAYERS.search(n) for n in other) else ""
    if sizes_differ:
        hint = f"the models differ in {sizes_differ}"
    elif few:
        words = {
            HEADS_DIFFER: (_classes(a), _classes(b)),
            "the vocabularies differ": (_vocab_size(a), _vocab_size(b)),
        }
        hint = EITHER_DIFFERS
        for text, sizes in words.items():
            if first[:1] == sizes[:1] and second[:1] == sizes[1:]:
                hint = f"{text} ({sizes[0]} and {sizes[1]} rows)"
        if first[:1] == (_vocab_size(a),) and second[:1] == (_vocab_size(b),):
            hint += ": match the rows by token with --tokenizer union (or a, b), or"
        elif hint.startswith(HEADS_DIFFER):
            hint += ": keep both with mergeid merge --heads both, or"
        elif hint == EITHER_DIFFERS:
            hint += ": keep both heads with mergeid merge --heads both, match tokens with --tokenizer, or"
        else:
            hint += ":"
        hint += f" take the first model's with {_pattern(other, common)}"
    raise MergeidError(
        f"tensor {other[0]!r} has shape {list(first)} in {a.source} and {list(second)} in {b.source}"
        + (f", and {len(other) - 1} more differ" if len(other) > 1 else "")
        + f"; expected equal shapes; {hint}"
    )


def _refuse_other_labels(a: Checkpoint, b: Checkpoint, skipped: Sequence[str]) -> None:
    """Heads and embeddings of equal shape whose rows mean different things."""
    labels, others = label_map(a.config), label_map(b.config)
    if labels and others and len(labels) == len(others) and not _generic(labels) and not _generic(others):
        differ = [k for k in labels if labels[k] != others.get(k)]
        head = [n for n, info in a.table.items() if info.shape[:1] == (len(labels),)]
        if differ and head and not set(head) & set(skipped):
            k = differ[0]
            raise MergeidError(
                f"label maps differ: class {k} is {labels[k]!r} in {a.source} and {others.get(k)!r} in {b.source}; "
                f"expected the same classes: keep both heads with mergeid merge --heads both, or take the first "
                f"model's with {_pattern(head[-2:], list(a.table))}"
            )
    if not (a.is_folder and b.is_folder) or same_tokenizer_files(a, b):
        return
    tokens, other_tokens = vocabulary(a), vocabulary(b)
    if tokens and other_tokens and tokens != other_tokens:
        size = _vocab_size(a)
        rows = [
            n
            for n, info in a.table.items()
            if len(info.shape) == 2 and (info.shape[0] == size or (size is None and info.shape[0] >= len(tokens)))
        ]
        if rows and not set(rows) & set(skipped):
            token = next(t for t in [*tokens, *other_tokens] if tokens.get(t) != other_tokens.get(t))
            one, two = (f"number {found[token]}" if token in found else "missing" for found in (tokens, other_tokens))
            raise MergeidError(
                f"tokenizers differ: token {token!r} is {one} in {a.source} and {two} in {b.source}; expected one "
                "vocabulary: match the rows by token with --tokenizer a (or b, union), or take the first model's "
                f"embedding with {_pattern(rows, list(a.table))}"
            )


def _generic(labels: dict[str, str]) -> bool:
    """``LABEL_0``, ``LABEL_1``, … are placeholders: nothing was said about the classes."""
    return all(v == f"LABEL_{k}" for k, v in labels.items())
