"""What permutes with what: the neuron graph of a model, traced and proven."""

from mergeid.neuron_graph.neuron_graph import AxisMap, Element, NeuronGraph, Space, TapMap

__all__ = ["AxisMap", "Element", "NeuronGraph", "Space", "TapMap"]
