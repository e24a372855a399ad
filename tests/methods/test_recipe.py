"""Recipes and merges of several models, through the real command and by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import mergeid
from safetensors.torch import load_file, save_file
from test_bad_input import all_refused, refused

from mergeid.errors import MergeidError
from mergeid.methods.recipe import parse_recipe, read_stages
from mergeid.methods.registry import get_method
from mergeid.methods.settings import Condition, MergeSettings, depths, evaluate, setting_of_weights
from mergeid.methods.ties import ties
from mergeid.request.vocabulary import TokenRow, Vocabulary

NAMES = ["embed.weight", "layers.0.mlp.weight", "layers.1.mlp.weight", "layers.2.attn.weight", "norm.weight"]


def network(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (6, 4) if name != "norm.weight" else (4,) for name in NAMES}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a.safetensors, b.safetensors, c.safetensors and base.safetensors."""
    for seed, name in enumerate(("a", "b", "c", "base")):
        save_file(network(seed), tmp_path / f"{name}.safetensors")
    return tmp_path


FILES = ("a.safetensors", "b.safetensors", "c.safetensors")
PLAIN = ("--match", "never")


def merged(work: Path, *words: object) -> dict[str, torch.Tensor]:
    done = mergeid("merge", *words, *PLAIN, "--force", cwd=work)
    assert done.code == 0, done.stderr
    return load_file(work / "merged.safetensors")


# --- settings ----------------------------------------------------------------------------------------------------


def test_depth_is_read_off_the_names() -> None:
    found = depths([*NAMES, "encoder.layer.0.x", "encoder.layer.4.layer.9.x", "blocks.0.x"])
    assert found == {
        "embed.weight": 0.0, "layers.0.mlp.weight": 0.0, "layers.1.mlp.weight": 0.5, "layers.2.attn.weight": 1.0,
        "norm.weight": 0.0, "encoder.layer.0.x": 0.0, "encoder.layer.4.layer.9.x": 1.0, "blocks.0.x": 1.0,
    }  # fmt: skip


def test_gradients_and_conditions() -> None:
    assert [evaluate((0.0, 1.0, 0.0), "x", d) for d in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]
    setting = (Condition(0.2, "*mlp*"), Condition((0.0, 1.0), "*"))
    assert evaluate(setting, "layers.1.mlp.weight", 0.5) == 0.2
    assert evaluate(setting, "layers.1.attn.weight", 0.25) == 0.25
    assert evaluate((Condition(0.2, "*mlp*"),), "norm.weight", 1.0) is None
    assert [evaluate((True, False), "x", d) for d in (0, 0.9, 1)] == [True, True, False]
    pair = {"merge_method": "ties", "base_model": "c", "models": [{"model": "a"}, {"model": "b"}]}
    told = parse_recipe({**pair, "parameters": {"rescale_norm": ["l1", "l2"]}})
    settings = MergeSettings.of(get_method("ties"), 2, ["h.0.w", "h.1.w"], parameters=told.parameters)
    assert [settings.keywords(name)["rescale_norm"] for name in ("h.0.w", "h.1.w")] == ["l1", "l2"]


def test_weights_by_glob() -> None:
    weights = setting_of_weights({"layers.0.*": (0.1, 0.9), "*": (0.5, 0.5)})
    told = MergeSettings.of(get_method("linear"), 2, NAMES, weights=weights)
    assert told.weights_of("layers.0.mlp.weight") == [0.1, 0.9] and told.weights_of("norm.weight") == [0.5, 0.5]
    with pytest.raises(MergeidError, match="no weight is given for tensor 'embed"):
        MergeSettings.of(get_method("linear"), 2, NAMES, weights=setting_of_weights({"layers.*": (0.1, 0.9)}))
    with pytest.raises(MergeidError, match=r"the pattern 'blocks.\*' matches no tensor"):
        weights = setting_of_weights({"blocks.*": (0.1, 0.9), "*": (0.5, 0.5)})
        MergeSettings.of(get_method("linear"), 2, NAMES, weights=weights)
    with pytest.raises(MergeidError, match=r"different numbers of weights: 2 for 'a', 3 for '\*'"):
        setting_of_weights({"a": (1, 2), "*": (1, 2, 3)})


# --- the command -------------------------------------------------------------------------------------------------


def test_three_models(work: Path) -> None:
    found = merged(work, *FILES, "--weights", "0.2,0.3,0.5", "--weights", "layers.1.*=1,0,0")
    a, b, c = (load_file(work / f) for f in FILES)
    for name in NAMES:
        expected = 0.2 * a[name].double() + 0.3 * b[name].double() + 0.5 * c[name].double()
        torch.testing.assert_close(found[name], a[name] if "layers.1" in name else expected.float())
    record = json.loads((work / "mergeid.json").read_text())
    assert [i["source"] for i in record["inputs"]] == list(FILES)
    equal = merged(work, *FILES)
    torch.testing.assert_close(equal["norm.weight"], (a["norm.weight"] + b["norm.weight"] + c["norm.weight"]) / 3)


