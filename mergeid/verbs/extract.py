"""What a fine-tune adds to its base, as a PEFT adapter of a chosen rank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.lora import ADAPTER_CONFIG
from mergeid.io.opening import open_checkpoint
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Output, Progress
from mergeid.results.extract import ExtractResult

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
"""What PEFT puts before the names of modules."""


@verb
def extract(
    model: str | os.PathLike[str] | Checkpoint,
    *,
    base: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    rank: Annotated[int, o.Option("Rank of the factors.", o.HOW, "R", kind=int)] = 16,
    force: o.Force = False,
    arch: o.Arch = None,
    allow_pickle: o.AllowPickle = False,
    dequantise: o.Dequantise = False,
    progress: Progress | None = None,
) -> ExtractResult:
    """Write what a fine-tune adds to its base as a PEFT adapter.

    Every weight of a linear layer that changed becomes factors B A, the best of that rank (singular value
    decomposition of the difference in float64; Eckart and Young 1936), α = r. What else changed (norms, embeddings)
    lies in the adapter whole, as ``modules_to_save``.

    Args:
        model: the fine-tune, or an adapter on its base.
        base: what it was fine-tuned from, in the same order of neurons.
        output: a new folder.
        rank: of the factors.
        arch: the base's architecture, where the files do not say.

    Raises:
        MergeidError: the two do not fit, nothing changed, or the output cannot be written; nothing was written.
    """
    from mergeid.combine.refusals import not_finite
    from mergeid.combine.tensor_plan import plan_tensors
    from mergeid.io.output import check_output
    from mergeid.models.adapter_modules import Anatomy, module_of

    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise MergeidError(f"--rank is {rank!r}; expected a whole number from 1")
    tuned, origin = (open_checkpoint(m, allow_pickle=allow_pickle, dequantise=dequantise) for m in (model, base))
    inputs = [p for c in (tuned, origin) if c.files for p in (c.path, *c.files)]
    target = check_output(output, inputs=inputs, force=force)
    if target.suffix == ".safetensors":
        raise MergeidError(f"{target} would be one file; expected a folder for the adapter (option -o)")
    merged = plan_tensors(origin, tuned).merged
    network = Anatomy.of(origin, arch)
    result = ExtractResult(rank)
    tensors: dict[str, Tensor] = {}
    factored: set[str] = set()
    whole: dict[str, str] = {}
    lost = size = 0.0
    for done, name in enumerate(merged):
        for checkpoint in (tuned, origin):
            value = checkpoint.tensor(name)
            if not bool(value.isfinite().all()):
                raise MergeidError(not_finite(name, checkpoint, nan=bool(value.isnan().any()), skips=False))
        delta = tuned.tensor(name).double() - origin.tensor(name).double()
        if bool(delta.any()):
            key = network.key_of(name)
            if key in network.linear:
                factors, missed, all_of_it = _truncated(delta.T if network.transposed else delta, rank)
                module = module_of(key)
                tensors |= {f"{_PREFIX}{module}.lora_{k}.weight": f.float() for k, f in factors.items()}
                factored.add(module)
                result.errors[name] = (missed / all_of_it) ** 0.5
                lost, size = lost + missed, size + all_of_it
            else:
                whole[key] = name
        for checkpoint in (tuned, origin):
            checkpoint.release(name)
        if progress is not None:
            progress("decomposing", done + 1, len(merged))
    if not factored:
        raise MergeidError(_nothing_factored(tuned, origin, list(whole.values())))
    result.whole = list(whole.values())
    result.error = (lost / size) ** 0.5 if size else 0.0
    biased = [key for key in whole if module_of(key) in factored]
    for key in biased:  # of layers with factors, which PEFT wraps
        tensors[f"{_PREFIX}{module_of(key)}.base_layer.{key.rpartition('.')[2]}"] = tuned.tensor(whole[key]).clone()
    rest = [key for key in whole if key not in biased]
    # PEFT replaces modules one by one, and would leave a tied head the base's embedding
    saved = network.saved([*rest, *(k for key in rest for k in network.tied[key])], factored)
    for key in network.entries:
        if any(key.startswith(f"{module}.") for module in saved):
            tensors[f"{_PREFIX}{key}"] = tuned.tensor(network.name_of(key)).clone()
    ranks = {m: len(tensors[f"{_PREFIX}{m}.lora_A.weight"]) for m in sorted(factored)}
    lower = {_pattern(m, ranks): r for m, r in ranks.items() if r != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(origin.path.absolute()),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "lora_only" if biased else "none",
        "fan_in_fan_out": network.transposed,
        "target_modules": network.targets(factored),
        "modules_to_save": saved or None,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "inference_mode": True,
        "task_type": None,
    }
    result.files = _write(target, tensors, config, force)
    return result


def _pattern(module: str, others: Iterable[str]) -> str:
    """What PEFT takes for this module alone: a plain name stands for every module whose name ends so, too."""
    return f"^{module}" if any(other.endswith(f".{module}") for other in others) else module


def _truncated(delta: Tensor, rank: int) -> tuple[dict[str, Tensor], float, float]:
    """Factors A [r, in] and B [out, r] of the best approximation; the squared norm of what it misses, and of all."""
    import torch

    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    factors = {"A": (root[:, None] * v[:kept]).contiguous(), "B": (u[:, :kept] * root).contiguous()}
    return factors, float(s[kept:].square().sum()), float(s.square().sum())


def _nothing_factored(tuned: Checkpoint, origin: Checkpoint, whole: list[str]) -> str:
    if not whole:
        return f"{tuned.source} and {origin.source} hold the same weights; there is nothing to extract"
    more = f" and {len(whole) - 1} more" if len(whole) > 1 else ""
    return (
        f"{whole[0]}{more} changed between {origin.source} and {tuned.source}, and no weight of a linear layer did, so "
        "there is nothing that an adapter factors; keep the fine-tune itself"
    )


def _write(target: Path, tensors: dict[str, Tensor], config: dict[str, Any], force: bool) -> list[Path]:
    """Both files of an adapter, whole or not at all."""
    from mergeid.basics.reading import json_text
    from mergeid.io.stream import CheckpointWriter

    weights = Checkpoint.from_tensors(tensors, source="the adapter")
    files = {ADAPTER_CONFIG: json_text(config) + "\n"}
    place = Output(target, force=force)
    writer = CheckpointWriter(place, like=weights, name="adapter_model.safetensors", replace=files)
    with writer:
        for name in writer.order():
            writer.write(name, _pieces(tensors[name]))
    return writer.paths()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor.contiguous()
