"""Quantised weights as floating-point ones, formed tensor by tensor when they are read.

Known are float8 with scales for a tensor, its rows or blocks of it (DeepSeek's ``weight_scale_inv``,
compressed-tensors' ``weight_scale``, ComfyUI's ``scale_weight``, or none), and bitsandbytes' int8 and 4-bit formats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import Formed, derived, read_from
from mergeid.io.dtypes import INTEGERS, MERGEABLE, parse_dtype, torch_dtype
from mergeid.io.tensors import TensorSource
from mergeid.plugins import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SCALES = ("_scale_inv", "_scale")
"""After the name of a float8 weight; both are factors of what is stored."""
IGNORED = (".weight_format", ".input_scale", ".input_scale_ub", ".output_scale", ".scale_input", "scaled_fp8")
"""Of the activations, or notes of the format."""
STATE = ".quant_state.bitsandbytes__"
_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
QUANTISED = "quantization_config"


def refuse_quantised(checkpoint: TensorSource, names: Sequence[str]) -> None:
    """Raises `MergeidError` for a checkpoint whose tensors of these names are not the weights themselves."""
    settings = (checkpoint.config or {}).get("quantization_config")
    if settings:
        cure = "give --dequantise, or dequantise it first"
        if not (_is_known(checkpoint) or _is_float(checkpoint)):
            cure = "dequantise it with the tool that made it"
        raise MergeidError(
            f"{checkpoint.source} is quantised (quantization_config in its config.json: {_method(settings)}); expected "
            f"float weights: {cure}"
        )
    packed = [n for n in names if checkpoint.table[n].dtype in INTEGERS and _scaled_beside(checkpoint, n)]
    if packed:
        more = f" (and {len(packed) - 1} more)" if len(packed) > 1 else ""
        raise MergeidError(
            f"tensor {packed[0]!r}{more} of {checkpoint.source} holds whole numbers with scales beside it, which are "
            "quantised weights; expected float weights: dequantise it with the tool that made it"
        )
    odd = [n for n in names if checkpoint.table[n].dtype not in (*MERGEABLE, *INTEGERS)]
    odd += [n for n in names if checkpoint.table[n].dtype in INTEGERS and n.endswith("weight")]
    if odd:
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise MergeidError(
            f"tensor {odd[0]!r}{more} of {checkpoint.source} is {checkpoint.table[odd[0]].dtype}, a quantised or "
            "unknown dtype; expected F64, F32, F16 or BF16 weights: give --dequantise, or dequantise it first"
        )


_PACKED = ("packed", "blocks", "data")
"""Endings of the names of packed weights."""
_COUNTED = ("I64", "U64", "BOOL")
"""Dtypes of places and masks, which may have a scale of their own; nobody packs weights into them."""


def _scaled_beside(checkpoint: TensorSource, name: str) -> bool:
    """Whether whole numbers have scales, as packed weights do: weight_packed and weight_scale (vLLM), weight and
    weight_scale (NVFP4), x_blocks and x_scales (MXFP4), _data and _scale (Quanto), W_q and scale (HQQ)."""
    module, dot, last = name.rpartition(".")
    stem, _, kind = last.rpartition("_")
    stems = (last, stem) if kind in _PACKED else (last,)
    scales = [f"{stem}{end}" for stem in stems for end in ("_scale", "_scales")] + ["scale"] * (last == "W_q")
    info = checkpoint.table[name]
    packs = info.dtype not in _COUNTED and len(info.shape) > 1
    return packs and any(f"{module}{dot}{n}" in checkpoint.table for n in scales)


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with floating-point weights; itself where nothing in it is quantised.

    The result has the number format that the config names, else bfloat16, and a config that says nothing of a
    quantisation.

    Raises:
        MergeidError: a format that is not known, or scales that do not fit.
    """
    table, config = checkpoint.table, checkpoint.config or {}
    target = _target(config)
    formed: dict[str, Formed] = {}
    used: set[str] = set()
    scales = {s for n, i in table.items() if i.dtype.startswith("F8_") for s in _scales_of(n) if s in table}
    for name, info in table.items():
        if name in scales:  # which may be float8 themselves
            continue
        state = next((n for n in table if n.startswith(f"{name}{STATE}")), None) if info.dtype == "U8" else None
        if info.dtype.startswith("F8_"):
            scale = next((s for s in _scales_of(name) if s in table), None)
            reads: tuple[str, ...] = (name,) if scale is None else (name, scale)
            form: Callable[[], Tensor] = partial(_scaled, checkpoint, name, scale, target)
            made = TensorInfo(target, info.shape)
        elif info.dtype == "I8" and (rows := f"{name.removesuffix('.weight')}.SCB") in table:
            reads = (name, rows)
            form, made = partial(_int8, checkpoint, name, rows, target), TensorInfo(target, info.shape)
        elif state is not None:
            told = _state(checkpoint, state)
            reads = (name, state, *(f"{name}{end}" for end in _4BIT if f"{name}{end}" in table))
            kind = parse_dtype(str(told.get("dtype", "bfloat16")))
            form, made = partial(_4bit, checkpoint, name, told, kind), TensorInfo(kind, tuple(told["shape"]))
        else:
            continue
        used |= {*reads}
        how = f"dequantised by {config.get(QUANTISED)}"
        formed[name] = Formed(made, form, tuple((checkpoint, n) for n in reads), how)
    if not formed and QUANTISED not in config:
        return checkpoint
    if not formed and not _is_float(checkpoint):
        kind = _method(config[QUANTISED])
        raise MergeidError(
            f"{checkpoint.source} is quantised in a way that --dequantise does not know ({kind}); expected float8 or "
            "bitsandbytes weights: dequantise it with the tool that made it"
        )
    order = [n for n in table if n in formed or not (formed and (n in used or n.endswith(IGNORED)))]
    plain = {k: v for k, v in config.items() if k != QUANTISED}
    every = {n: formed[n] if n in formed else read_from(checkpoint, n) for n in order}
    return derived(checkpoint.source, checkpoint, every, parents=[checkpoint], config=plain if config else None)


