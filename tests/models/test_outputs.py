"""All that a model returns counts: whatever holds it, no permutation that mergeid calls symmetric may change it."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graph_helpers import disturbed, floats
from torch import Tensor, nn
from torch.distributions import Categorical

import mergeid
from mergeid.basics.nested import mapped, named_tensors
from mergeid.errors import MergeidError

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
Named = namedtuple("Named", "p q")


@dataclass
class Output:
    logits: Tensor
    other: object


class Holder:
    """An object of some library."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self._b = a, [{"x": b}]


class TwoHeads(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.a, self.b = nn.Linear(16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x)
        return self.pack(self.a(h), self.b(h))


PACKED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"a": a, "b": b},
    "deep": lambda a, b: {"classes": a.argmax(-1), "a": a, "deep": ({"b": (None, b)},)},
    "dataclass": lambda a, b: Output(a, {"z": [b]}),
    "named tuple": lambda a, b: Named(a, b),
    "object": Holder,
    "distributions": lambda a, b: [Categorical(logits=a), Categorical(logits=b)],
    "complex": lambda a, b: (a, torch.complex(b, b.flip(-1))),
    "sparse": lambda a, b: (a, b.to_sparse()),
    "scalar beside": lambda a, b: (torch.zeros(()), a.sum(), b),
}


def made(pack: str) -> TwoHeads:
    torch.manual_seed(1)
    return disturbed(TwoHeads(PACKED[pack])).float()


@pytest.mark.parametrize("pack", PACKED)
def test_every_output_is_frozen_and_the_trunk_is_free(pack: str) -> None:
    model = made(pack)
    graph = mergeid.graph(model, X)
    free = {(a.tensor, a.axis) for s in graph.spaces for a in s.axes}
    assert ("b.weight", 0) not in free and ("b.bias", 0) not in free
    assert [s.size for s in graph.spaces if ("trunk.0.weight", 0) in {(a.tensor, a.axis) for a in s.axes}] == [16]
    element = graph.random_element(torch.Generator().manual_seed(2))
    other = made(pack)
    other.load_state_dict(graph.apply_state(element, other.state_dict()))
    with torch.no_grad():
        hidden = model.trunk(X), other.trunk(X)
        torch.testing.assert_close(other.b(hidden[1]), model.b(hidden[0]))
    assert not torch.allclose(hidden[0], hidden[1])


def test_a_caller_may_choose_outputs() -> None:
    model = made("deep")
    graph = mergeid.graph(model, X, outputs=["a"])
    assert {s.size for s in graph.spaces} == {16, 5}  # nobody reads the second head
    assert {s.size for s in mergeid.graph(model, X, outputs=["deep"]).spaces} == {16, 3}
    assert {s.size for s in mergeid.graph(model, X, outputs=["deep", "classes"]).spaces} == {16}
    assert {s.size for s in mergeid.graph(model, X, outputs=["*"]).spaces} == {16}
    with pytest.raises(MergeidError, match=r"outputs names 'c', but the model returns 'classes', 'a', 'deep\.0\.b\.1'"):
        mergeid.graph(model, X, outputs=["c"])


def test_chosen_outputs_reach_the_verbs() -> None:
    a, b = made("dict"), made("dict")
    plan = mergeid.plan(a, b, example_inputs=X, outputs=["a"], match="always")
    assert {s.size for s in plan.graph.spaces} == {16, 5}
    assert {s.size for s in mergeid.plan(a, b, example_inputs=X, match="always").graph.spaces} == {16}
    with pytest.raises(MergeidError, match=r"leave it out"):
        mergeid.load("nowhere", outputs=["a"])


def test_merging_never_moves_the_classes_of_a_further_head() -> None:
    a, c = made("tuple"), disturbed(TwoHeads(PACKED["tuple"]), 5).float()
    for p in c.parameters():
        p.data = p.data[torch.randperm(len(p), generator=torch.Generator().manual_seed(3))]
    aligned = mergeid.align(c, to=a, data=[{"arg0": x} for x in X.repeat(4, 1)], example_inputs=X, match="always")
    moved = TwoHeads(PACKED["tuple"])
    moved.load_state_dict(aligned.state)
    with torch.no_grad():
        for said, was in zip(moved(X), c(X), strict=True):
            torch.testing.assert_close(said, was)


def test_nothing_used_is_an_error() -> None:
    class Idle(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    with pytest.raises(MergeidError, match="Idle on the example inputs used none of its"):
        mergeid.graph(Idle(8, 8), X)


def test_indices_alone_are_no_output() -> None:
    torch.manual_seed(0)
    with pytest.raises(MergeidError, match="returned no floating-point tensor"):
        mergeid.graph(TwoHeads(lambda a, b: (a.argmax(-1), b > 0)), X)


def test_names_of_nested_tensors() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    nest = {"x": [a, (b, 3)], "again": a, "o": Holder(torch.ones(2), b)}
    assert list(named_tensors(nest)) == ["x.0", "x.1.0", "o.a"]
    assert list(named_tensors(a)) == [""]
    circle: list[Any] = [a]
    circle.append(circle)
    assert list(named_tensors(circle)) == ["0"]
    changed = mapped(nest, lambda t: t + 1)
    assert changed["again"] is changed["x"][0] and float(changed["o"]._b[0]["x"]) == 2 and float(b) == 1


@pytest.mark.parametrize("name", ["CLIPModel", "T5Model", "BertModel", "GPT2LMHeadModel"])
def test_transformers_returns(name: str) -> None:
    """Live and by its adapter, with caches on: by-products leave the heads free, what is read stays as it is."""
    import transformers

    configs: dict[str, dict[str, Any]] = {
        "BertModel": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
        "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
        "T5Model": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    }
    sizes = configs.get(name, {})
    if name == "CLIPModel":
        part = {**configs["BertModel"], "num_attention_heads": 2}
        sizes = {
            "text_config": {**part, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 2},
            "vision_config": {**part, "image_size": 16, "patch_size": 8},
            "projection_dim": 12,
        }
    else:
        sizes = {**sizes, "vocab_size": 40}
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = disturbed(kind(kind.config_class(**sizes)))
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any] = {"input_ids": ids}
    if name == "CLIPModel":
        inputs["pixel_values"] = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    if name == "T5Model":
        inputs["decoder_input_ids"] = ids[:, :4]
    for graph in (mergeid.graph(model, inputs), mergeid.graph(model)):
        assert graph.spaces and (graph.share > 0.9 or name in ("BertModel", "T5Model"))  # their streams are read
        other = kind(model.config).double().eval()
        element = graph.random_element(torch.Generator().manual_seed(1))
        other.load_state_dict(graph.apply_state(element, model.state_dict()))
        with torch.no_grad():
            before, after = model(**inputs), other(**inputs)
        for field, value in before.items():
            if isinstance(value, Tensor) and not (name == "GPT2LMHeadModel" and field != "logits"):
                torch.testing.assert_close(after[field], value, msg=lambda m, field=field: f"{field}: {m}")
        assert floats(before["logits_per_image" if name == "CLIPModel" else next(iter(before))])
