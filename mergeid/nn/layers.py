"""Which parameters can be made asymmetric, and along which axis the neurons that they feed lie.

Two sorts: *weights* of linear and convolutional layers, which multiply neurons with neurons, and *tables*, whose rows
are added to a stream as they are: token and position embeddings, class tokens.
"""

from __future__ import annotations

from torch import nn

_AXES: list[tuple[type[nn.Module], dict[str, int]]] = [
    (nn.Linear, {"weight": 0}),
    (nn.Conv1d, {"weight": 0}),
    (nn.Conv2d, {"weight": 0}),
    (nn.Conv3d, {"weight": 0}),
    (nn.Embedding, {"weight": 1}),
    (nn.MultiheadAttention, {"in_proj_weight": 0}),
]


def register_layer(layer: type[nn.Module], axes: dict[str, int]) -> None:
    """Let a further type of layer be converted.

    Args:
        axes: parameter name -> axis of its neurons; all other axes are the neuron's inputs.

    Raises ValueError on a duplicate."""
    if any(layer is known for known, _ in _AXES):
        raise ValueError(f"{layer.__name__} is registered already")
    _AXES.append((layer, axes))


def neuron_axes(module: nn.Module) -> dict[str, int]:
    """Parameter name -> axis of the neurons; empty for a module that is no linear or convolutional layer and no
    embedding."""
    for layer, axes in _AXES:
        if isinstance(module, layer):
            return {n: a for n, a in axes.items() if module._parameters.get(n) is not None}
    weight = module._parameters.get("weight")
    ordinary = getattr(module, "ordinary", type(module))
    if ordinary.__name__ == "Conv1D" and weight is not None and weight.dim() == 2:
        # transformers' linear layer with a transposed weight [inputs, neurons]
        return {"weight": 1}
    return {}


def bare_tables(module: nn.Module) -> dict[str, int]:
    """Parameter name -> axis of the neurons, for the tables that a module holds beside its layers: [1, places,
    neurons], as class tokens and learned positions are, broadcast over the batch."""
    if neuron_axes(module):
        return {}
    return {n: 2 for n, p in module._parameters.items() if p is not None and p.dim() == 3 and p.shape[0] == 1}


def is_table(module: nn.Module, name: str) -> bool:
    """Whether the parameter of that name is looked up and added, not multiplied with."""
    return isinstance(module, nn.Embedding) or name in bare_tables(module)
