"""Merging checkpoints file to file: one tensor in memory at a time, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.basics.memory import give_back
from mergeid.combine.asymmetric import effective_averages
from mergeid.combine.by_numpy import NumpyMerge
from mergeid.combine.tensor_plan import TensorPlan, plan_many
from mergeid.errors import MergeidWarning
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.companions import default_companions
from mergeid.io.derived import origins, same_numbers
from mergeid.io.dtypes import tensor_bytes
from mergeid.io.folders import PARTS
from mergeid.io.output import check_output
from mergeid.io.stream import CheckpointWriter
from mergeid.io.tensors import TensorSource
from mergeid.methods.registry import check_base, check_weights
from mergeid.methods.settings import MergeSettings, MethodRequest
from mergeid.models.configs import config_files
from mergeid.nn.names import is_asymmetric
from mergeid.request.request import Output

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.combine.by_torch import TorchMerge

_RELEASE = 1 << 20
"""Tensors of at least this many bytes are unmapped once they are merged."""

_CONFIG_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: the file or folder that was written.
        files: everything that was written.
        merged: number of tensors that were weighted and added up.
        bytes: bytes of weights that were written.
        kept: integer and flag tensors, equal in both models.
        taken_from_a: integer and flag tensors that differ: A's were kept.
        skipped: tensors taken from A because a ``--skip`` pattern matched.
        left_out: tensors that only B has, left out because a ``--skip`` pattern matched.
        overridden: tensors that were replaced from outside (repaired statistics).
        dtypes: tensor name -> dtype of the output, where it is not that of A.
        seconds: wall time.
    """

    output: Path
    files: tuple[Path, ...]
    merged: int
    bytes: int
    kept: tuple[str, ...]
    taken_from_a: tuple[str, ...]
    skipped: tuple[str, ...]
    left_out: tuple[str, ...]
    overridden: tuple[str, ...]
    dtypes: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        values = asdict(self)
        return {**values, "output": str(self.output), "files": [str(f) for f in self.files]}


Transform = Callable[[str, "Tensor"], "Tensor"]
"""(name, tensor) -> the same tensor with its neurons in the first model's order, equal shape."""


@dataclass(frozen=True)
class Inputs:
    """What a merge reads.

    Attributes:
        models: the output follows the first; a single one for methods that take one.
        base: the base model, for methods that need one.
        transforms: for each model and, last, the base; None: as it lies. Empty: all as they lie.
        overrides: tensors that replace those of the result (repaired BatchNorm statistics).
        statistics: per model, tensor name -> what the method needs (`mergeid.methods.statistics`).
    """

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None = None
    transforms: tuple[Transform | None, ...] = ()
    overrides: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Sequence[Mapping[str, Any]] | None = None

    @property
    def used(self) -> list[Checkpoint]:
        """All that is read, the base last."""
        return [*self.models, *([self.base] if self.base is not None else [])]

    @property
    def files(self) -> list[Path]:
        """What an output must not touch."""
        return [p for c in self.used if c.files for p in (c.path, *c.files)]

    @property
    def moved(self) -> tuple[Transform | None, ...]:
        """One entry per checkpoint that is used."""
        return self.transforms or (None,) * len(self.used)