def test_ties_with_a_base(work: Path) -> None:
    options = ("--method", "ties", "--base", "base.safetensors", "--density", "0.5,0.25", "--set", "lambda=0.8")
    found = merged(work, *FILES[:2], *options)
    a, b, base = (load_file(work / f"{n}.safetensors") for n in ("a", "b", "base"))
    for name in NAMES:
        expected = ties([a[name], b[name]], [0.5, 0.5], base=base[name], density=[0.5, 0.25], scale=0.8)
        assert torch.equal(found[name], expected)
    record = json.loads((work / "mergeid.json").read_text())
    assert record["method"] == "ties" and record["base"]["source"] == "base.safetensors"
    assert record["settings"]["parameters"] == {"density": [0.5, 0.25], "lambda": 0.8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_number_format_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    for seed, name in enumerate(("a", "b", "base")):
        save_file(network(seed, dtype), tmp_path / f"{name}.safetensors")
    for method in ("dare_ties", "model_stock"):
        density = ("--density", "0.5") if method == "dare_ties" else ()
        found = merged(tmp_path, *FILES[:2], "--method", method, "--base", "base.safetensors", *density)
        assert {t.dtype for t in found.values()} == {dtype}
        again = merged(tmp_path, *FILES[:2], "--method", method, "--base", "base.safetensors", *density)
        assert all(torch.equal(found[n], again[n]) for n in found)


def test_what_the_command_refuses(work: Path) -> None:
    pair = ["merge", *FILES[:2], *PLAIN]
    (work / "r.yaml").write_text("merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n")
    all_refused(
        work,
        (["merge", "a.safetensors"], ["Missing argument 'B'", "recipe"]),
        ([*pair, "--method", "tie"], ["unknown merge method 'tie'", "did you mean 'ties'", "slerp"]),
        ([*pair, "--method", "ties"], ["'ties' needs the model that the others were fine-tuned from", "--base"]),
        ([*pair, "--base", "base.safetensors"], ["'linear' uses no base model", "--base"]),
        ([*pair, "--method", "ties", "--base", "none.safetensors"], ["no such file or folder: none.safetensors"]),
        ([*pair, "--method", "fisher"], ["'fisher' measures the Fisher information", "--data"]),
        ([*pair, "--method", "regmean"], ["'regmean' measures Gram matrices", "--data"]),
        ([*pair, "--density", "0.5"], ["'linear' has no parameter 'density'"]),
        ([*pair, "--set", "lambda"], ["--set 'lambda' is not NAME=VALUE", "NAME=VALUE"]),
        ([*pair, "--weights", "layer.*=0.5,0.5", "--weights", "0.5,0.5"], ["'layer.*' matches no tensor"]),
        ([*pair, "--weights", "0.5,0.5", "--weights", "0.4,0.6"], ["given twice for 'all tensors'"]),
        ([*pair, "--repair", "repair"], ["--repair repair measures activations", "--data"]),
        ([*pair, "c.safetensors", "--method", "slerp"], ["'slerp' merges 2 models, got 3"]),
        (["merge", "r.yaml", "--method", "ties"], ["--method cannot be combined with a recipe", "r.yaml"]),
        (["merge", "none.yaml"], ["no such file or folder: none.yaml"]),
    )


# --- recipes -----------------------------------------------------------------------------------------------------

TIES = """
merge_method: ties
base_model: base.safetensors
models:
  - model: base.safetensors
  - model: a.safetensors
    parameters: {weight: 0.6, density: [0.2, 0.8]}
  - model: b.safetensors
    parameters:
      weight:
        - {filter: mlp, value: 0.1}
        - value: 0.5
parameters:
  density: 0.9
  normalize: false
  int8_mask: true
dtype: float32
"""


def test_a_recipe_of_mergekit(work: Path) -> None:
    (work / "r.yaml").write_text(TIES)
    done = mergeid("merge", "r.yaml", *PLAIN, "-o", "merged.safetensors", cwd=work)
    assert done.code == 0 and len(done.lines) == 1 and "int8_mask only saves memory" in done.lines[0]
    found = load_file(work / "merged.safetensors")
    a, b, base = (load_file(work / f"{n}.safetensors") for n in ("a", "b", "base"))
    where = {"layers.1.mlp.weight": 0.5, "layers.2.attn.weight": 1.0}
    for name in NAMES:
        density = [0.2 + 0.6 * where.get(name, 0.0), 0.9]
        weights = [0.6, 0.1 if "mlp" in name else 0.5]
        expected = ties([a[name], b[name]], weights, base=base[name], density=density, normalize=False)
        torch.testing.assert_close(found[name], expected)


def test_slerp_goes_from_the_base() -> None:
    table: dict[str, Any] = {
        "merge_method": "slerp",
        "base_model": "b",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}]},
    }
    recipe = parse_recipe(table)
    assert recipe.models == ["b", "a"] and recipe.base is None
    told = MergeSettings.of(get_method("slerp"), 2, NAMES, weights=recipe.weights)
    assert told.weights_of("layers.1.mlp.weight") == [0.5, 0.5]
    assert told.weights_of("norm.weight") == pytest.approx([0.7, 0.3])


