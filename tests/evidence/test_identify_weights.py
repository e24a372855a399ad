"""Decisions from weights alone, where spaces lie in several others."""

from __future__ import annotations

import pytest
import torch

import mergeid
from mergeid.evidence.decide_weights import decide_from_weights
from mergeid.matchers.weight import WeightSimilarity


@pytest.fixture(scope="module")
def llama():
    """(seed -> a Llama of one layer with grouped queries, its neuron graph): the neurons inside its heads lie in query
    heads and in value neurons, both of which lie in the groups."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16,
        use_cache=False,
    )

    def net(seed: int):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return transformers.LlamaForCausalLM(config).eval()

    return net, mergeid.graph(net(0))


@pytest.mark.parametrize("seed", range(12))
def test_the_decided_element_is_one_of_the_group(llama, seed):
    """Also where heads stay and what lies in them was fitted as if they had moved (seeds 0 and 10 of these)."""
    net, graph = llama
    assert any(len(s.parents) > 1 for s in graph.spaces)
    similarity = WeightSimilarity(graph, net(seed).state_dict(), net(seed + 100).state_dict())
    decided = decide_from_weights(similarity, generator=torch.Generator().manual_seed(0))
    assert graph.contains(decided.element)
