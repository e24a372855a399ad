"""Plans with the structure of both models beside the evidence: from a base, from stored parts, and where it is absent;
and two neurons that were swapped by hand."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from command_line import mergeid as command
from safetensors.torch import save_file
from tiny_transformers import configs
from torch import Tensor, nn

import mergeid
from mergeid import MergeidError
from mergeid import nn as mnn
from mergeid.models.examples import Examples
from mergeid.models.graph import graph_of
from mergeid.models.loaded import Loaded
from mergeid.neuron_graph import NeuronGraph
from mergeid.reporting.evidence_plot import plot_evidence
from mergeid.request.request import Matching, Run
from mergeid.results.plan import Plan
from mergeid.stages.gather import passes
from mergeid.stages.open import Pair
from mergeid.stages.plan import Structural, make_plan
from mergeid.stages.structure import structure_of
from mergeid.verbs.load import load


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("test_"):
        return timm.create_model(name, num_classes=4).eval()
    config = {k: v for k, v in configs()[name].items() if k not in ("model_type", "architectures")}
    kind = getattr(transformers, name)
    return kind(kind.config_class(**config)).eval()


def tuned(model: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """A copy with every matrix of weights moved by `size` of its standard deviation."""
    other, generator = copy.deepcopy(model), seeded(seed)
    with torch.no_grad():
        for value in other.parameters():
            if value.dim() > 1:
                value.add_(size * value.std() * torch.randn(value.shape, generator=generator))
    return other


def examples(loaded: Loaded, count: int) -> list[dict[str, Tensor]]:
    batch = loaded.adapter.example_inputs(loaded.arch, loaded.model, seeded(3), count)
    return [{k: v[i] for k, v in batch.items() if k != "labels"} for i in range(count)]


def planned(
    a: Loaded, b: Loaded, graph: NeuronGraph, data: Any, base: Any, match: str = "auto", certify: bool = False
) -> Plan:
    structural = Structural(base, certify)
    return make_plan(Pair(a, b, graph), Matching(match), Run(), examples=Examples(data), structural=structural)


NOTHING = {"structure": None, "certificate": None}


@dataclass
class Case:
    base: nn.Module
    a: Loaded
    b: nn.Module
    data: Any
    plan: Plan

    def again(self, b: nn.Module | None = None, **settings: Any) -> Plan:
        told = {"base": self.fixed, "match": "auto", "certify": False, **settings}
        return planned(self.a, load(b or self.b), self.plan.graph, self.data, **told)

    @property
    def fixed(self) -> dict[str, Tensor]:
        return dict(self.base.state_dict())


def case(name: str, count: int, base: bool = True) -> Case:
    model = network(name)
    a, b = load(tuned(model, 1)), tuned(model, 2)
    data = examples(a, count)
    plan = planned(a, load(b), graph_of(a), data, dict(model.state_dict()) if base else None)
    return Case(model, a, b, data, plan)


def permuted(made: Plan, b: nn.Module, element: dict[str, np.ndarray]) -> nn.Module:
    other = copy.deepcopy(b)
    other.load_state_dict(made.graph.apply_state(element, b.state_dict()))
    return other


@pytest.fixture(scope="module")
def bert() -> Case:
    return case("BertForSequenceClassification", 48)


# -- structure beside the evidence --------------------------------------------------------------------------


def check_near(made: Plan) -> None:
    """Two fine-tunes near their base: every layer's numbers are there, and almost every space is identified."""
    said = made.structure
    assert said["computed"] and said["sources"] == ["base"] and said["spaces"] == len(made.spaces) - missing(made)
    assert "stability" in said["left_out"] and not said["certified"]
    shown = json.loads(json.dumps(made.to_json(), allow_nan=False))
    identified = 0
    for space, plain in zip(made.spaces, shown["spaces"], strict=True):
        record = space.structure
        if record is None:
            assert plain["structure"] is None
            continue
        assert plain["structure"]["a"]["margin"] == record.a.margin and len(plain["structure"]["layers"])
        for layer in record.layers:
            assert 0 < layer.k <= layer.inputs and 0 < layer.explained <= 1 and layer.eigengap >= 0
            numbers = (layer.coherence, layer.gamma_out, layer.a.margin, layer.b.margin)
            assert all(map(math.isfinite, numbers)) and layer.a.by_gap is None
            # one direction alone (a token type that never changes) has no pair of inputs to tell apart
            assert layer.gamma_in > 0 and (math.isfinite(layer.gamma_in) or layer.k == 1)
        identified += record.identifiable
    assert identified == said["identifiable"] >= 0.8 * said["spaces"]


def missing(made: Plan) -> int:
    return sum(s.structure is None for s in made.spaces)


