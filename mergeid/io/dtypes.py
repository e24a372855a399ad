"""The number formats of safetensors: names, sizes, and the torch dtype of each. Imports torch only when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeid.errors import MergeidError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype of the safetensors format."""

NUMPY_KINDS: dict[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
}  # fmt: skip
"""How NumPy reads the bytes of each dtype; it has no bfloat16, so those stay integers."""

_TORCH_NAMES: dict[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64",
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that weights are merged in."""

MERGEABLE = (*FLOATS, "C64")
"""What is weighted and added up."""
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Dtypes of buffers that are compared, never averaged."""

_ALIASES = {
    "float64": "F64", "double": "F64", "fp64": "F64",
    "float32": "F32", "float": "F32", "fp32": "F32",
    "float16": "F16", "half": "F16", "fp16": "F16",
    "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip


def parse_dtype(text: str, given: str = "option --dtype") -> str:
    """``"float16"``, ``"fp16"``, ``"half"``, ``"torch.float16"`` or ``"F16"`` -> ``"F16"``.

    Raises:
        MergeidError: not one of the floating-point formats that a merge can be written in.
    """
    name = text.strip().lower().removeprefix("torch.")
    found = _ALIASES.get(name) or (name.upper() if name.upper() in FLOATS else None)
    if found is None:
        raise MergeidError(f"unknown dtype {text!r}; expected one of float64, float32, float16, bfloat16 ({given})")
    return found


def wider(first: str, second: str) -> str:
    """The narrowest float dtype that holds both exactly (F16 and BF16 -> F32)."""
    if first == second:
        return first
    if {first, second} == {"F16", "BF16"}:
        return "F32"
    return first if BITS[first] > BITS[second] else second


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises:
        MergeidError: unknown, sub-byte, or not in the installed torch.
    """
    import torch

    found = getattr(torch, _TORCH_NAMES.get(name, ""), None)
    if found is None:
        raise MergeidError(
            f"dtype {name} cannot be read as a plain tensor (quantised or unknown); "
            "expected float64, float32, float16 or bfloat16 weights: dequantise the checkpoint first"
        )
    answer: torch.dtype = found
    return answer


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype. Raises `MergeidError` where the format has none."""
    text = str(dtype).removeprefix("torch.")
    for name, torch_name in _TORCH_NAMES.items():
        if torch_name == text:
            return name
    raise MergeidError(f"dtype {text} has no place in a safetensors file; expected one of {', '.join(BITS)}")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor in row-major order, without a copy where it lies so already."""
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
