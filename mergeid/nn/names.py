"""How asymmetric layers lie in a state dict or a checkpoint. Names and shapes only, so that torch is not needed.

Beside a trainable parameter ``X.weight`` lie the buffers ``X.weight_fixed`` (F) and, unless it is all ones,
``X.weight_mask`` (D): the layer computes with F + D ⊙ ``X.weight``. The same holds for any other parameter
(``X.bias_fixed``, ``attn.in_proj_weight_fixed``). A σ-asymmetric activation ``X`` keeps its matrix as ``X.gate_fixed``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

FIXED, MASK = "_fixed", "_mask"
GATE = "gate_fixed"

T = TypeVar("T")


def asymmetric_parameters(names: Iterable[str]) -> list[str]:
    """The parameters that have a fixed part, in order."""
    known = dict.fromkeys(names)
    return [n for n in known if n + FIXED in known]


def gates(names: Iterable[str]) -> list[str]:
    """The fixed matrices of σ-asymmetric activations, in order."""
    return [n for n in names if n.rpartition(".")[2] == GATE]


def is_asymmetric(names: Iterable[str]) -> bool:
    """Whether these tensor names (a table, a state dict) are those of a network with asymmetric layers."""
    known = list(names)
    return bool(asymmetric_parameters(known) or gates(known))


def plain_table(table: Mapping[str, T]) -> dict[str, T]:
    """The entries that the ordinary architecture has too: no fixed parts, masks or gates."""
    parameters = asymmetric_parameters(table)
    extra = {p + suffix for p in parameters for suffix in (FIXED, MASK)} | set(gates(table))
    return {n: v for n, v in table.items() if n not in extra}


def stored_keys(table: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, str]:
    """`keys` (checkpoint name -> state dict key) with the fixed parts, masks and gates of the same layers."""
    out = dict(keys)
    for parameter in asymmetric_parameters(table):
        if parameter in keys:
            out |= {parameter + s: keys[parameter] + s for s in (FIXED, MASK) if parameter + s in table}
    # a gate lies beside no parameter that tells its key: wrappers put one prefix before every name
    prefix = next((name.removesuffix(key) for name, key in keys.items() if name.endswith(key)), "")
    return out | {gate: gate.removeprefix(prefix) for gate in gates(table)}