def test_two_fine_tunes_of_one_bert(bert: Case) -> None:
    check_near(bert.plan)
    assert {s.decision for s in bert.plan.spaces} == {"direct"}
    # attention heads are made by no layer of their own
    assert all(not s.parents and not any(bert.plan.graph.by_id[s.id].axes) for s in bert.plan.spaces if not s.structure)


def test_two_fine_tunes_of_one_resnet() -> None:
    check_near(case("test_resnet", 32).plan)


def test_no_base_no_structure_and_the_same_decisions(bert: Case) -> None:
    made = bert.again(base=None)
    assert not made.structure["computed"] and "all margins are 0" in made.structure["why"]
    assert missing(made) == len(made.spaces) and made.verdict == bert.plan.verdict
    for one, two in zip(made.to_json()["spaces"], bert.plan.to_json()["spaces"], strict=True):
        assert {**one, **NOTHING} == {**two, **NOTHING}


def test_a_scrambled_model_is_decided_as_without_structure(bert: Case) -> None:
    element = bert.plan.graph.random_element(seeded(5))
    other = permuted(bert.plan, bert.b, element)
    made, plain = bert.again(other), bert.again(other, base=None)
    assert made.verdict == plain.verdict == "match"
    for space, one in zip(made.spaces, plain.spaces, strict=True):
        assert space.decision == one.decision and space.moved == one.moved
        record = space.structure
        if record is not None and space.decision == "match":
            assert record.a.identifiable and not record.b.identifiable
    # what follows in order keeps its margins: its inputs are taken as matched
    for space, one in zip(made.spaces, bert.plan.spaces, strict=True):
        if space.structure and one.structure:
            assert space.structure.a == one.structure.a


def test_certified_radii_on_request(bert: Case) -> None:
    made = bert.again(certify=True)
    assert made.structure["certified"] and not made.structure["left_out"]
    radii = [layer.a.by_norm for s in made.spaces if s.structure for layer in s.structure.layers]
    assert radii and all(r is not None and 0 <= r < math.inf for r in radii) and max(r or 0 for r in radii) > 0


def test_a_base_that_goes_unused_is_told(bert: Case) -> None:
    for settings, why in (({"match": "always"}, "--match auto"), ({"match": "never"}, "--match auto")):
        made = bert.again(**settings)
        assert not made.structure["computed"] and why in made.structure["why"]
        assert any(note.startswith("the base was not used") for note in made.notes)


def test_live_modules_and_a_base_of_another_kind(bert: Case, tmp_path: Path) -> None:
    other = network("LlamaForCausalLM")
    with pytest.raises(MergeidError, match="different architectures"):
        mergeid.plan(bert.a.model, bert.b, base=other, data=None)
    with pytest.raises(MergeidError, match="the base is a live module and the models are paths, or the reverse"):
        mergeid.plan(bert.a.model, bert.b, base=tmp_path / "base", data=None)


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def test_asymmetric_models_need_no_base() -> None:
    a, b, other = mlp(0), mlp(1), mlp(2)
    for model, fixed in ((a, 9), (b, 9), (other, 8)):
        mnn.asymmetrise(model, "w", generator=seeded(fixed))
    x = torch.randn(64, 8, generator=seeded(4))
    data = [{"arg0": row} for row in x]
    made = mergeid.plan(a, b, data=data, example_inputs=x[:2])
    assert made.structure["computed"] and made.structure["sources"] == ["stored"]
    assert missing(made) == 0 and made.structure["spaces"] == 2
    # other fixed parts: nothing is shared, the plan is made all the same
    apart = mergeid.plan(a, other, data=data, example_inputs=x[:2])
    assert missing(apart) == len(apart.spaces)
    assert any("do not store the same" in note for note in apart.notes)


def test_stored_parts_are_compared_in_the_order_they_coincide_in() -> None:
    a, b = mlp(0), mlp(1)
    for model in (a, b):
        mnn.asymmetrise(model, "w", generator=seeded(9))
    x = torch.randn(64, 8, generator=seeded(4))
    graph = mergeid.graph(a, x[:2])
    first, second = graph.spaces
    element = graph.random_element(seeded(5))
    inverse = {k: np.argsort(p) for k, p in element.items()}
    made_a = load(a, example_inputs=x[:2])
    batches = passes(made_a, Examples([{"arg0": row} for row in x]), Run(batch_size=64))

    def records(b: nn.Module, order: dict[str, np.ndarray]) -> tuple[Any, Any, list[str]]:
        pair = Pair(made_a, load(b, example_inputs=x[:2]), graph)
        found = structure_of(pair, order, batches, base=None, certify=False, seed=0)
        return found.records, found.said, found.notes

    found, said, notes = records(b, graph.identity())
    assert len(found) == 2 and said["orders"] == {} and notes == []
    # a space before is matched: the fixed part of the next layer's columns coincides as B lies, and only so
    matched = {first.id: element[first.id], second.id: np.arange(second.size)}
    made, said, notes = records(b, matched)
    assert made == found and not {first.id, second.id} & said["left_out"].keys()
    assert said["orders"] == {second.id: "as it lies"} and "as it lies" in notes[0] and len(notes) == 1
    # B is scrambled, and the decision finds its order again: what is said is what was said before
    scrambled = copy.deepcopy(b)
    scrambled.load_state_dict(graph.apply_state(element, b.state_dict()))
    made, said, notes = records(scrambled, inverse)
    assert made == found and said["orders"] == {first.id: "as decided", second.id: "as decided"}
    # in no order: what is said holds of the models as they lie
    made, said, notes = records(scrambled, graph.identity())
    assert made == {} and said["orders"] == {} and "do not store the same '0.weight_fixed'" in notes[0]


