"""Mixture: dense models as the experts of one, and the routers that choose among them (as mergekit-moe makes them)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.combine.apply import Inputs
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import Derived, Formed, derived
from mergeid.io.tensors import TensorSource
from mergeid.plugins import MakesMixtures, Mixture, TensorInfo, adapter_names, get_adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergeid.models.loaded import Loaded

RANDOM, PROMPTED = ("random", "uniform_random"), ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
GATES = (*PROMPTED, *RANDOM)
SMALLEST = 1e-8


@dataclass(frozen=True)
class Prompts:
    """What belongs to an expert, and what does not."""

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


def mixture_of(base: TensorSource, experts: int, per_token: int) -> tuple[MakesMixtures, Mixture]:
    """What a mixture of so many models like the base is. Raises `MergeidError` where none is known."""
    for name in adapter_names():
        adapter = get_adapter(name)
        if isinstance(adapter, MakesMixtures) and base.config is not None:
            found = adapter.mixture(base.config, list(base.table), experts, per_token)
            if found is not None:
                return adapter, found
    kind = (base.config or {}).get("model_type", "no config.json")
    raise MergeidError(
        f"no known mixture of experts has the layers of {base.source} ({kind}); expected decoders for which "
        f"transformers has a mixture of experts"
    )


def mixed(made: Mixture, inputs: Inputs, gates: Sequence[Tensor], scales: Sequence[float]) -> Derived:
    """The mixture as a checkpoint that is formed when it is written.

    Args:
        inputs: the base, then the experts, and how each is brought into the base's order.
        gates: one per layer, [experts, width].
        scales: one per expert, of what it adds to the residual stream.
    """
    base, moved = inputs.models[0], inputs.moved

    def form(at: int, name: str, scale: float) -> Tensor:
        value, move = inputs.models[at].tensor(name), moved[at]
        value = value if move is None else move(name, value)
        return value if scale == 1 else (value.double() * scale).to(value.dtype)

    formed: dict[str, Formed] = {}
    for place, (expert, name, ends) in made.tensors.items():
        at = 0 if expert is None else expert + 1
        scale = scales[expert] if expert is not None and ends else 1.0
        formed[place] = Formed(base.table[name], partial(form, at, name, scale), ((inputs.models[at], name),))
    kind = base.table[made.embedding].dtype
    for place, gate in zip(made.gates, gates, strict=True):
        formed[place] = Formed(TensorInfo(kind, tuple(gate.shape)), partial(_as, gate, base, made.embedding), ())
    return derived(base.source, base, formed, parents=inputs.models, config=made.config)


def _as(gate: Tensor, base: TensorSource, name: str) -> Tensor:
    return gate.to(base.tensor(name).dtype)


def random_gates(made: Mixture, mode: str, experts: int, generator: torch.Generator) -> list[Tensor]:
    """Normal numbers, or uniform ones as torch's linear layers begin with."""
    import torch

    shape = (len(made.gates), experts, made.width)
    if mode == "random":
        return list(torch.randn(shape, generator=generator))
    bound = math.sqrt(1 / made.width)
    return list((torch.rand(shape, generator=generator) * 2 - 1) * bound)


def prompted_gates(
    made: Mixture, mode: str, prompts: Sequence[Prompts], base: Checkpoint, running: Callable[[], tuple[Any, Loaded]]
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
        mask = batch["attention_mask"]
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
    for one in prompts:
        vector = pointed(one.positive)
        if one.negative:
            vector = vector - pointed(one.negative)
        found.append(vector / vector.norm(dim=-1, keepdim=True).clamp(min=SMALLEST))
    return list(torch.stack(found, 1))


def _tokenizer(folder: Path) -> Any:
    from mergeid.data.text import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0
    return tokenizer
