"""A PEFT adapter laid on its base: a model whose tensors are formed from the base's and the factors, one at a time.

LoRA: W + (α/r) B A (Hu et al. 2021, arXiv:2106.09685); rsLoRA: α/√r (Kalajdzievski 2023, arXiv:2312.03732); DoRA:
m · V / ‖V‖ with V = W + (α/r) B A, norms per output (Liu et al. 2024, arXiv:2402.09353). (IA)³: rows of W and its bias,
or columns of W in feed-forward layers, times a vector (Liu et al. 2022, arXiv:2205.05638). All is computed in float64
for weights of 32 bits and in float32 for those of 16, and rounded once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.basics.reading import read_table
from mergeid.errors import MergeidError, shown
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import Derived, Formed, derived, read_from
from mergeid.io.ia3_forming import feedforward_of, scaled, scales_inputs
from mergeid.io.lora_checks import finite, misfit
from mergeid.io.lora_heads import as_trained, tokenizer_beside
from mergeid.io.lora_places import Places, base_ties
from mergeid.io.tensors import TensorSource

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(.*)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector|ia3_l)(?:\.(weight|bias))?$")
_WRAPPERS = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
"""What PEFT puts into the names of modules that it saves whole or wraps."""


_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings that change the base too."""
_NOT_ADDED = (
    "layer_replication", "target_parameters", "trainable_token_indices", "lora_bias", "alora_invocation_tokens",
    "arrow_config", "kasa_config", "monteclora_config", "use_bdlora",
)  # fmt: skip
"""Settings of PEFT under which the weights are not the base's plus a product of factors."""