def _method(settings: Any) -> str:
    return str(settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings)


def _is_known(checkpoint: TensorSource) -> bool:
    """Whether it has weights in a format that can be read in floating point."""
    table = checkpoint.table
    return any(i.dtype.startswith("F8_") or n.endswith(".SCB") or STATE in n for n, i in table.items())


def _is_float(checkpoint: TensorSource) -> bool:
    """Whether all is in floating point already, and the config speaks of what the model was before: training tools save
    adapters that are merged into a quantised base so."""
    return all(info.dtype in MERGEABLE for info in checkpoint.table.values())


def _target(config: Mapping[str, Any]) -> str:
    stated = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return parse_dtype(stated) if "float" in stated and "8" not in stated else "BF16"


def _scales_of(name: str) -> list[str]:
    stem = name.removesuffix(".weight")
    return [*(f"{name}{end}" for end in SCALES), f"{stem}.scale_weight", f"{stem}.weight_scale"]


def _scaled(checkpoint: TensorSource, name: str, scale: str | None, target: str) -> Tensor:
    """A float8 weight times its scale: one number, one for each row or expert, or one for each block."""
    weight = checkpoint.tensor(name).float()
    if scale is not None:
        factor = checkpoint.tensor(scale).float()
        for axis in range(factor.dim()):
            size, blocks = weight.shape[axis] if axis < weight.dim() else 0, factor.shape[axis]
            if blocks not in (1, size):
                block = _block(checkpoint, axis, size, blocks, name)
                factor = factor.repeat_interleave(block, dim=axis).narrow(axis, 0, size)
        if factor.dim() == 1 and factor.shape[0] == weight.shape[0]:  # of rows, of experts
            factor = factor.reshape(-1, *[1] * (weight.dim() - 1))
        if factor.numel() == 1:
            factor = factor.reshape(())
        elif factor.dim() != weight.dim() or any(
            n not in (1, m) for n, m in zip(factor.shape, weight.shape, strict=True)
        ):
            raise _misfit(checkpoint, scale, name, "the tensor, its rows or its blocks")
        weight = weight * factor
    return weight.to(torch_dtype(target))


