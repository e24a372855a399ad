"""Make neurons correspond: group elements that align B to A."""

from mergeid.matchers.activation import activation_matching, combined_matching
from mergeid.matchers.assignment import TreeAssignment, assign
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.protocol import (
    JointMatcher,
    Matcher,
    MatchTask,
    Training,
    get_matcher,
    matcher_names,
    register_matcher,
)
from mergeid.matchers.weight import weight_matching

__all__ = [
    "JointMatcher",
    "MatchTask",
    "Matcher",
    "Training",
    "TreeAssignment",
    "WeightSimilarity",
    "activation_matching",
    "assign",
    "combined_matching",
    "get_matcher",
    "matcher_names",
    "register_matcher",
    "weight_matching",
]
