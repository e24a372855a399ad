"""Make neurons correspond: group elements that align B to A."""

from mergeid.match.activation import activation_matching, combined_matching
from mergeid.match.assignment import TreeAssignment, assign
from mergeid.match.weight import WeightSimilarity, weight_matching

__all__ = [
    "TreeAssignment",
    "WeightSimilarity",
    "activation_matching",
    "assign",
    "combined_matching",
    "weight_matching",
]