def _block(checkpoint: TensorSource, axis: int, size: int, blocks: int, name: str) -> int:
    """Length of a block along an axis, as the config says, else as the sizes say."""
    told = ((checkpoint.config or {}).get(QUANTISED) or {}).get("weight_block_size")
    block = told[axis] if isinstance(told, list) and len(told) > axis else -(-size // blocks) if blocks else 0
    if not isinstance(block, int) or block < 1 or -(-size // block) != blocks:
        raise MergeidError(
            f"the scales of {name!r} of {checkpoint.source} are {blocks} for {size} numbers; expected one per block"
        )
    return block


def _misfit(checkpoint: TensorSource, scale: str, name: str, of: str) -> MergeidError:
    shapes = [list(checkpoint.table[n].shape) for n in (scale, name)]
    return MergeidError(
        f"{scale} {shapes[0]} does not fit {name} {shapes[1]} of {checkpoint.source}; expected a scale for {of}"
    )


def _int8(checkpoint: TensorSource, name: str, rows: str, target: str) -> Tensor:
    """bitsandbytes' LLM.int8(): each row was scaled so that its largest entry is 127."""
    largest, shape = checkpoint.tensor(rows).float(), checkpoint.table[name].shape
    if largest.dim() != 1 or largest.shape != shape[:1] or len(shape) != 2:
        raise _misfit(checkpoint, rows, name, "each row")
    found = checkpoint.tensor(name).float() * (largest[:, None] / 127)
    return found.to(torch_dtype(target))


def _state(checkpoint: TensorSource, name: str) -> dict[str, Any]:
    """What bitsandbytes writes of a 4-bit tensor: JSON, byte by byte."""
    try:
        found = json.loads(bytes(checkpoint.tensor(name).tolist()))
        shape = found["shape"]
        assert all(isinstance(n, int) and n >= 0 for n in shape) and int(found["blocksize"]) > 0
    except (ValueError, KeyError, TypeError, AssertionError):
        raise MergeidError(f"{name!r} of {checkpoint.source} is not a state written by bitsandbytes") from None
    return dict(found)


def _4bit(checkpoint: TensorSource, name: str, told: Mapping[str, Any], kind: str) -> Tensor:
    """bitsandbytes' nf4 and fp4: codes of a table, two in a byte, times the largest magnitude of each block, which may
    be quantised itself."""
    import torch

    def part(end: str, least: int) -> Tensor:
        if f"{name}{end}" not in checkpoint.table:
            raise MergeidError(f"{name!r} of {checkpoint.source} lacks {name}{end}; copy or download it again")
        found = checkpoint.tensor(f"{name}{end}").reshape(-1)
        if found.numel() < least:
            raise MergeidError(
                f"{name}{end} of {checkpoint.source} has {found.numel()} numbers; expected {least}: copy or download "
                "it again"
            )
        return found

    packed = checkpoint.tensor(name).reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1).long()
    count = math.prod(told["shape"])
    if codes.numel() < count:
        raise MergeidError(f"{name!r} of {checkpoint.source} has fewer numbers than its shape {told['shape']} says")
    largest = part(".absmax", -(-count // int(told["blocksize"])))
    if largest.dtype == torch.uint8:
        size, offset = _nested(checkpoint, name, told)
        inner = part(".nested_absmax", -(-largest.numel() // size)).float().repeat_interleave(size)[: largest.numel()]
        largest = part(".nested_quant_map", 256).float()[largest.long()] * inner + offset
    factors = largest.float().repeat_interleave(int(told["blocksize"]))
    values = part(".quant_map", 16).float()[codes[:count]] * factors[:count]
    return values.reshape(told["shape"]).to(torch_dtype(kind))


def _nested(checkpoint: TensorSource, name: str, told: Mapping[str, Any]) -> tuple[int, float]:
    """Length of the blocks of the magnitudes, and what is added to all of them."""
    size, offset = told.get("nested_blocksize"), told.get("nested_offset")
    if not isinstance(size, int) or size < 1 or not isinstance(offset, (int, float)):
        raise MergeidError(
            f"the state of {name!r} of {checkpoint.source} lacks nested_blocksize or nested_offset, which its "
            "quantised magnitudes need; copy or download it again"
        )
    return size, float(offset)
