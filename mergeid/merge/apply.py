"""Merging two checkpoints file to file: one tensor in memory at a time, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, MergeidWarning
from mergeid.io.checkpoint import Checkpoint, open_checkpoint
from mergeid.io.companions import default_companions
from mergeid.io.output import check_output
from mergeid.io.stream import CheckpointWriter
from mergeid.merge.compare import TensorPlan, plan_tensors
from mergeid.merge.methods import MergeMethod, check_weights, get_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 1 << 15
"""Elements merged at once: small enough for the cache, and for torch not to wake its threads (twice as fast)."""

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
    b: Checkpoint | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] = (0.5, 0.5),
    normalize: bool = False,
    method: str = "linear",
    transform_b: Callable[[str, Tensor], Tensor] | None = None,
    overrides: Mapping[str, Tensor] | None = None,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    force: bool = False,
    record: Mapping[str, Any] | None = None,
    companions: Iterable[Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge `a` and `b` into `output`, tensor by tensor.

    The output follows `a`: order of tensors, sharding, metadata, config and tokenizer files. Sums are taken in
    float32 for 16-bit weights and in float64 otherwise, so merging a model with itself gives it back bit for bit.

    Args:
        a, b: file, folder, hub id or open checkpoint.
        output: a ``.safetensors`` file or a folder.
        weights: one per model, with sum 1.
        normalize: scale the weights to sum 1.
        method: name in the registry (`mergeid.merge.methods`).
        transform_b: (name, B's tensor) -> the same tensor with its neurons in A's order, equal shape.
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
    second = b if isinstance(b, Checkpoint) else open_checkpoint(b)
    scaled = check_weights(weights, 2, normalize=normalize)
    chosen = get_method(method)
    inputs = [p for c in (first, second) if c.files for p in (c.path, *c.files)]
    check_output(output, inputs=inputs, force=force)
    plan = plan_tensors(first, second, skip=skip, dtype=dtype)
    _warn(first, second, plan, dtype)
    extra = _checked_overrides(first, overrides or {})
    with _hashing(first, second) as hashes:
        merge = _Merge(first, second, plan, scaled, chosen, transform_b, extra)
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
                writer.write(name, merge.tensor(name))
                done += writer.size(name)
                if writer.size(name) >= _RELEASE:
                    merge.release(name)
                if progress is not None:
                    progress(done, writer.size())
            writer.record = {**_record(first, second, scaled, method, merge, hashes), **(record or {})}
    return MergeReport(
        output=writer.output,
        files=tuple(writer.paths()),
        merged=len(plan.merged),
        bytes=done,
        kept=tuple(n for n in plan.compared if n not in merge.taken_from_a),
        taken_from_a=tuple(merge.taken_from_a),
        skipped=plan.skipped,
        left_out=plan.left_out,
        overridden=tuple(extra),
        dtypes=plan.dtypes,
        seconds=time.perf_counter() - began,
    )


class _Merge:
    """Yields the tensors of the result, in pieces."""

    def __init__(
        self,
        a: Checkpoint,
        b: Checkpoint,
        plan: TensorPlan,
        weights: Sequence[float],
        method: MergeMethod,
        transform_b: Callable[[str, Tensor], Tensor] | None,
        overrides: Mapping[str, Tensor],
    ) -> None:
        self.a, self.b, self.plan = a, b, plan
        self.weights, self.method, self.transform_b, self.overrides = weights, method, transform_b, overrides
        self.taken_from_a: list[str] = []
        self._merged, self._compared = set(plan.merged), set(plan.compared)

    def tensor(self, name: str) -> Iterator[Tensor]:
        """The merged tensor, flat, in pieces of at most `CHUNK` elements where the method allows."""
        from mergeid.io.dtypes import torch_dtype

        out = torch_dtype(self.plan.dtypes.get(name, self.a.table[name].dtype))
        if name in self.overrides:
            yield self.overrides[name].to(out)
            return
        ours = self.a.tensor(name)
        if name in self._merged:
            yield from self._merge(name, ours, self._theirs(name), out)
            return
        if name in self._compared and not _equal(ours, self._theirs(name)):
            self.taken_from_a.append(name)
        yield ours

    def release(self, name: str) -> None:
        """Give back the memory of a tensor that is not needed any more."""
        for checkpoint in (self.a, self.b):
            if name in checkpoint.table:
                checkpoint.release(name)

    def _theirs(self, name: str) -> Tensor:
        tensor = self.b.tensor(name)
        if self.transform_b is None:
            return tensor
        moved = self.transform_b(name, tensor)
        if moved.shape != tensor.shape:
            raise ValueError(f"transform_b made {tuple(moved.shape)} of {name!r} {tuple(tensor.shape)}")
        return moved

    def _merge(self, name: str, ours: Tensor, theirs: Tensor, out: torch.dtype) -> Iterator[Tensor]:
        pairs: Iterable[tuple[Tensor, Tensor]] = [(ours, theirs)]
        if self.method.elementwise:
            pairs = zip(ours.reshape(-1).split(CHUNK), theirs.reshape(-1).split(CHUNK), strict=True)
        for pair in pairs:
            result = self.method(pair, self.weights).to(out)
            # NaN and infinity in an input always show in a weighted sum; other methods may drop them.
            seen = [result] if self.method.name == "linear" else [result, *pair]
            if not all(_finite(t) for t in seen):
                raise MergeidError(self._not_finite(name, pair, out))
            yield result

    def _not_finite(self, name: str, pair: tuple[Tensor, Tensor], out: torch.dtype) -> str:
        import torch

        for tensor, checkpoint in zip(pair, (self.a, self.b), strict=True):
            if not _finite(tensor):
                what = "NaN" if torch.isnan(tensor).any() else "an infinite number"
                return (
                    f"tensor {name!r} of {checkpoint.file_of[name]} holds {what}; expected finite weights: use "
                    f"another checkpoint, or take this tensor from the first model as it is with --skip {name!r}"
                )
        return (
            f"tensor {name!r} overflows {str(out).removeprefix('torch.')} when merged with weights "
            f"{', '.join(f'{w:g}' for w in self.weights)}; choose a wider format (--dtype float32) or other weights"
        )


def _finite(tensor: Tensor) -> bool:
    """No NaN, no infinity: one pass without a temporary (both propagate into the extremes)."""
    import torch

    if tensor.numel() == 0:
        return True
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


@contextlib.contextmanager
def _hashing(*checkpoints: Checkpoint) -> Iterator[list[Future[dict[str, str]]]]:
    """Hash the inputs beside the import of torch and the merge itself; stop when that fails."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield [pool.submit(c.fingerprint, stop) for c in checkpoints]
        except BaseException:
            stop.set()
            raise


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    import torch

    return torch.equal(ours, theirs) if ours.dtype == theirs.dtype else bool((ours == theirs).all())


