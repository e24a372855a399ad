"""Single files in the names of the tools that trained them (ComfyUI's, Stability's, Black Forest Labs').

diffusers converts such a file when it loads it: tensors are renamed, split, reshaped. A network that keeps the file's
own parameters, and converts them whenever it runs, is traced like any other, so that what moves with what is found in
the file's names, and the output has them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergeid.plugins import MergeidError, TensorTable

FOREIGN = re.compile(
    r"^(model\.diffusion_model\.|first_stage_model\.|double_blocks\.|single_blocks\.|joint_blocks\.|input_blocks\.|"
    r"output_blocks\.|middle_block\.|encoder\.down\.\d|decoder\.up\.\d|net\.blocks\.|double_stream_blocks\.)"
)
"""Names that diffusers does not give."""


def is_foreign(table: TensorTable) -> bool:
    """Whether a file is in other names than diffusers'."""
    return any(FOREIGN.match(name) for name in table)


def flux_config(table: TensorTable) -> dict[str, Any] | None:
    """The config of a Flux transformer, read off its tensors; None where it is none, or not of the released width."""
    names = {n.removeprefix("model.diffusion_model."): info.shape for n, info in table.items()}
    scale = names.get("double_blocks.0.img_attn.norm.query_norm.scale")
    if scale is None or "vector_in.in_layer.weight" not in names or scale[0] != 128:
        return None

    def count(kind: str) -> int:
        return len({n.split(".")[1] for n in names if n.startswith(kind)})

    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": names["img_in.weight"][1],
        "num_layers": count("double_blocks."),
        "num_single_layers": count("single_blocks."),
        "attention_head_dim": 128,
        "num_attention_heads": names["img_in.weight"][0] // 128,
        "joint_attention_dim": names["txt_in.weight"][1],
        "pooled_projection_dim": names["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in names,
        "axes_dims_rope": [16, 56, 56],
    }


def conversion(kind: str, config: Mapping[str, Any]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """diffusers' own conversion of a file's tensors. Raises `MergeidError` where the class has none."""
    from diffusers.loaders import single_file_model

    known: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES.get(kind)
    if known is None:
        raise MergeidError(
            f"diffusers has no conversion of single files for {kind}; convert the file to diffusers' names, or merge "
            "with --match never"
        )
    function = known["checkpoint_mapping_fn"]

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = function(checkpoint=dict(tensors), config=dict(config))
        return found

    return convert


class SingleFile(nn.Module):
    """A network with the parameters of a file.

    Args:
        network: as diffusers builds it; its own parameters are not used.
        table: the file's tensors.
        convert: the file's tensors -> the network's.
    """

    def __init__(self, network: nn.Module, table: TensorTable, convert: Callable[[Any], dict[str, Tensor]]) -> None:
        super().__init__()
        self._network, self._convert = [network], convert  # in a list: it is no part of the state
        device = next(network.parameters()).device
        for name, info in table.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.register_parameter(leaf, nn.Parameter(torch.randn(info.shape, device=device) * 0.02))
        missing = {n for n, _ in network.named_parameters()} - set(self.converted())
        if missing:
            raise MergeidError(
                f"the file lacks {len(missing)} tensors of {type(network).__name__} (first: {min(missing)}); check "
                "that the config is this file's"
            )

    @property
    def network(self) -> nn.Module:
        """The network that runs."""
        return self._network[0]

    @property
    def config(self) -> Any:
        """As the library's networks have it."""
        return self.network.config

    def converted(self) -> dict[str, Tensor]:
        """The parameters under the network's names."""
        return self._convert(dict(self.named_parameters()))

    def forward(self, *args: object, **kwargs: object) -> Any:
        """As the network's."""
        return functional_call(self.network, self.converted(), args, kwargs)

    def encode(self, sample: Tensor) -> Any:
        """As an autoencoder's."""
        return functional_call(_Part(self.network, "encode"), self._under("network"), (sample,))

    def decode(self, latent: Tensor) -> Any:
        """As an autoencoder's."""
        return functional_call(_Part(self.network, "decode"), self._under("network"), (latent,))

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.{k}": t for k, t in self.converted().items()}

    def _apply(self, fn: Any, recurse: bool = True) -> SingleFile:
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _Part(nn.Module):
    """One method of a network as its forward."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, value: Tensor) -> Any:
        return getattr(self.network, self.method)(value)
