"""Weights that are formed where they are used: any network computes what it computes with weights in memory, has the
same graph, and is never whole in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_transformers import configs
from torch import Tensor, nn

import mergeid
from mergeid.basics import on_demand
from mergeid.basics.on_demand import OnDemand, put_weights
from mergeid.models import load
from mergeid.models.graph import graph_of
from mergeid.models.load import load_model
from mergeid.models.loaded import Loaded
from mergeid.neuron_graph import probe, verify
from mergeid.request.request import Reading, Run

FAMILIES = (
    "BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration", "CLIPModel",
    "ResNetForImageClassification", "Wav2Vec2ForCTC",
)  # fmt: skip
NETWORKS = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet")


def saved(name: str, folder: Path, seed: int = 0) -> Path:
    """A network of random weights in 16 bits."""
    torch.manual_seed(seed)
    if name in NETWORKS:
        path = folder / f"{name}-{seed}.safetensors"
        save_file({k: v.contiguous() for k, v in timm.create_model(name).bfloat16().state_dict().items()}, path)
        return path
    config = {k: v for k, v in configs()[name].items() if k not in ("model_type", "architectures")}
    kind = getattr(transformers, name)
    path = folder / f"{name}-{seed}"
    kind(kind.config_class(**config)).bfloat16().save_pretrained(path)
    return path


def loaded(path: Path, name: str, monkeypatch: pytest.MonkeyPatch, held: bool) -> Loaded:
    monkeypatch.setattr(load, "LARGEST_HELD", 10**12 if held else 0)
    found = load_model(path, Reading(f"timm/{name}" if name in NETWORKS else None), Run())
    assert any(isinstance(p, OnDemand) for p in found.model.parameters()) != held
    return found


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("name", [*NETWORKS, *FAMILIES[:-1]])
def test_on_a_device_bf16_runs_in_bf16(name: str, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library's own model in bf16; "cpu:0" is a device like another."""
    path = saved(name, tmp_path)
    monkeypatch.setattr(Run, "place", property(lambda self: "cpu:0"))
    found = loaded(path, name, monkeypatch, held)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    if name in NETWORKS:
        own: nn.Module = timm.create_model(name).bfloat16()
        own.load_state_dict(load_file(path))
    else:
        own = getattr(transformers, name).from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        inputs = {k: x.bfloat16() if x.is_floating_point() else x for k, x in found.inputs.items()}
        one, other = (found.outputs(m, inputs) for m in (found.model, own.eval()))
    assert one.keys() == other.keys() and one
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        assert torch.equal(value, other[key]) if held else torch.allclose(value.float(), other[key].float(), atol=0.05)


def test_a_file_of_two_formats_runs_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved("test_vit", tmp_path)
    state = load_file(path)
    save_file({**state, "head.bias": state["head.bias"].float()}, path)
    monkeypatch.setattr(Run, "place", property(lambda self: "cpu:0"))
    assert {p.dtype for p in loaded(path, "test_vit", monkeypatch, True).model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", [*NETWORKS, *FAMILIES[:-1]])
def test_a_network_on_demand_is_the_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(name, tmp_path)
    held, formed = (loaded(path, name, monkeypatch, h) for h in (True, False))
    with torch.no_grad():
        outputs = [x.outputs(x.model, held.inputs) for x in (held, formed)]
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(value, outputs[1][key]) for key, value in outputs[0].items())
    one, two = (graph_of(x) for x in (held, formed))
    assert one.to_json()["spaces"] == two.to_json()["spaces"] and one.taps.keys() == two.taps.keys()
    assert two.verified is not None and two.verified["max_relative_error"] < 1e-9
    assert two.verified["error_when_misapplied"] > 1e-3