def _warn(a: Checkpoint, b: Checkpoint, plan: TensorPlan, dtype: str | None) -> None:
    same = len(a.files) == len(b.files) > 0 and all(map(os.path.samefile, a.files, b.files))
    if same:
        warnings.warn(f"both models are the same file ({a.path}); the result equals it", MergeidWarning, stacklevel=3)
    if plan.widened and dtype is None:
        name, more = plan.widened[0], len(plan.widened) - 1
        subject = f"tensor {name!r} and {more} more have" if more else f"tensor {name!r} has"
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
    if a.config is None or key is None or not plan.dtypes:
        return {}
    dtypes = Counter(plan.dtypes.get(n, a.table[n].dtype) for n in plan.merged)
    name = _CONFIG_NAMES.get(dtypes.most_common(1)[0][0])
    if name is None or a.config[key] == name:
        return {}
    return {"config.json": json.dumps({**a.config, key: name}, indent=2, ensure_ascii=False) + "\n"}


def _record(
    a: Checkpoint,
    b: Checkpoint,
    weights: Sequence[float],
    method: str,
    merge: _Merge,
    hashes: Sequence[Future[dict[str, str]]],
) -> dict[str, Any]:
    from importlib.metadata import version

    inputs = [
        {"source": c.source, "path": str(c.path.absolute()), "sha256": h.result(), "weight": w}
        for c, h, w in zip((a, b), hashes, weights, strict=True)
    ]
    return {
        "format": "mergeid.record/1",
        "inputs": inputs,
        "method": method,
        "skipped": list(merge.plan.skipped),
        "left_out": list(merge.plan.left_out),
        "taken_from_a": merge.taken_from_a,
        "overridden": list(merge.overrides),
        "dtypes": merge.plan.dtypes,
        "versions": {name: version(name) for name in ("mergeid", "torch", "safetensors")},
    }
