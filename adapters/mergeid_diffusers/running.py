"""Networks of diffusers, run: what they take by name, and all that others read of what they return."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mergeid.plugins import Batch, MergeidError, get_adapter, returned_tensors

CONTEXT = (
    "encoder_hid_dim", "caption_channels", "joint_attention_dim", "text_dim", "text_embed_dim", "cap_feat_dim",
    "text_in_dim", "cross_attention_dim",
)  # fmt: skip
"""Fields of configs that may say how wide the text's features are."""
TOKENS = 6
SIDES = (16, 32)


def is_library(network: nn.Module) -> bool:
    """Whether a network is one of diffusers (the others in a pipeline are transformers')."""
    return type(network).__module__.startswith(("diffusers.", "mergeid_diffusers."))


def run(network: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every floating-point tensor that somebody reads. What an autoencoder encodes counts as much as what it decodes:
    other networks work on it."""
    own = getattr(network, "network", network)
    if hasattr(own, "encode") and hasattr(own, "decode") and hasattr(own, "decoder"):
        return _coded(network, inputs)
    accepted = inspect.signature(own.forward).parameters
    more = {"return_dict": True} if "return_dict" in accepted else {}
    return returned_tensors(network(**inputs, **more))


def _coded(network: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    (sample,) = inputs.values()
    encoded = network.encode(sample)
    if hasattr(encoded, "latent_dist"):
        whole = encoded.latent_dist.parameters
        latent = encoded.latent_dist.mode()
    else:
        whole = latent = next(iter(returned_tensors(encoded).values()))
    return {"sample": next(iter(returned_tensors(network.decode(latent)).values())), "latent": whole}


def example_inputs(network: nn.Module, generator: torch.Generator, n: int) -> Batch:
    """A small random batch, of the first layout with which the network runs.

    Raises `MergeidError` where none does."""
    said = ""
    own = getattr(network, "network", network)
    for batch in _candidates(own, generator, n):
        device = next(network.parameters()).device
        try:
            with torch.no_grad():
                run(network, _on(batch, device))
        except Exception as error:  # shapes that do not fit: each network says so in its own way
            said = said or f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            continue
        return batch
    raise MergeidError(
        f"mergeid does not know inputs on which {type(own).__name__} runs ({said}); give it as a live module with "
        "example_inputs, or merge with --match never"
    )


def _on(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _on(v, device) for k, v in batch.items()}
    return [_on(v, device) for v in batch] if isinstance(batch, list) else batch


def _candidates(network: Any, g: torch.Generator, n: int) -> Iterator[Batch]:
    """Batches in every layout that the library knows: images, packed images, videos, sound."""
    config: Mapping[str, Any] = network.config
    accepted = inspect.signature(network.forward).parameters
    main = next((k for k in ("sample", "hidden_states", "latent", "x") if k in accepted), None)
    if main is None:
        return
    channels = _first(config, "in_channels", "input_channels", "in_dim", default=3)
    # Transformers of videos and music say how the time axis lies only in their code: all are tried.
    sides = dict.fromkeys([*SIDES, *([s] if isinstance(s := config.get("sample_size"), int) and s <= 128 else [])])
    widths = list(dict.fromkeys(w for key in CONTEXT for w in _widths(config.get(key)))) or [16]
    for width in widths if "encoder_hidden_states" in accepted else widths[:1]:
        for side in sides:
            for shape in (
                (n, channels, side, side),
                (n, (side // 4) ** 2, channels),
                (n, channels, 1, side, side),
                (n, 1, channels, side, side),
                (n, channels, 9, side, side),
                (n, channels, side),
            ):
                latent = torch.randn(shape, generator=g)
                further = {k: v for k in accepted if (v := _argument(k, config, width, latent, g)) is not None}
                yield {main: latent, **further}


def _argument(name: str, config: Mapping[str, Any], width: int, latent: Tensor, g: torch.Generator) -> Any:
    """What goes in under a name; None: left out."""
    n = latent.shape[0]
    axes = len(config.get("axes_dims_rope") or (0, 0, 0))
    if name in ("timestep", "timesteps", "t"):
        return torch.linspace(0.1, 0.9, n)
    if name == "encoder_hidden_states":
        return torch.randn(n, TOKENS, width, generator=g)
    if name in ("encoder_hidden_states_mask", "encoder_attention_mask"):
        return torch.ones(n, TOKENS, dtype=torch.bool)
    if name == "pooled_projections" and config.get("pooled_projection_dim"):
        return torch.randn(n, int(config["pooled_projection_dim"]), generator=g)
    if name == "guidance" and config.get("guidance_embeds"):
        return torch.full((n,), 3.5)
    if name == "img_ids":
        side = max(int(latent.shape[1] ** 0.5), 1)
        place = torch.arange(latent.shape[1])
        return torch.stack([torch.zeros_like(place), place // side, place % side, *[place * 0] * (axes - 3)], 1).float()
    if name == "txt_ids":
        return torch.zeros(TOKENS, axes)
    if name == "class_labels" and (classes := _first(config, "num_embeds_ada_norm", "num_class_embeds", default=0)):
        return torch.arange(n) % classes
    if name == "added_cond_kwargs":
        return _added(config, n, g)
    if name == "controlnet_cond":
        factor = 2 ** (len(config.get("conditioning_embedding_out_channels") or (1,)) - 1)
        size = int(latent.shape[-1]) * factor
        return torch.randn(n, int(config.get("conditioning_channels", 3)), size, size, generator=g)
    if name == "img_shapes":
        side = max(int(latent.shape[1] ** 0.5), 1)
        return [(1, side, side)] * n
    return None


def _added(config: Mapping[str, Any], n: int, g: torch.Generator) -> dict[str, Any] | None:
    """Conditions that some networks take together."""
    if config.get("addition_embed_type") == "text_time":
        times = 6
        width = int(config["projection_class_embeddings_input_dim"]) - times * int(config["addition_time_embed_dim"])
        return {"text_embeds": torch.randn(n, width, generator=g), "time_ids": torch.rand(n, times, generator=g)}
    return {"resolution": None, "aspect_ratio": None} if "use_additional_conditions" in config else None


def _first(config: Mapping[str, Any], *keys: str, default: int) -> int:
    return next((int(config[k]) for k in keys if isinstance(config.get(k), int)), default)


def _widths(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [v for v in value if isinstance(v, int)]
    return [value] if isinstance(value, int) else []


class Pipeline(nn.Module):
    """The networks of a pipeline beside each other: each gets the inputs under its own name, and none reads another's
    outputs, for how they work together is code of the pipeline."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def forward(self, **inputs: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Name of a network -> what it returns.

        Args:
            inputs: ``{"unet": {"sample": …, "timestep": …}, "vae": {"sample": …}}``.
        """
        found = {}
        for name, network in self.named_children():
            if is_library(network):
                found[name] = run(network, inputs[name])
            else:
                library: Any = get_adapter("transformers")
                found[name] = dict(library.outputs(network, inputs[name]))
        return found