def merge_checkpoints(
    inputs: Inputs,
    asked: MethodRequest,
    output: Output,
    *,
    skip: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    companions: Iterable[Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge checkpoints into one, tensor by tensor.

    The output follows the first: order of tensors, sharding, metadata, config and tokenizer files. Sums are taken in
    float32 for 16-bit weights and in float64 otherwise, so merging a model with itself gives it back bit for bit.

    Args:
        inputs: what is read.
        asked: the method and what it is told.
        output: a ``.safetensors`` file or a folder; in its number format, or the first model's (the wider one where
            they differ).
        skip: glob patterns of tensor names to take from the first model as they are; what only others have is left out.
        record: entries for ``mergeid.json``, put over what is written there by itself (inputs and their hashes,
            weights, method, versions).
        companions: files that go into a folder output (default: config, tokenizer and preprocessor files of the first).
        progress: called with (bytes done, bytes in all) after every tensor.

    Returns:
        What was done, tensor by tensor where it matters.

    Raises:
        MergeidError: the models do not fit, NaN or infinite weights, or the output cannot be written. Then
            nothing is left behind.
    """
    began = time.perf_counter()
    models, first = inputs.models, inputs.models[0]
    check_base(asked.method, inputs.base is not None)
    if asked.method.weights == "shares" and all(isinstance(w, (int, float)) for w in asked.weights or ()):
        numbers: Any = asked.weights or [1 / len(models)] * len(models)
        check_weights(numbers, len(models), normalize=asked.normalize)
    check_output(output.path or "", inputs=inputs.files, force=output.force)
    plan = plan_many(models, base=inputs.base, skip=skip, dtype=output.dtype)
    settings = asked.over(len(models), plan.merged)
    _warn(models, plan, output.dtype)
    with _hashing(*inputs.used) as hashes:
        merge = _merge(inputs, plan, settings)
        writer = CheckpointWriter(
            output,
            like=first,
            dtypes=plan.dtypes,
            companions=default_companions(first) if companions is None else companions,
            replace=_changed_config(first, plan),
            inputs=inputs.files,
            request=_request(inputs, settings, plan, record or {}),
        )
        give_back()  # what reading headers and loading libraries has left
        with writer:
            done = 0
            for name in writer.order():
                done += writer.size(name)
                if name in writer and name not in plan.compared:
                    continue  # by a merge that was stopped
                writer.write(name, merge.pieces(name))
                if writer.size(name) >= _RELEASE:
                    for checkpoint in inputs.used:
                        checkpoint.release(name)
                if progress is not None:
                    progress(done, writer.size())
            give_back()  # pieces
            writer.record = {**_record(inputs, settings, merge, hashes), **(record or {})}
    return MergeReport(
        output=writer.output,
        files=tuple(writer.paths()),
        merged=len(plan.merged),
        bytes=done,
        kept=tuple(n for n in plan.compared if n not in merge.taken_from_a),
        taken_from_a=tuple(merge.taken_from_a),
        skipped=plan.skipped,
        left_out=plan.left_out,
        overridden=merge.overridden,
        dtypes=plan.dtypes,
        seconds=time.perf_counter() - began,
    )


def _request(inputs: Inputs, settings: MergeSettings, plan: TensorPlan, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the result's bytes depend on: a merge that was stopped goes on only where all of it is the same."""
    stats = [path.stat() for checkpoint in inputs.used for path in checkpoint.files]
    plans = [record.get("plan") or {}, *record.get("further_plans", ())]
    return {
        "models": [[str(path) for path in c.files] for c in inputs.used],
        "parts of the models (slices, adapters, tokens, --dequantise)": origins(inputs.used),
        "weight files (they were changed)": [[s.st_size, s.st_mtime_ns] for s in stats],
        "method": settings.method.name,
        "settings": settings.to_json(),
        "dtypes": plan.dtypes,
        "skipped tensors": plan.skipped,
        "order of neurons": [p.get("permutations", {}) for p in plans],
        "turned heads": [p.get("turns", []) for p in plans],
        "signs, maps and scales": [p.get("maps", []) for p in plans],
        "repaired tensors": _digest(inputs.overrides),
        "statistics of the data": [_digest(found) for found in inputs.statistics or ()],
    }


def _digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of tensors, or of tuples that begin with one, by name."""
    found = hashlib.sha256()
    for name, value in tensors.items():
        tensor, *more = value if isinstance(value, tuple) else (value,)
        found.update(f"{name} {more}".encode() + bytes(tensor_bytes(tensor.cpu().contiguous())))
    return found.hexdigest()


def _merge(inputs: Inputs, plan: TensorPlan, settings: MergeSettings) -> NumpyMerge | TorchMerge:
    """How tensors are made: by NumPy on mapped bytes where that can be done, else by torch."""
    extra = _checked_overrides(inputs.models[0], inputs.overrides)
    if is_asymmetric(plan.merged):
        extra = {**_effective(plan.merged, inputs, settings), **extra}
    plain = settings.method.name == "linear" and not any(inputs.moved) and not extra
    if plain and NumpyMerge.can(inputs.models, plan):
        return NumpyMerge(inputs.models, plan, settings.weights_of)
    from mergeid.combine.by_torch import Aligned, TorchMerge

    aligned = [Aligned(c, t) for c, t in zip(inputs.used, inputs.moved, strict=True)]
    base = aligned.pop() if inputs.base is not None else None
    return TorchMerge(aligned, plan, settings, extra, base, inputs.statistics)


@contextlib.contextmanager
def _hashing(*checkpoints: Checkpoint) -> Iterator[list[Future[dict[str, str]]]]:
    """Hash the inputs beside the merge; stop when that fails."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield [pool.submit(c.fingerprint, stop) for c in checkpoints]
        except BaseException:
            stop.set()
            raise


def _warn(models: Sequence[Checkpoint], plan: TensorPlan, dtype: str | None) -> None:
    a = models[0]
    for b in models[1:]:
        if same_numbers(a, b):
            subject, rest = (
                ("both models are", "the result equals it")
                if len(models) == 2
                else ("two of the models are", "it counts twice")
            )
            warnings.warn(f"{subject} the same file ({a.path}); {rest}", MergeidWarning, stacklevel=3)
    if plan.widened and dtype is None:
        name, more = plan.widened[0], len(plan.widened) - 1
        subject = f"tensor {name!r} and {more} more have" if more else f"tensor {name!r} has"
        b = next(c for c in models[1:] if c.table[name].dtype != a.table[name].dtype)
        kinds = f"{a.table[name].dtype} in {a.source}, {b.table[name].dtype} in {b.source}"
        merged = plan.dtypes.get(name, a.table[name].dtype)
        warnings.warn(
            f"{subject} different dtypes ({kinds}); merged in {merged}, which holds both (choose with --dtype)",
            MergeidWarning,
            stacklevel=3,
        )


def _checked_overrides(a: TensorSource, overrides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in overrides.items():
        if name not in a.table or tuple(tensor.shape) != a.table[name].shape:
            raise ValueError(f"override {name!r} {tuple(tensor.shape)} matches no tensor of {a.source}")
    return dict(overrides)


def _changed_config(a: Checkpoint, plan: TensorPlan) -> dict[str, str]:
    """A config that names a dtype must name the new one, else loading it casts the weights back."""
    if a.config is None or not plan.dtypes or not a.files:
        return config_files(a)
    config = a.config
    if a.parts:
        parts = {p.folder: _retyped(config[PARTS][p.folder], a, plan, p.prefix) for p in a.parts}
        config = {**config, PARTS: {**config[PARTS], **parts}}
    else:
        config = _retyped(config, a, plan)
    return config_files(a if config == a.config else replace(a, config=config, config_changed=True))


def _retyped(config: Mapping[str, Any], a: TensorSource, plan: TensorPlan, prefix: str = "") -> dict[str, Any]:
    """The config of the network under a prefix, with the dtype that most of its tensors have in the output."""
    key = next((k for k in ("dtype", "torch_dtype") if k in config), None)
    dtypes = Counter(plan.dtypes.get(n, a.table[n].dtype) for n in plan.merged if n.startswith(prefix))
    if key is None or not dtypes:
        return dict(config)
    return {**config, key: _CONFIG_NAMES.get(dtypes.most_common(1)[0][0], config[key])}


def _record(
    inputs: Inputs,
    settings: MergeSettings,
    merge: NumpyMerge | TorchMerge,
    hashes: Sequence[Future[dict[str, str]]],
) -> dict[str, Any]:
    from importlib.metadata import version

    def told(checkpoint: Checkpoint, digest: Future[dict[str, str]]) -> dict[str, Any]:
        return {"source": checkpoint.source, "path": str(checkpoint.path.absolute()), "sha256": digest.result()}

    read = [told(c, h) for c, h in zip(inputs.models, hashes, strict=False)]
    if settings.constant:
        name = merge.plan.merged[0]
        read = [{**i, "weight": w} for i, w in zip(read, settings.weights_of(name), strict=True)]
    return {
        "format": "mergeid.record/1",
        "inputs": read,
        "method": settings.method.name,
        **({"settings": settings.to_json()} if settings.parameters or not settings.constant else {}),
        **({"base": told(inputs.base, hashes[-1])} if inputs.base is not None else {}),
        "skipped": list(merge.plan.skipped),
        "left_out": list(merge.plan.left_out),
        "taken_from_a": merge.taken_from_a,
        "overridden": list(merge.overridden),
        "dtypes": merge.plan.dtypes,
        "versions": {name: version(name) for name in ("mergeid", "torch", "safetensors")},
    }


def _effective(names: Sequence[str], inputs: Inputs, settings: MergeSettings) -> dict[str, Tensor]:
    """Asymmetric layers whose masks differ, merged in their effective weights."""
    from mergeid.combine.by_torch import Aligned, combine, whole

    reads = [Aligned(c, t).tensor for c, t in zip(inputs.used, inputs.moved, strict=True)]
    base = reads.pop() if inputs.base is not None else None

    def merged(name: str, tensors: Sequence[Tensor], origin: Tensor | None) -> Tensor:
        return whole(combine(settings, name, tensors, origin), tensors[0])

    return effective_averages(names, reads, merged, base)
