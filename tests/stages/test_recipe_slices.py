"""Recipes with slices, modules and several documents, against stacks and merges made by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from mergeid.commands.cli import run
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.opening import open_checkpoint
from mergeid.methods.recipe import in_order, parse_recipe
from mergeid.models.slices import Slice, layers_of, stacked
from mergeid.stages.recipe import prepared

LAYERS = 3
SIZES = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}


def three(work: Path, kind: Any, config: Any) -> Path:
    """a, b and c."""
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(work / name)
    return work


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small Llamas a, b and c with three layers."""
    work = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    return three(work, transformers.LlamaForCausalLM, config)


def write(recipe: Any, out: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the command makes of a recipe (a list: of several documents)."""
    monkeypatch.chdir(folder)
    path = out.with_suffix(".yaml")
    documents = recipe if isinstance(recipe, list) else [recipe]
    path.write_text(yaml.safe_dump_all(documents))
    assert run(["merge", str(path), "-o", str(out), "--match", "never"]) == 0
    return load_file(out / "model.safetensors")


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def test_layers_are_stacked_and_the_result_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 3], "parameters": {"scale": 0.5}}]},
        ],
    }
    found = write(recipe, tmp_path / "out", folder, monkeypatch)
    a, b = weights(folder, "a"), weights(folder, "b")
    for name, value in found.items():
        if ".layers." in name:
            layer, rest = int(name.split(".")[2]), name.split(".", 3)[3]
            source, at, scale = (a, layer, 1.0) if layer < 2 else (b, layer - 1, 0.5)
            assert torch.equal(value, scale * source[f"model.layers.{at}.{rest}"])
        else:  # in front of the layers the first slice's model, behind them the last one's
            first = name == "model.embed_tokens.weight"
            assert torch.equal(value, a[name] if first else 0.5 * b[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    by_hand = copy.deepcopy(transformers.LlamaForCausalLM.from_pretrained(folder / "a"))
    by_hand.config.num_hidden_layers = 4
    by_hand = transformers.LlamaForCausalLM(by_hand.config).eval()
    by_hand.load_state_dict(found)
    tokens = torch.tensor([[1, 5, 7, 2]])
    torch.testing.assert_close(model(tokens).logits, by_hand(tokens).logits)


def test_gradients_go_over_the_layers_of_a_slice(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "merge_method": "linear",
        "parameters": {"normalize": False, "weight": 0.25},
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [0, 3], "parameters": {"weight": [0.0, 1.0]}},
                    {"model": "b", "layer_range": [0, 3]},
                ]
            },
            {
                "sources": [{"model": "b", "layer_range": [2, 3]}, {"model": "c", "layer_range": [0, 1]}],
                "parameters": {"weight": [{"filter": "mlp", "value": 2.0}]},
            },
        ],
    }
    found = write(recipe, tmp_path / "out", folder, monkeypatch)
    a, b, c = (weights(folder, n) for n in "abc")
    for kind in ("mlp.up_proj", "self_attn.q_proj"):
        for layer in range(3):
            name = f"model.layers.{layer}.{kind}.weight"
            torch.testing.assert_close(found[name], layer / 2 * a[name] + 0.25 * b[name])
        weight = 2.0 if kind.startswith("mlp") else 0.25
        ends = b[f"model.layers.2.{kind}.weight"] + c[f"model.layers.0.{kind}.weight"]
        torch.testing.assert_close(found[f"model.layers.3.{kind}.weight"], weight * ends)
    torch.testing.assert_close(found["model.embed_tokens.weight"], 0.25 * b["model.embed_tokens.weight"])
    torch.testing.assert_close(found["lm_head.weight"], 0.25 * (b["lm_head.weight"] + c["lm_head.weight"]))


def test_documents_are_merged_in_stages(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {
        "name": "half",
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in "ab"],
    }
    last = {
        "merge_method": "task_arithmetic",
        "base_model": "half",
        "models": [{"model": "c", "parameters": {"weight": 0.5}}],
    }
    found = write([last, first], tmp_path / "out", folder, monkeypatch)  # in any order
    a, b, c = (weights(folder, n) for n in "abc")
    for name, value in found.items():
        half = (a[name] + b[name]) / 2
        torch.testing.assert_close(value, half + 0.5 * (c[name] - half))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.yaml"]


def test_stages_lie_beside_an_output_in_the_home_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(folder)
    models = [{"model": m, "parameters": {"weight": 1}} for m in "ab"]
    first = {"name": "half", "merge_method": "linear", "models": models}
    last = {**first, "name": "whole", "models": [{"model": "half", "parameters": {"weight": 1}}, models[0]]}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump_all([first, last]))
    assert run(["merge", str(path), "-o", "~/out", "--match", "never"]) == 0
    assert [p.name for p in home.iterdir()] == ["out"] and not (folder / "~").exists()
    assert run(["merge", str(path), "-o", "no/such/out", "--match", "never"]) == 2


def test_a_single_module_is_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"model": m, "parameters": {"weight": 1}} for m in "ab"]
    recipe = {"merge_method": "linear", "modules": {"default": {"models": models}}}
    found = write(recipe, tmp_path / "out", folder, monkeypatch)
    name = "lm_head.weight"
    torch.testing.assert_close(found[name], (weights(folder, "a")[name] + weights(folder, "b")[name]) / 2)


def test_lists_with_an_entry_per_layer_follow(tmp_path: Path) -> None:
    tensors = {f"h.{i}.w": torch.full((2,), float(i)) for i in range(4)} | {"wte": torch.zeros(3, 2)}
    config = {"n_layer": 4, "layer_types": ["w", "x", "y", "z"], "other": [1, 2]}
    model = Checkpoint.from_tensors(tensors, source="m", config=config)
    found = stacked([Slice(model, 2, 4), Slice(model, 0, 3)])
    assert [found.tensor(f"h.{i}.w")[0] for i in range(5)] == [2, 3, 0, 1, 2] and "h.5.w" not in found.table
    assert found.config == {"n_layer": 5, "layer_types": ["y", "z", "w", "x", "y"], "other": [1, 2]}
    assert torch.equal(found.tensor("wte"), tensors["wte"]) and layers_of(found).count == 5


def test_what_slices_cannot_be(folder: Path) -> None:
    a = open_checkpoint(folder / "a")
    with pytest.raises(MergeidError, match=r"layer_range \[1, 4\] of .*a is not a range of its 3 layers"):
        stacked([Slice(a, 1, 4)])
    two = Checkpoint.from_tensors({f"{s}.{i}.w": torch.zeros(2) for s in ("enc", "dec") for i in range(2)}, source="t5")
    with pytest.raises(MergeidError, match=r"t5 has several lists of layers \(enc, dec\)"):
        layers_of(two)
    with pytest.raises(MergeidError, match="flat has no list of layers"):
        layers_of(Checkpoint.from_tensors({"w": torch.zeros(2)}, source="flat"))
    odd = Checkpoint.from_tensors({"h.0.w": torch.zeros(2), "h.1.w": torch.zeros(2)}, source="m", config={"depth": 2})
    with pytest.raises(MergeidError, match="does not say that it has 2 layers"):
        stacked([Slice(odd, 0, 1)])


def slices(*sources: list[dict[str, Any]], method: str = "linear", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": [{"sources": s} for s in sources], **more}


def source(model: str, first: int = 0, end: int = 2) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end]}


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        (slices([source("a"), source("b", 0, 1)]), r"slices\[0\] takes different numbers of layers"),
        (slices([source("a"), source("b")], [source("a")]), "the slices merge 2, 1 models"),
        (slices([source("a"), source("b")], method="passthrough"), r"slices\[0\] has 2 sources; method 'passthrough'"),
        (slices([{"model": "a"}]), r"slices\[0\].sources\[0\] lacks the key 'layer_range'"),
        ({**slices([source("a")]), "models": [{"model": "a"}]}, "expected either models or slices"),
        ({"merge_method": "linear", "modules": {"text": {"models": []}, "vision": {}}}, "models is an empty list"),
        (
            {"merge_method": "linear", "modules": {"text": {"models": [{"model": "a"}]}, "vision": {"slices": []}}},
            "modules.vision.slices is an empty list",
        ),
        (
            {
                "merge_method": "passthrough",
                "modules": {"x": {"models": [{"model": "a"}]}, "y": {"slices": [{"sources": [source("a")]}]}},
            },
            "modules.y has no models; expected whole models where there are several modules",
        ),
        (
            {"merge_method": "linear", "modules": {k: {"models": [{"model": m} for m in k]} for k in ("ab", "abc")}},
            "the modules merge 2, 3 models; expected the same number in each",
        ),
    ],
)
def test_recipes_with_slices_that_are_refused(recipe: dict[str, Any], match: str) -> None:
    with pytest.raises(MergeidError, match=match):
        parse_recipe(recipe)


def test_a_base_that_is_no_source_of_a_slice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    recipe = slices([source("a"), source("b")], method="ties", base_model="c", parameters={"weight": 1})
    with pytest.raises(MergeidError, match="c is the base of slices but not one of their sources"):
        prepared(parse_recipe(recipe), {})


def stage(name: str | None, *models: str) -> Any:
    told = {"merge_method": "karcher", "models": [{"model": m} for m in models]}
    return parse_recipe({**told, **({"name": name} if name else {})})


def test_the_order_of_stages() -> None:
    one, two, last = stage("one", "a", "b"), stage("two", "one", "b"), stage(None, "two", "one")
    assert in_order([last, two, one]) == [one, two, last]
    assert in_order([one, two]) == [one, two]
    with pytest.warns(MergeidWarning, match="'two' is used by no other document"):
        assert in_order([two, one, stage(None, "one", "a")])[0] == one
    with pytest.raises(MergeidError, match=r"'two' depends on itself \(two → one\)"):
        in_order([stage("one", "two", "a"), stage("two", "one", "a")])
    with pytest.raises(MergeidError, match="two documents have the name 'one'"):
        in_order([one, stage("one", "b", "c"), last])
    with pytest.raises(MergeidError, match="2 documents have no name"):
        in_order([last, stage(None, "a", "b")])


@pytest.fixture(scope="module")
def two_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small T5s a, b and c."""
    work = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return three(work, transformers.T5ForConditionalGeneration, config)


def of_models(weight: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"models": [{"model": m, "parameters": {"weight": w}} for m, w in weight.items()], **more}


def test_every_module_has_models_and_weights_of_its_own(
    two_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient goes over the layers of its module; a module's parameters come before those of the recipe."""
    recipe = {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "modules": {
            "encoder": of_models({"a": 0.3, "b": 0.7}),
            "decoder": of_models({"c": [0.0, 0.5], "a": [1.0, 0.5]}),
            "shared": {"models": [{"model": "b"}, {"model": "c"}], "parameters": {"weight": 0.25}},
        },
    }
    found = write(recipe, tmp_path / "out", two_parts, monkeypatch)
    a, b, c = (weights(two_parts, name) for name in "abc")
    for name, tensor in found.items():
        share = [0.0, 0.25, 0.5][int(name.split(".")[2])] if name.startswith("decoder.block") else 0.0
        if name.startswith("encoder"):
            expected = 0.3 * a[name] + 0.7 * b[name]
        elif name.startswith("decoder"):
            expected = share * c[name] + (1 - share) * a[name]
        else:
            expected = 0.25 * b[name] + 0.25 * c[name]
        torch.testing.assert_close(tensor, expected, msg=name)


def test_modules_that_a_model_has_not(folder: Path, two_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"merge_method": "linear", "modules": {k: of_models({"a": 1, "b": 1}) for k in ("encoder", "decoder")}}
    monkeypatch.chdir(two_parts)
    with pytest.raises(MergeidError, match="a has the parts decoder, encoder, shared, and the recipe has modules"):
        prepared(parse_recipe(recipe), {})
    monkeypatch.chdir(folder)
    with pytest.raises(MergeidError, match="a has one part alone, and the recipe has modules encoder, decoder"):
        prepared(parse_recipe(recipe), {})


def test_what_lies_behind_the_layers_belongs_to_the_last_slice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is of the same model as what lies below them."""
    pair = [{"model": m, "layer_range": [0, 2]} for m in "ab"]
    recipe = {
        "merge_method": "linear",
        "slices": [
            {"sources": pair, "parameters": {"weight": {"value": 1.0}}},
            {"sources": [pair[0], {**pair[1], "parameters": {"weight": 3.0}}], "parameters": {"weight": 1.0}},
        ],
    }
    found = write(recipe, tmp_path / "out", folder, monkeypatch)
    a, b = weights(folder, "a"), weights(folder, "b")
    for name, share in {"model.embed_tokens.weight": 0.5, "model.norm.weight": 0.75, "lm_head.weight": 0.75}.items():
        torch.testing.assert_close(found[name], (1 - share) * a[name] + share * b[name])