def test_linear_is_normalised_unless_it_says_no() -> None:
    table: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 3}}],
    }
    recipe = parse_recipe(table)
    told = MergeSettings.of(get_method("linear"), 2, NAMES, weights=recipe.weights, normalize=recipe.normalize)
    assert told.weights_of("norm.weight") == [0.25, 0.75]
    assert not parse_recipe({**table, "parameters": {"normalize": False}}).normalize


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_an_average_of_one_model(work: Path, method: str) -> None:
    """A way to give it another dtype or other tokens. It was refused."""
    lines = f"merge_method: {method}\nmodels:\n- model: a.safetensors\n  parameters: {{weight: 2}}\ndtype: bfloat16\n"
    (work / "recipe.yaml").write_text(lines)
    found = merged(work, "recipe.yaml", "-o", "merged.safetensors")
    assert all(torch.equal(found[n], t.bfloat16()) for n, t in network(0).items())
    if method == "linear":
        (work / "recipe.yaml").write_text(lines + "parameters: {normalize: false}\n")
        found = merged(work, "recipe.yaml", "-o", "merged.safetensors")
        assert all(torch.equal(found[n], 2 * t.bfloat16()) for n, t in network(0).items())


def test_whose_tokens_the_result_has() -> None:
    table: dict[str, Any] = {"merge_method": "karcher", "models": [{"model": "a"}, {"model": "b"}]}
    assert parse_recipe(table).parameters == {"max_iter": 10, "tol": 1e-5} and parse_recipe(table).tokenizer is None
    for source, found in (("union", "union"), ("a", "a"), ("b", "b"), ("base", "a")):
        for told in ({"tokenizer_source": source}, {"tokenizer": {"source": source}}):
            assert parse_recipe({**table, **told}).tokenizer == Vocabulary(found, multiple=1)
    old = parse_recipe({**table, "tokenizer_source": "model:b"}).tokenizer  # as mergekit's recipes of 2023 have it
    assert old == Vocabulary("b", multiple=1)
    models = [{"model": "a", "parameters": {"weight": 1}}]
    based = {"merge_method": "task_arithmetic", "base_model": "c", "models": models}
    assert parse_recipe({**based, "tokenizer_source": "base"}).tokenizer == Vocabulary("base", "base", multiple=1)
    slerp = {**table, "merge_method": "slerp", "base_model": "b", "parameters": {"t": 0.5}}
    first = parse_recipe({**slerp, "tokenizer_source": "base"}).tokenizer
    assert first == Vocabulary("a", "a", multiple=1)  # the base is the first there


def test_rows_of_single_tokens() -> None:
    tokens = {
        "<x>": {"source": "b"},
        "<y>": {"source": {"kind": "model_token", "model": "base", "token": "y"}, "force": True},
        "<z>": {"source": {"kind": "model_token", "model": "a", "token_id": 7}},
        "<0>": {"source": {"kind": "zero"}},
    }
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]
    table = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    found = parse_recipe({**table, "tokenizer": {"source": "b", "tokens": tokens, "pad_to_multiple_of": 64}}).tokenizer
    rows = {
        "<x>": TokenRow("b"),
        "<y>": TokenRow("base", "y", True),
        "<z>": TokenRow("a", 7),
        "<0>": TokenRow(None),
    }
    assert found == Vocabulary("b", "base", rows, 64)


