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

    Raises:
        MergeidError: the two do not fit, nothing changed, or the output cannot be written; nothing was written.
    """
    from mergeid.combine.tensor_plan import plan_tensors
    from mergeid.io.output import check_output

    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise MergeidError(f"--rank is {rank!r}; expected a whole number from 1")
    tuned, origin = (open_checkpoint(m, allow_pickle=allow_pickle, dequantise=dequantise) for m in (model, base))
    inputs = [p for c in (tuned, origin) if c.files for p in (c.path, *c.files)]
    target = check_output(output, inputs=inputs, force=force)
    if target.suffix == ".safetensors":
        raise MergeidError(f"{target} would be one file; expected a folder for the adapter (option -o)")
    merged = plan_tensors(origin, tuned).merged
    linear, transposed, tied = _linear_weights(origin)
    result = ExtractResult(rank)
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    lost = size = 0.0
    for done, name in enumerate(merged):
        delta = tuned.tensor(name).double() - origin.tensor(name).double()
        if bool(delta.any()):
            module = name.rpartition(".")[0]
            if name in linear:
                flat = delta.T if transposed else delta
                factors, missed, whole = _truncated(flat, rank)
                tensors |= {f"{_PREFIX}{module}.lora_{k}.weight": f.float() for k, f in factors.items()}
                result.errors[name] = (missed / whole) ** 0.5
                lost, size = lost + missed, size + whole
            else:
                result.whole.append(name)
            modules.add(module)
        for checkpoint in (tuned, origin):
            checkpoint.release(name)
        if progress is not None:
            progress("decomposing", done + 1, len(merged))
    if not modules:
        raise MergeidError(f"{tuned.source} and {origin.source} hold the same weights; there is nothing to extract")
    result.error = (lost / size) ** 0.5 if size else 0.0
    factored = {n.removeprefix(_PREFIX).rpartition(".lora_")[0] for n in tensors}
    biased = [n for n in result.whole if n.rpartition(".")[0] in factored]
    for module in {n.rpartition(".")[0] for n in result.whole if n not in biased}:
        for name in (n for n in merged if n.rpartition(".")[0] == module):
            tensors[f"{_PREFIX}{name}"] = tuned.tensor(name).clone()
    for name in biased:  # of layers with factors, which PEFT wraps
        module, _, last = name.rpartition(".")
        tensors[f"{_PREFIX}{module}.base_layer.{last}"] = tuned.tensor(name).clone()
    saved = {n.rpartition(".")[0] for n in result.whole if n not in biased}
    for name in result.whole:  # PEFT replaces modules one by one, and would leave a tied head the base's embedding
        for other in tied.get(name, ()):
            tensors[f"{_PREFIX}{other}"] = tuned.tensor(name).clone()
            saved.add(other.rpartition(".")[0])
    ranks = {m: len(tensors[f"{_PREFIX}{m}.lora_A.weight"]) for m in sorted(factored)}
    lower = {_pattern(m, ranks): r for m, r in ranks.items() if r != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(origin.path.absolute()),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "lora_only" if biased else "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(factored),
        "modules_to_save": sorted(saved) or None,
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


def _linear_weights(model: Checkpoint) -> tuple[set[str], bool, dict[str, list[str]]]:
    """Names of the weights of linear layers; whether those are stored [in, out]; and tensor name -> keys of the network
    that are tied to it and lie in no file."""
    from torch import nn

    from mergeid.io.building import Room, build
    from mergeid.models.architecture import find_architecture
    from mergeid.nn.names import plain_table

    adapter, arch = find_architecture(model)
    network = build(adapter, arch, Room.of(model.table), device="meta")
    names = adapter.tensor_names(arch, network, plain_table(model.table))
    modules = dict(network.named_modules())
    groups: dict[int, list[str]] = {}
    for key, value in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(key)
    alike = {key: group for group in groups.values() for key in group}
    tied: dict[str, list[str]] = {}
    found: dict[str, bool] = {}
    for name, key in names.items():
        tied[name] = [k for k in alike.get(key, ()) if k != key and k not in names.values()]
        module = modules.get(key.rpartition(".")[0])
        # transformers' Conv1D is a linear layer whose weight is [in, out]
        stored = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if key.endswith(".weight") and (isinstance(module, nn.Linear) or stored) and not tied[name]:
            found[name] = stored
    kinds = set(found.values())
    if len(kinds) > 1:  # a head among Conv1D layers: PEFT has one setting for all
        found = {name: stored for name, stored in found.items() if stored}
    return set(found), kinds >= {True}, tied


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
