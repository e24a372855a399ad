"""What mergeid writes is what its published schemas say, judged by the jsonschema library and by pydantic."""

from __future__ import annotations

import json
from dataclasses import fields

import jsonschema
import pytest
import timm
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import mergeid
from mergeid.evidence.anchored import Certificate
from mergeid.evidence.decide import SpaceEvidence
from mergeid.evidence.layers import LayerRecord, ModelRecord
from mergeid.io.written import PlanCertificate, PlanLayer, PlanMargins, PlanSpace, RecordFile, published
from mergeid.neuron_graph.exchange import written
from mergeid.nn import asymmetrise, fold_file
from mergeid.prediction.sketch import IN_JSON

SCHEMAS = published()


def check(kind: str, content: object) -> None:
    jsonschema.Draft202012Validator(SCHEMAS[kind]).validate(content)
    if kind == "record":
        TypeAdapter(RecordFile).validate_python(content)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models, and inputs for them."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), folder / f"{name}.safetensors")
    save_file({"x": torch.randn(16, 3, 32, 32)}, folder / "data.safetensors")
    return folder


def record(folder) -> dict:
    return json.loads((folder / "mergeid.json").read_text())


def test_the_schemas_are_schemas():
    assert list(SCHEMAS) == ["recipe", "graph", "plan", "sketch", "record", "barrier-points"]
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
        json.dumps(schema, allow_nan=False)


@pytest.mark.parametrize(
    ("model", "kind"),
    [(PlanSpace, SpaceEvidence), (PlanLayer, LayerRecord), (PlanMargins, ModelRecord), (PlanCertificate, Certificate)],
)
def test_no_field_is_forgotten(model, kind):
    assert set(model.model_fields) == {f.name for f in fields(kind)}


@pytest.mark.parametrize(
    "how",
    [
        {"match": "never"},
        {"data": "data.safetensors", "refuse_above": float("inf"), "force": True},
        {"method": "ties", "base": "a.safetensors", "parameters": {"density": 0.5}},
    ],
)
def test_merges(files, tmp_path, how):
    how = {k: str(files / v) if k in ("data", "base") else v for k, v in how.items()}
    a, b = str(files / "a.safetensors"), str(files / "b.safetensors")
    mergeid.merge(a, b, arch="test_resnet", output=tmp_path / "m.safetensors", **how)
    check("record", record(tmp_path))
    wrong = {**record(tmp_path), "inputs": []}
    with pytest.raises(jsonschema.ValidationError):
        check("record", wrong)
    with pytest.raises(ValidationError):
        TypeAdapter(RecordFile).validate_python({**record(tmp_path), "unheard_of": 1})


def test_aligned_and_scrambled(files, tmp_path):
    a, b = str(files / "a.safetensors"), str(files / "b.safetensors")
    (tmp_path / "s").mkdir(), (tmp_path / "t").mkdir()
    mergeid.scramble(a, output=tmp_path / "s" / "m.safetensors", arch="test_resnet")
    check("record", record(tmp_path / "s"))
    mergeid.align(a, b, output=tmp_path / "t" / "m.safetensors", arch="test_resnet", match="always")
    check("record", record(tmp_path / "t"))
    check("plan", record(tmp_path / "t")["align"])


def test_graphs_and_sketches(files, tmp_path):
    a = str(files / "a.safetensors")
    graph = mergeid.graph(a, arch="test_resnet")
    check("graph", json.loads(json.dumps(written(graph), allow_nan=False)))
    found = mergeid.sketch(a, data=str(files / "data.safetensors"), arch="test_resnet", output=tmp_path / "a.sketch")
    with safe_open(tmp_path / "a.sketch", "pt") as file:
        told = dict(file.metadata())
    assert told.pop("format").startswith("mergeid.sketch/") and found is not None
    check("sketch", {k: json.loads(v) if k in IN_JSON else v for k, v in told.items()})


class Anchored(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_plans_with_structure(tmp_path):
    nets = [Anchored(0), Anchored(1)]
    for net in nets:
        asymmetrise(net, "w", generator=torch.Generator().manual_seed(7))
    x = torch.randn(40, 8)
    for data in (None, [{"arg0": row} for row in x]):
        made = mergeid.plan(*nets, data=data, example_inputs=x[:2])
        told = json.loads(json.dumps(made.to_json(), allow_nan=False))
        assert any(space["certificate"] for space in told["spaces"])
        check("plan", told)
    save_file(nets[0].state_dict(), tmp_path / "a.safetensors")
    fold_file(tmp_path / "a.safetensors", tmp_path / "plain.safetensors")
    check("record", record(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: 0.3}}]",
        "merge_method: ties\nbase_model: c\nmodels: [{model: a, parameters: {density: [0.1, 0.9]}}]\ndtype: bfloat16",
        "merge_method: slerp\nmodels: [{model: a}]\nparameters: {t: [{filter: mlp, value: 0.2}, {value: 1e-5}]}",
    ],
)
def test_recipes(text):
    check("recipe", yaml.safe_load(text))
    with pytest.raises(jsonschema.ValidationError):
        check("recipe", {**yaml.safe_load(text), "merge_methd": "linear"})
