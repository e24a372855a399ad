"""Merging checkpoints file to file: one tensor in memory at a time, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.combine.asymmetric import effective_averages
from mergeid.combine.by_numpy import NumpyMerge
from mergeid.combine.tensor_plan import TensorPlan, plan_many
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.io.checkpoint import Checkpoint, open_checkpoint
from mergeid.io.companions import default_companions
from mergeid.io.output import check_output
from mergeid.io.stream import CheckpointWriter
from mergeid.methods.registry import MergeMethod, check_weights, get_method
from mergeid.methods.settings import MergeSettings, Setting
from mergeid.models.configs import config_files
from mergeid.nn.names import is_asymmetric

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


def merge_checkpoints(
    a: Checkpoint | str | os.PathLike[str],
    b: Checkpoint | str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    weights: Sequence[Setting] | None = None,
    normalize: bool | None = None,
    method: str = "linear",
    parameters: Mapping[str, Setting | Sequence[Setting]] | None = None,
    seed: int = 0,
    more: Sequence[Checkpoint] = (),
    base: Checkpoint | str | os.PathLike[str] | None = None,
    transform_b: Callable[[str, Tensor], Tensor] | None = None,
    transforms: Sequence[Callable[[str, Tensor], Tensor] | None] = (),
    statistics: Sequence[Mapping[str, Any]] | None = None,
    overrides: Mapping[str, Tensor] | None = None,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    force: bool = False,
    record: Mapping[str, Any] | None = None,
    companions: Iterable[Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge `a`, `b` and perhaps more into `output`, tensor by tensor.

    The output follows `a`: order of tensors, sharding, metadata, config and tokenizer files. Sums are taken in
    float32 for 16-bit weights and in float64 otherwise, so merging a model with itself gives it back bit for bit.

    Args:
        a, b: file, folder, hub id or open checkpoint; no b for methods that take one model.
        output: a ``.safetensors`` file or a folder.
        weights: one per model (with sum 1 unless the method says otherwise); default: equal shares.
        normalize: True: scale the weights to sum 1; False: take them as they are.
        method: name in the registry (`mergeid.methods.registry`).
        parameters: of the method, by name (`mergeid.methods.settings`).
        seed: of methods that draw.
        more: further models.
        base: the base model, for methods that need one.
        transform_b: (name, B's tensor) -> the same tensor with its neurons in A's order, equal shape.
        transforms: the same for each of `more` and, last, for `base`; empty: all as they lie.
        statistics: per model, tensor name -> what the method needs (`mergeid.combine.statistics`).
        overrides: tensors that replace those of the result (repaired BatchNorm statistics).
        dtype: write merged tensors in this dtype (default: A's, or the wider one where A and B differ).
        skip: glob patterns of tensor names to take from A as they are; what only B has is left out.
        force: replace an earlier output.
        record: entries for ``mergeid.json``, put over what is written there by itself (inputs and their hashes,
            weights, method, versions).
        companions: files that go into a folder output (default: A's config, tokenizer and preprocessor files).
        progress: called with (bytes done, bytes in all) after every tensor.

    Returns:
        What was done, tensor by tensor where it matters.

    Raises:
        MergeidError: the pair does not fit, NaN or infinite weights, or the output cannot be written. Then
            nothing is left behind.
    """
    began = time.perf_counter()
    first = a if isinstance(a, Checkpoint) else open_checkpoint(a)
    second = b if b is None or isinstance(b, Checkpoint) else open_checkpoint(b)
    models = [first, *([second] if second is not None else []), *more]
    origin = base if base is None or isinstance(base, Checkpoint) else open_checkpoint(base)
    chosen = get_method(method)
    check_base(chosen, origin is not None)
    used = [*models, *([origin] if origin is not None else [])]
    if chosen.weights == "shares" and all(isinstance(w, (int, float)) for w in weights or ()):
        check_weights(weights or [1 / len(models)] * len(models), len(models), normalize=normalize)  # type: ignore[arg-type]
    inputs = [p for c in used if c.files for p in (c.path, *c.files)]
    check_output(output, inputs=inputs, force=force)
    plan = plan_many(models, base=origin, skip=skip, dtype=dtype)
    settings = MergeSettings.of(
        chosen, len(models), plan.merged, weights=weights, parameters=parameters, normalize=normalize, seed=seed
    )
    _warn(models, plan, dtype)
    extra = _checked_overrides(first, overrides or {})
    moved = [None, *([transform_b] if second is not None else []), *(transforms or [None] * len(used[2:]))]
    if is_asymmetric(plan.merged):
        extra = {**_effective(plan.merged, used, moved, settings, origin is not None), **extra}
    with _hashing(*used) as hashes:
        merge: NumpyMerge | TorchMerge
        plain = method == "linear" and not any(moved) and not extra
        if plain and NumpyMerge.can(models, plan):
            merge = NumpyMerge(models, plan, settings.weights_of)
        else:
            from mergeid.combine.by_torch import Aligned, TorchMerge

            aligned = [Aligned(c, t) for c, t in zip(used, moved, strict=True)]
            merge = TorchMerge(
                aligned[: len(models)],
                plan,
                settings,
                extra,
                aligned[len(models)] if origin is not None else None,
                statistics,
            )
        writer = CheckpointWriter(
            output,
            like=first,
            dtypes=plan.dtypes,
            companions=default_companions(first) if companions is None else companions,
            replace=_changed_config(first, plan),
            inputs=inputs,
            force=force,
        )
        with writer:
            done = 0
            for name in writer.order():
                writer.write(name, merge.pieces(name))
                done += writer.size(name)
                if writer.size(name) >= _RELEASE:
                    for checkpoint in used:
                        checkpoint.release(name)
                if progress is not None:
                    progress(done, writer.size())
            writer.record = {**_record(models, origin, settings, merge, hashes), **(record or {})}
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


