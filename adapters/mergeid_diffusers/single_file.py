"""Single files in the names of the tools that trained them (ComfyUI's, Stability's, Black Forest Labs').

diffusers converts such a file when it loads it: tensors are renamed, split, reshaped. A network that keeps the file's
own parameters, and converts them whenever it runs, is traced like any other, so that what moves with what is found in
the file's names, and the output has them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mergeid.plugins import MergeidError, TensorTable

if TYPE_CHECKING:
    from torch import Tensor

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
