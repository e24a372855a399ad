"""Complex weights as pairs of real ones, for whatever compares weights: no permutation acts within a pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mergeid.neuron_graph.neuron_graph import NeuronGraph

State = Mapping[str, Tensor]


def in_reals(graph: NeuronGraph, *states: State) -> tuple[NeuronGraph, list[State]]:
    """The graph and states with a last axis of two, real and imaginary part, for every complex tensor. Spaces and their
    axes are those of the graph."""
    names = {k for k, v in states[0].items() if v.is_complex()}
    if not names:
        return graph, list(states)
    shapes = {k: (*shape, 2) if k in names else shape for k, shape in graph.tensors.items()}
    real: list[State] = [{k: torch.view_as_real(v) if k in names else v for k, v in s.items()} for s in states]
    return replace(graph, tensors=shapes), real


def out_of_reals(state: State, like: State) -> dict[str, Tensor]:
    """The state with complex tensors where `like` has them."""
    return {k: torch.view_as_complex(v.contiguous()) if like[k].is_complex() else v for k, v in state.items()}