PAIR = "models: [{model: a}, {model: b}]"
TOKENIZER = "merge_method: karcher\ntokenizer:"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty; expected a table with merge_method"),
        ("- a", "is a list of 1; expected a table with merge_method"),
        ("merge_method: [", "is not valid YAML in line 1"),
        (f"{PAIR}", "lacks the key 'merge_method'"),
        (f"merge_method: tyes\n{PAIR}", "unknown merge method 'tyes'.*'ties'"),
        (f"merge_method: linear\ndtype: float31\n{PAIR}", r"unknown dtype 'float31'; .* \(dtype\)$"),
        (f"merge_method: linear\nout_dtype: float31\n{PAIR}", r"unknown dtype 'float31'; .* \(out_dtype\)$"),
        (f"merge_method: linear\nbasemodel: x\n{PAIR}", r"unknown key 'basemodel' \(did you mean 'base_model'"),
        ("merge_method: linear\nslices: []", "slices is an empty list"),
        (f"merge_method: linear\ngate_mode: random\n{PAIR}", "'gate_mode', which is not supported: mixtures"),
        ("merge_method: linear", "lacks the key 'models'"),
        (f"merge_method: karcher\ntokenizer_source: x\n{PAIR}", "that of 'x', which is not a model of the recipe"),
        (f"{TOKENIZER} {{source: union, pad_to_multiple_of: 0}}\n{PAIR}", "pad_to_multiple_of is 0; expected greater"),
        (f"{TOKENIZER} {{tokens: {{x: {{source: c}}}}}}\n{PAIR}", "row of 'x' is that of 'c', which is not a model"),
        (f"{TOKENIZER} {{tokens: {{x: {{force: true}}}}}}\n{PAIR}", "tokenizer.tokens.x lacks the key 'source'"),
        (
            f"{TOKENIZER} {{tokens: {{x: {{source: 3}}}}}}\n{PAIR}",
            r"x.source is 3; expected a path or hub id, or a table with model",
        ),
        (
            f"{TOKENIZER} {{tokens: {{x: {{source: {{kind: token, model: a, token: y}}}}}}}}\n{PAIR}",
            r"x.source.kind is 'token'; expected 'model_token'",
        ),
        (
            f"{TOKENIZER} {{tokens: {{x: {{source: {{kind: model_token, model: a}}}}}}}}\n{PAIR}",
            "x.source is .*; expected either token or token_id",
        ),
        (
            f"{TOKENIZER} {{tokens: {{x: {{source: {{kind: model_token, model: a, id: 3}}}}}}}}\n{PAIR}",
            "has an unknown key 'id'",
        ),
        ("merge_method: linear\nmodels: []", "models is an empty list; expected more entries"),
        ("merge_method: linear\nmodels: [a, b]", r"models\[0\] is 'a'; expected a table with model, parameters"),
        ("merge_method: linear\nmodels: [{name: a}]", r"models\[0\] has an unknown key 'name'"),
        (f"merge_method: linear\nparameters: 3\n{PAIR}", "parameters is 3; expected a table"),
        (f"merge_method: ties\nbase_model: x\nparameters: {{densty: 1}}\n{PAIR}", "no parameter 'densty'.*'density'"),
        (f"merge_method: ties\nbase_model: x\nparameters: {{density: high}}\n{PAIR}", "is 'high'; expected a number"),
        (f"merge_method: ties\nbase_model: x\nparameters: {{density: []}}\n{PAIR}", "is an empty list"),
        (
            f"merge_method: ties\nbase_model: x\nparameters: {{density: [{{filter: x}}]}}\n{PAIR}",
            r"density\[0\] lacks the key 'value'",
        ),
        (f"merge_method: ties\nbase_model: x\nparameters: {{density: [{{value: 1, fliter: x}}]}}\n{PAIR}", "'fliter'"),
        (f"merge_method: model_stock\nbase_model: x\nparameters: {{weight: 1}}\n{PAIR}", "uses no weights"),
        (f"merge_method: slerp\nbase_model: a\n{PAIR}", "slerp needs a parameter t"),
        (f"merge_method: slerp\nparameters: {{t: 0.5}}\n{PAIR}", "slerp takes a base_model and one other"),
        (f"merge_method: linear\ndtype: 16\n{PAIR}", "dtype is 16; expected float32"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]",
            "'weight' is given for only some of the models",
        ),
        (
            "merge_method: ties\nbase_model: x\nmodels: [{model: a, parameters: {lambda: 2}}, {model: b}]",
            "'lambda' is one for all models",
        ),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(MergeidError, match=match) as raised:
        read_stages(tmp_path / "r.yaml")
    assert "r.yaml" in str(raised.value)


def test_a_bad_recipe_is_one_sentence(work: Path) -> None:
    (work / "r.yaml").write_text("merge_method: linear\nmodles: []\n")
    refused(mergeid("merge", "r.yaml", "-o", "o.safetensors", cwd=work), "r.yaml", "unknown key 'modles'", "'models'")
    (work / "r.yaml").write_text("!!python/object/apply:os.system ['touch hacked']\n")
    refused(mergeid("merge", "r.yaml", "-o", "o.safetensors", cwd=work), "r.yaml is not valid YAML")
    (work / "r.yaml").write_bytes(b"\xff\xfe\x00")
    refused(mergeid("merge", "r.yaml", "-o", "o.safetensors", cwd=work), "r.yaml cannot be read as text")