@pytest.mark.parametrize("name", [*NETWORKS, *FAMILIES])
def test_a_proof_without_a_copy_of_the_matrices(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph, as well proven; the network itself is left as it was."""
    found = loaded(saved(name, tmp_path), name, monkeypatch, True)
    before = {k: v.clone() for k, v in found.state().items()}
    usual = graph_of(found)
    monkeypatch.setattr(probe, "SMALL_NETWORK", 0)
    light = graph_of(found)
    assert light.to_json()["spaces"] == usual.to_json()["spaces"]
    assert light.verified is not None and light.verified["max_relative_error"] < 1e-9
    assert light.verified["error_when_misapplied"] > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in found.state().items())
    assert not any(isinstance(p, OnDemand) for p in found.model.parameters())


def test_a_network_that_needs_its_values_to_be_built_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Wav2Vec2ForCTC"  # weights under parametrisations
    found = loaded(saved(name, tmp_path), name, monkeypatch, True)
    monkeypatch.setattr(load, "LARGEST_HELD", 0)
    again = load_model(tmp_path / f"{name}-0", Reading(), Run())
    with torch.no_grad():
        assert torch.equal(*(x.forward(x.model, found.inputs) for x in (found, again)))


def test_a_wrong_space_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof runs on the real weights, one at a time."""
    from dataclasses import replace

    found = loaded(saved("LlamaForCausalLM", tmp_path), "LlamaForCausalLM", monkeypatch, False)
    graph = graph_of(found)
    stream = max(graph.spaces, key=lambda s: len(s.axes))
    wrong = replace(stream, axes=stream.axes[1:])
    bad = replace(graph, spaces=[wrong if s is stream else s for s in graph.spaces])
    before = found.state()
    proof = verify.verify(bad, found.model, found.inputs, found.outputs, generator=torch.Generator().manual_seed(0))
    assert stream.id in proof.failed
    assert all(torch.equal(value, before[key]) for key, value in found.state().items())


class Mixed(nn.Module):
    """Layers that use their weights in all sorts of ways."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 12)
        self.attend = nn.MultiheadAttention(12, 3, batch_first=True)
        self.turn = nn.LSTM(12, 12, batch_first=True)
        self.deep = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
        self.over = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.head = nn.Linear(12, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x)
        y = y + self.attend(y, y, y)[0] + self.turn(y)[0]
        y = self.deep(y) + self.over(y.transpose(1, 2)).transpose(1, 2)
        return self.head(y @ self.head.weight[:12] * self.words.weight.norm())


@pytest.mark.parametrize("piece", [1 << 22, 64])
def test_every_use_of_a_weight_gets_its_values(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_demand, "PIECE", piece)
    torch.manual_seed(0)
    net = Mixed().eval()
    x = torch.randint(0, 30, (2, 7))
    with torch.no_grad():
        wanted = net(x)
    values = {id(p): p.detach().clone() for p in net.parameters()}
    asked: list[int] = []

    def on(value: Tensor) -> OnDemand:
        def rows(which: slice | Tensor) -> Tensor:
            found = value[which]
            asked.append(found.numel())
            return found

        return OnDemand(rows, value.shape, value.dtype)

    put_weights(net, {k: on(v) for k, v in values.items()})
    assert net.head.weight is net.words.weight
    with torch.no_grad():
        assert torch.allclose(net(x), wanted, rtol=1e-4, atol=1e-4)
        twin = copy.deepcopy(net).double()
        assert twin.head.weight is twin.words.weight and isinstance(twin.words.weight, OnDemand)
        assert torch.allclose(twin(x), wanted.double(), rtol=1e-3, atol=1e-3)
        state = {k: torch.zeros_like(v) for k, v in twin.state_dict().items()}
        twin.load_state_dict(state)
        assert not twin(x).any() and torch.allclose(
            net(x), wanted, rtol=1e-4, atol=1e-4
        )  # a copy has values of its own
    assert max(asked) == max(v.numel() for v in values.values())


def test_rows_in_another_order_are_formed_as_they_are_asked_for() -> None:
    value = torch.randn(6, 5, 4)
    order = {d: torch.randperm(n) for d, n in ((0, 6), (2, 4))}
    moved = OnDemand(lambda which: value[which], value.shape, torch.float64).reordered(order)
    wanted = value.double()[order[0]][:, :, order[2]]
    assert torch.equal(moved.whole(), wanted)
    assert torch.equal(moved[2:5], wanted[2:5]) and torch.equal(moved[:, 1:3], wanted[:, 1:3])
    assert torch.equal(moved.index_select(1, torch.tensor([3, 0])), wanted[:, [3, 0]])
    assert torch.equal(moved.index_select(0, torch.tensor([3, 0])), wanted[[3, 0]])


@pytest.mark.parametrize("name", ["test_convnext", "LlamaForCausalLM"])
def test_scramble_and_align_undo_each_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LARGEST_HELD", 0)
    arch = f"timm/{name}" if name in NETWORKS else None
    a = saved(name, tmp_path)
    end = "" if a.is_dir() else ".safetensors"
    moved = mergeid.scramble(a, output=tmp_path / f"moved{end}", seed=3, arch=arch)
    assert moved.moved_share > 0.9 and moved.max_relative_error < 1e-6
    back = mergeid.align(tmp_path / f"moved{end}", to=a, output=tmp_path / f"back{end}", match="always", arch=arch)
    assert back.verdict == "match"
    one, two = (load_file(f / "model.safetensors" if f.is_dir() else f) for f in (a, tmp_path / f"back{end}"))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    plan = mergeid.plan(a, tmp_path / f"moved{end}", arch=arch)
    assert plan.verdict == "match" and json.dumps(plan.to_json())