def check_base(method: MergeMethod, given: bool) -> None:
    """Raises `MergeidError` where a method needs a base model and none is given, or the other way round."""
    if method.base is True and not given:
        raise MergeidError(
            f"method {method.name!r} needs the model that the others were fine-tuned from; name it with --base"
        )
    if given and not method.base:
        raise MergeidError(f"method {method.name!r} uses no base model; leave out --base, or choose another --method")


def _warn(models: Sequence[Checkpoint], plan: TensorPlan, dtype: str | None) -> None:
    a = models[0]
    for b in models[1:]:
        if len(a.files) == len(b.files) > 0 and all(map(os.path.samefile, a.files, b.files)):
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
        warnings.warn(
            f"{subject} different dtypes ({kinds}); merged in the wider one (choose with --dtype)",
            MergeidWarning,
            stacklevel=3,
        )


def _checked_overrides(a: Checkpoint, overrides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in overrides.items():
        if name not in a.table or tuple(tensor.shape) != a.table[name].shape:
            raise ValueError(f"override {name!r} {tuple(tensor.shape)} fits no tensor of {a.source}")
    return dict(overrides)


def _changed_config(a: Checkpoint, plan: TensorPlan) -> dict[str, str]:
    """A config that names a dtype must name the new one, else loading it casts the weights back."""
    key = next((k for k in ("dtype", "torch_dtype") if k in (a.config or {})), None)
    if a.config is None or key is None or not plan.dtypes or not a.files:
        return config_files(a)
    dtypes = Counter(plan.dtypes.get(n, a.table[n].dtype) for n in plan.merged)
    name = _CONFIG_NAMES.get(dtypes.most_common(1)[0][0])
    if name is None or a.config[key] == name:
        return config_files(a)
    return config_files(replace(a, config={**a.config, key: name}, config_changed=True))


def _record(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    settings: MergeSettings,
    merge: NumpyMerge | TorchMerge,
    hashes: Sequence[Future[dict[str, str]]],
) -> dict[str, Any]:
    from importlib.metadata import version

    def told(checkpoint: Checkpoint, digest: Future[dict[str, str]]) -> dict[str, Any]:
        return {"source": checkpoint.source, "path": str(checkpoint.path.absolute()), "sha256": digest.result()}

    inputs = [told(c, h) for c, h in zip(models, hashes, strict=False)]
    if settings.constant:
        name = merge.plan.merged[0]
        inputs = [{**i, "weight": w} for i, w in zip(inputs, settings.weights_of(name), strict=True)]
    return {
        "format": "mergeid.record/1",
        "inputs": inputs,
        "method": settings.method.name,
        **({"settings": settings.to_json()} if settings.parameters or not settings.constant else {}),
        **({"base": told(base, hashes[-1])} if base is not None else {}),
        "skipped": list(merge.plan.skipped),
        "left_out": list(merge.plan.left_out),
        "taken_from_a": merge.taken_from_a,
        "overridden": list(merge.overridden),
        "dtypes": merge.plan.dtypes,
        "versions": {name: version(name) for name in ("mergeid", "torch", "safetensors")},
    }


def _effective(
    names: Sequence[str],
    used: Sequence[Checkpoint],
    moved: Sequence[Callable[[str, Tensor], Tensor] | None],
    settings: MergeSettings,
    has_base: bool,
) -> dict[str, Tensor]:
    """Asymmetric layers whose masks differ, merged in their effective weights."""
    from mergeid.combine.by_torch import Aligned, whole

    reads = [Aligned(c, t).tensor for c, t in zip(used, moved, strict=True)]
    base = reads.pop() if has_base else None
    return effective_averages(names, reads, lambda name, tensors, origin: whole(settings, name, tensors, origin), base)