# -- two neurons swapped by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spaces"),
    [
        ("test_resnet", 4),
        ("BertForSequenceClassification", 4),
        ("GPT2LMHeadModel", 4),
        ("LlamaForCausalLM", 3),
        ("test_vit", 3),
        ("test_convnext", 3),
    ],
)
def test_a_swap_by_hand_turns_exactly_that_space(name: str, spaces: int) -> None:
    pair = case(name, 64, base=False)
    graph = pair.plan.graph
    assert {s.decision for s in pair.plan.spaces} == {"direct"}
    free = [s for s in graph.spaces if s.members > 1]
    for at in np.unique(np.linspace(0, len(free) - 1, spaces).astype(int)):
        space = free[at]
        inner = np.arange(space.size)
        inner[[0, space.members - 1]] = inner[[space.members - 1, 0]]
        element = {}
        for s in graph.spaces:
            element[s.id] = inner if s is space else graph.follow(s, element)
        swapped = permuted(pair.plan, pair.b, element)
        made = pair.again(swapped, base=None)
        assert {s.id: s.decision for s in made.spaces} == {
            s.id: "match" if s.id == space.id else "direct" for s in graph.spaces
        }, (space.label, next(s.why for s in made.spaces if s.id == space.id))
        moved = next(s.moved for s in made.spaces if s.id == space.id)
        assert moved == 2 and np.array_equal(made.element[space.id], inner)
    back = pair.again(permuted(pair.plan, swapped, element), base=None)
    assert {s.decision for s in back.spaces} == {"direct"}


# -- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structure")
    model = network("BertForSequenceClassification")
    for name, one in (("base", model), ("a", tuned(model, 1)), ("b", tuned(model, 2))):
        one.save_pretrained(folder / name)
    network("LlamaForCausalLM").save_pretrained(folder / "llama")
    ids = torch.randint(0, 99, (32, 12), generator=seeded(1))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, folder / "data.safetensors")
    return folder


def test_base_plot_and_json(files: Path) -> None:
    done = command("plan", "a", "b", "--base", "base", "--data", "data.safetensors", "--plot", "evidence.svg",
                   "--json", cwd=files)  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.written == ["evidence.svg"]
    result = json.loads(done.stdout)
    assert result["structure"]["computed"] and result["structure"]["sources"] == ["base"]
    margins = [s["structure"]["a"]["margin"] for s in result["spaces"] if s["structure"]]
    assert margins and sum(m > 0 for m in margins) >= 0.8 * len(margins)
    text = (files / "evidence.svg").read_text(encoding="utf-8")
    assert "structural" in text and "chord deviation" in text and "random" in text


def test_certify_and_table(files: Path) -> None:
    done = command("plan", "a", "b", "--base", "base", "--data", "data.safetensors", "--certify", cwd=files,
                   columns=160)  # fmt: skip
    assert done.code == 0, done.stderr
    assert "structure" in done.stdout and "Identified by structure: " in done.stdout
    assert "Left out" not in done.stdout and "ε*/g" in done.stdout and "ε*/‖Σ‖" in done.stdout


def test_bad_base_and_bad_plot(files: Path) -> None:
    done = command("plan", "a", "b", "--base", "llama", "--data", "data.safetensors", cwd=files)
    assert done.code == 2 and done.stdout == "" and len(done.lines) == 1
    assert "different architectures" in done.lines[0] and "llama" in done.lines[0]
    done = command("plan", "a", "b", "--plot", "evidence.pdf", cwd=files)
    assert done.code == 2 and "evidence.pdf" in done.lines[0] and done.written == []


def test_a_plan_without_evidence_has_no_plot(bert: Case, tmp_path: Path) -> None:
    with pytest.raises(MergeidError, match="--match never decides nothing"):
        plot_evidence(bert.again(match="never"), tmp_path / "x.png")
