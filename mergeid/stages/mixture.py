"""Mixture: dense models as the experts of one, and the routers that choose among them (as mergekit-moe makes them)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.combine.apply import Inputs
from mergeid.combine.refusals import not_finite, overflows
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import Derived, Formed, derived
from mergeid.io.dtypes import FLOATS, dtype_name, torch_dtype
from mergeid.io.tensors import TensorSource
from mergeid.plugins import MakesMixtures, Mixture, MixtureRequest, TensorInfo, adapter_names, get_adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergeid.models.loaded import Loaded

RANDOM, PROMPTED = ("random", "uniform_random"), ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
GATES = (*PROMPTED, *RANDOM)
SMALLEST = 1e-8


@dataclass(frozen=True)
class Expert:
    """One model of a mixture.

    Attributes:
        source: file, folder or hub id.
        positive, negative: prompts that it is for, and that it is not for.
        residual_scale: factor of what it adds to the residual stream.
        noise_scale: standard deviation of normal noise that is added to its weights.
    """

    source: str | os.PathLike[str]
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    residual_scale: float = 1.0
    noise_scale: float = 0.0


def mixture_of(base: TensorSource, asked: MixtureRequest) -> tuple[MakesMixtures, Mixture]:
    """What the mixture of models like the base is. Raises `MergeidError` where none can be made."""
    for name in adapter_names():
        adapter = get_adapter(name)
        if isinstance(adapter, MakesMixtures) and base.config is not None:
            found = adapter.mixture(base.config, list(base.table), asked)
            if found is not None:
                return adapter, found
    kind = (base.config or {}).get("model_type", "no config.json")
    raise MergeidError(
        f"no known mixture of experts has the layers of {base.source} ({kind}); expected decoders for which "
        f"transformers has a mixture of experts"
    )


def mixed(
    made: Mixture,
    inputs: Inputs,
    gates: Mapping[str, Tensor],
    experts: Sequence[Expert],
    draws: Callable[[str], torch.Generator],
    dtype: str | None = None,
) -> Derived:
    """The mixture as a checkpoint that is formed when it is written.

    Args:
        inputs: the base, then the experts, and how each is brought into the base's order.
        gates: the routers' weights by name, see `routers`.
        experts: in the order of their models; the shared ones last.
        draws: a generator for each tensor by its name, for noise.
        dtype: of the result (``"F32"``); None: as in the base.
    """
    import torch

    base, moved = inputs.models[0], inputs.moved

    def form(place: str, which: int | None, name: str, ends: bool, to: torch.dtype) -> Tensor:
        at = 0 if which is None else which + 1
        value, move = inputs.models[at].tensor(name), moved[at]
        if not bool(value.isfinite().all()):
            raise MergeidError(not_finite(name, inputs.models[at], nan=bool(value.isnan().any()), skips=False))
        value = value if move is None else move(name, value)
        scale = 1.0
        if which is not None:
            scale, noise = experts[which].residual_scale if ends else 1.0, experts[which].noise_scale
            if noise:
                drawn = torch.randn(value.shape, generator=draws(place), dtype=torch.float32)
                value = value.double().add_(drawn, alpha=noise)
            value = value if scale == 1 else value.double() * scale
        found = value.to(to)
        if not bool(found.isfinite().all()):
            raise MergeidError(overflows(place, dtype_name(to), [scale]))
        return found

    formed: dict[str, Formed] = {}
    for place, (which, name, ends) in made.tensors.items():
        info = base.table[name]
        info = TensorInfo(dtype or info.dtype, info.shape) if info.dtype in FLOATS else info
        model = inputs.models[0 if which is None else which + 1]
        make = partial(form, place, which, name, ends, torch_dtype(info.dtype))
        formed[place] = Formed(info, make, ((model, name),), f"{None if which is None else experts[which]} {ends}")
    kind = dtype or base.table[made.embedding].dtype
    zeros = {place: torch.zeros(shape) for place, shape in made.zeros.items()}
    for place, value in {**gates, **zeros}.items():
        make = partial(value.contiguous().to, torch_dtype(kind))
        formed[place] = Formed(TensorInfo(kind, tuple(value.shape)), make, (), "a router")
    told = made.config
    if dtype is not None:
        told = {**told, "dtype" if "dtype" in told else "torch_dtype": str(torch_dtype(dtype)).removeprefix("torch.")}
    return derived(base.source, base, formed, parents=inputs.models, config=told)


def routers(made: Mixture, rows: Sequence[Tensor], experts: int) -> dict[str, Tensor]:
    """The routers' weights by name.

    Args:
        rows: one per layer, [experts, and then the shared ones, width].
        experts: how many are not shared.
    """
    found = {name: row[:experts] for name, row in zip(made.gates, rows, strict=True)}
    if made.shared_gates:
        found |= {name: row[experts:] for name, row in zip(made.shared_gates, rows, strict=True)}
    return found


def random_gates(made: Mixture, mode: str, experts: int, generator: torch.Generator) -> list[Tensor]:
    """Normal numbers, or uniform ones as torch's linear layers begin with."""
    import torch

    shape = (len(made.gates), experts, made.width)
    if mode == "random":
        return list(torch.randn(shape, generator=generator))
    bound = math.sqrt(1 / made.width)
    return list((torch.rand(shape, generator=generator) * 2 - 1) * bound)


def prompted_gates(
    made: Mixture, mode: str, experts: Sequence[Expert], base: Checkpoint, running: Callable[[], tuple[Any, Loaded]]
) -> list[Tensor]:
    """Directions of the prompts in the base's residual stream, of length 1: of what enters each layer at the last token
    ("hidden", "hidden_last") or on average over the tokens ("hidden_avg"), or of the tokens' embeddings, for all layers
    alike ("cheap_embed"). Those of negative prompts are taken away.

    Args:
        running: gives the adapter and the base as a network; called for hidden states only.
    """
    import torch

    tokenizer = _tokenizer(base.tokenizer_folder)
    network = None if mode == "cheap_embed" else running()
    layers = len(made.gates)

    def pointed(texts: Sequence[str]) -> Tensor:
        begin = tokenizer.bos_token or ""
        batch = tokenizer([begin + t for t in texts], return_tensors="pt", padding=True, add_special_tokens=False)
        mask, rows = batch["attention_mask"], base.table[made.embedding].shape[0]
        if int(batch["input_ids"].max()) >= rows:
            raise MergeidError(
                f"the tokenizer of {base.source} has tokens beyond the {rows} rows of its embedding; a prompt has one"
            )
        if network is None:
            table = base.tensor(made.embedding).float()
            total = (table[batch["input_ids"]] * mask[..., None]).sum((0, 1))
            direction: Tensor = (total / total.norm().clamp(min=SMALLEST)).repeat(layers, 1)
            return direction
        adapter, loaded = network
        with torch.no_grad():
            found = torch.stack(adapter.layer_inputs(loaded.model, batch))
        if mode == "hidden_avg":
            found = (found * mask[..., None]).sum(2, keepdim=True) / mask.sum(1)[:, None, None]
        return found[:, :, -1].mean(1)  # padding stands in front

    found = []
    for one in experts:
        vector = pointed(one.positive)
        if one.negative:
            vector = vector - pointed(one.negative)
        found.append(vector / vector.norm(dim=-1, keepdim=True).clamp(min=SMALLEST))
    return list(torch.stack(found, 1))


def _tokenizer(folder: Path) -> Any:
    from mergeid.data.text import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    own = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    tokenizer.pad_token_id = next((i for i in own if i is not None), 0)  # an added one may have no row
    return tokenizer