@dataclass(frozen=True)
class LoraConfig:
    """What ``adapter_config.json`` says that matters for the weights.

    Attributes:
        alpha: α.
        alphas: pattern of module names -> α of those.
        rank_stabilised: α/√r instead of α/r.
        transposed: whether the base's weights are stored [in, out] (``fan_in_fan_out``).
        base: the base model as its trainer named it.
        task: what PEFT calls its task, or the class that it was trained in.
        feedforward: pattern of names, or ends of names, of the modules whose inputs (IA)³ scales.
    """

    alpha: float
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    transposed: bool = False
    base: str | None = None
    task: str | None = None
    feedforward: str | tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> LoraConfig:
        """Raises `MergeidError` for an adapter of another kind than LoRA or (IA)³, or one that lacks what is needed."""
        told = read_table(path, "the config of a PEFT adapter")
        kind = told.get("peft_type")
        if kind not in ("LORA", "IA3"):
            raise MergeidError(
                f"{path.parent} is a PEFT adapter of type {shown(kind)}; expected LORA or IA3: merge it with PEFT first"
            )
        start = told.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_FROM_BASE):
            raise MergeidError(
                f"{path.parent} began with parts taken out of its base (init_lora_weights {shown(start)}), which it "
                "does not hold; merge the adapter with PEFT first, or convert it there to a plain one"
            )
        for key in (k for k in _NOT_ADDED if told.get(k)):
            raise MergeidError(
                f"{path.parent} has {key}, which is more than an update of weights; merge the adapter with PEFT first"
            )
        alpha: Any
        alpha, alphas = told.get("lora_alpha"), told.get("alpha_pattern") or {}
        alpha = 1.0 if kind == "IA3" else alpha
        if not _number(alpha) or not isinstance(alphas, dict) or not all(map(_number, alphas.values())):
            told_of = f"lora_alpha is {shown(alpha)} and alpha_pattern {shown(alphas)}"
            raise MergeidError(f"{path}: {told_of}; expected numbers")
        for pattern in alphas:
            try:
                _named(pattern)
            except re.error as error:
                raise MergeidError(
                    f"{path}: alpha_pattern {shown(pattern)} is no pattern ({error}); expected names of modules"
                ) from None
        base, task = told.get("base_model_name_or_path"), told.get("task_type")
        trained = told.get("auto_mapping")
        if task is None and isinstance(trained, dict):
            task = trained.get("base_model_class")
        return cls(
            float(alpha),
            {k: float(v) for k, v in alphas.items()},
            bool(told.get("use_rslora")),
            bool(told.get("fan_in_fan_out")),
            base if isinstance(base, str) and base else None,
            task if isinstance(task, str) else None,
            feedforward_of(path, told.get("feedforward_modules")),
        )

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B A in that module."""
        alpha = next((a for p, a in self.alphas.items() if _named(p).match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True)
class Factors:
    """What an adapter has of one module.

    Attributes:
        a, b: the factors [r, in, …] and [out, r, …].
        scaling: of their product.
        magnitude: DoRA's, one per output.
        transposed: whether the base's weight is stored [in, out].
        embedding: whether it is an embedding [tokens, features], whose factors are [r, tokens] and [features, r].
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    transposed: bool = False
    embedding: bool = False

    def update(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """The scaled product in the shape of the weight.

        Raises:
            ValueError: it has another shape.
        """
        import torch

        a, b = self.a.to(dtype), self.b.to(dtype)
        product = torch.einsum("or,r...->o...", b.reshape(b.shape[0], b.shape[1]), a)
        if self.embedding or self.transposed:
            product = product.transpose(0, 1)
        if tuple(product.shape) != shape:
            raise ValueError(f"{tuple(product.shape)}")
        return product * self.scaling

    def on(self, weight: Tensor) -> Tensor:
        """The weight with the update, in its own dtype. Raises ValueError where shapes do not fit."""
        import torch

        wide = torch.float64 if weight.dtype.itemsize >= 4 else torch.float32
        found = weight.to(wide) + self.update(tuple(weight.shape), wide)
        if self.magnitude is not None:
            axis = 1 if self.transposed else 0
            others = [d for d in range(found.dim()) if d != axis]
            norm = torch.linalg.vector_norm(found, dim=others, keepdim=True)
            found = found * (self.magnitude.to(wide).reshape(norm.shape) / norm)
        return found.to(weight.dtype)


def laid_on(base: Checkpoint, adapter: Checkpoint, told: LoraConfig) -> Derived:
    """The base with an adapter.

    Args:
        adapter: its factors, as they lie in its folder.
        told: its config.

    Raises:
        MergeidError: factors that miss their partner, modules that the base does not have, other shapes.
    """
    folder = adapter.path.parent
    factors: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in adapter.table:
        short = name.removeprefix(_PREFIX)
        match = _FACTOR.match(short)
        if match is None:
            if ".original_module." not in short:  # what PEFT keeps to be able to go back
                _put_once(whole, _WRAPPERS.sub("", short), name, adapter)
        elif match[3] == "bias":
            raise MergeidError(f"{folder}: {name} is a bias of a LoRA factor; merge the adapter with PEFT first")
        else:
            _put_once(factors.setdefault(match[1], {}), match[2], name, adapter)
    copies = [short for short, name in whole.items() if _tied_copy(short, name, whole, adapter, base)]
    replaced = {short: name for short, name in whole.items() if short not in copies}
    origin, base = base, as_trained(base, adapter, replaced, told.task)
    places = Places(base, folder)
    if base_ties(base):
        places = Places(places.untied([*replaced, *(f"{module}.weight" for module in factors)], copies), folder)
    under = places.base
    formed = {name: read_from(under, name) for name in under.table}
    held: dict[str, str] = {}
    for short, name in replaced.items():
        target = places.of(short)
        _put_once(held, target, name, adapter)
        if adapter.table[name].shape != under.table[target].shape:
            raise misfit(folder, name, adapter.table[name].shape, base, target)
        formed[target] = _replaced(adapter, name, under, target)
    done: dict[str, str] = {}
    for module, parts in factors.items():
        target = places.of(f"{module}.weight")
        if target in done:
            raise MergeidError(
                f"{folder} has two updates of {target}, under {done[target]} and {module}; expected one: save the "
                "adapter again with PEFT"
            )
        done[target] = module
        if (vector := parts.get("ia3_l")) is not None:
            inputs = scales_inputs(told.feedforward, module)
            formed |= scaled(formed, under, target, adapter, vector, inputs=inputs, transposed=told.transposed)
            continue
        formed[target] = _formed(formed[target], under, target, adapter, module, parts, told)
    config = under.config if under.config_changed else None
    found = derived(os.fspath(folder), base, formed, parents=[origin, adapter], config=config)
    return replace(found, adapter=True, tokenizer=tokenizer_beside(base, folder) or found.tokenizer)


def _put_once(held: dict[str, str], place: str, name: str, adapter: TensorSource) -> None:
    """Raises `MergeidError` where two of an adapter's tensors are for one place and differ."""
    import torch

    other = held.setdefault(place, name)
    if other == name:
        return
    same = adapter.table[other] == adapter.table[name]
    if not (same and torch.equal(adapter.tensor(other), adapter.tensor(name))):
        raise MergeidError(
            f"{adapter.file_of[name]} holds one tensor twice, as {other} and {name}; expected one of them: remove the "
            "other, or save the adapter again with PEFT"
        )


def _formed(
    under: Formed,
    base: TensorSource,
    target: str,
    adapter: TensorSource,
    module: str,
    parts: Mapping[str, str],
    told: LoraConfig,
) -> Formed:
    """A weight with its update; `under` is what it is added to."""
    embedding = "lora_embedding_A" in parts
    pair = [parts.get(f"lora_{'embedding_' if embedding else ''}{side}") for side in "AB"]
    if None in pair:
        raise MergeidError(f"{adapter.source}: {module} has only one of its two factors ({', '.join(parts.values())})")
    first, second = (str(name) for name in pair)
    magnitude = parts.get("lora_magnitude_vector")
    if embedding and magnitude is not None:
        raise MergeidError(f"{adapter.source} has DoRA on the embedding {module}; merge the adapter with PEFT first")
    shapes = [adapter.table[name].shape for name in (first, second)]
    shape = base.table[target].shape
    transposed = told.transposed and not embedding and len(shape) == 2
    if not _fits(shapes[0], shapes[1], shape, embedding or transposed):
        raise misfit(adapter.file_of[first], first, shapes[0], base, target)
    if magnitude is not None and math.prod(adapter.table[magnitude].shape) != shape[1 if transposed else 0]:
        raise misfit(adapter.file_of[magnitude], magnitude, adapter.table[magnitude].shape, base, target)
    scaling = told.scaling(module, shapes[0][0])

    def form() -> Tensor:
        a, b, *more = (finite(adapter, name) for name in (first, second, magnitude) if name is not None)
        found = Factors(a, b, scaling, more[0] if more else None, transposed, embedding)
        weight = under.form()
        changed = found.on(weight)
        if bool(weight.isfinite().all()) and not bool(changed.isfinite().all()):
            raise MergeidError(
                f"{target} of {base.source} is not finite with {adapter.file_of[first]} on it (B A times {scaling:g}); "
                "expected an adapter whose update has the size of weights"
            )
        return changed

    reads = tuple((adapter, name) for name in (first, second, magnitude) if name is not None)
    how = f"{under.how}, LoRA times {scaling}, transposed {transposed}, embedding {embedding}, DoRA {magnitude}"
    return Formed(under.info, form, (*under.reads, *reads), how)


def _fits(a: tuple[int, ...], b: tuple[int, ...], weight: tuple[int, ...], swapped: bool) -> bool:
    if min(len(a), len(b)) < 2 or a[0] < 1:
        return False
    product = (b[0], *a[1:])
    if swapped:
        product = (product[1], product[0], *product[2:])
    return b[1] == a[0] and math.prod(b[2:]) == 1 and product == tuple(weight)


def _named(pattern: str) -> re.Pattern[str]:
    """Matches the modules that PEFT means."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _tied_copy(short: str, name: str, whole: Mapping[str, str], adapter: TensorSource, base: TensorSource) -> bool:
    """Whether a whole tensor is that of a head which the base ties to its embedding, and says the same as it."""
    import torch

    if short in base.table or not base_ties(base):
        return False
    shape = adapter.table[name].shape
    alike = [n for s, n in whole.items() if s in base.table and adapter.table[n].shape == shape]
    return any(torch.equal(adapter.tensor(name), adapter.tensor(n)) for n in alike)


def _replaced(adapter: TensorSource, name: str, base: TensorSource, target: str) -> Formed:
    """A tensor that the adapter holds whole, in the base's dtype."""
    from mergeid.io.dtypes import torch_dtype

    dtype = torch_dtype(base.table[target].dtype)
    return Formed(base.table[target], lambda: finite(adapter, name).to(dtype), ((adapter, name),), "whole")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def shared_base(models: Sequence[Checkpoint]) -> Checkpoint | None:
    """The base that all are adapters on, or are themselves, so that neurons correspond by themselves; None: none."""
    bases = [_base_of(model) for model in models]
    if not any(base is not model for base, model in zip(bases, models, strict=True)):
        return None
    files = {tuple(file.resolve() for file in base.files) for base in bases}
    return bases[0] if len(files) == 1 and bases[0].files else None


def _base_of(model: Checkpoint) -> Checkpoint:
    """What an adapter lies on (adapters on adapters: the lowest)."""
    while isinstance(model, Derived) and model.adapter:
        model = model.parents[0]
    return model
