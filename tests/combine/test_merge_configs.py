"""Merging checkpoints whose configs, heads or kinds differ: done right, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import configs
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import mergeid
from mergeid.errors import MergeidError
from mergeid.verbs.merge import MergeResult, merge

TINY = {k: v for k, v in configs()["LlamaForCausalLM"].items() if k not in ("model_type", "architectures")}


def llama(folder: Path, seed: int, like: nn.Module | None = None, **fields: Any) -> LlamaForCausalLM:
    """A folder with a tiny model, near `like` where given."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **fields}))
    if like is not None:
        model.load_state_dict(like.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def edit(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **fields}))


def halves(a: nn.Module, b: nn.Module) -> dict[str, Tensor]:
    return {k: (v + b.state_dict()[k]) / 2 for k, v in a.state_dict().items()}


def plain(*models: Any, output: Path, **options: Any) -> MergeResult:
    return merge([str(m) for m in models], output=output, match="never", **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM, LlamaForCausalLM]:
    """Folders a and b of one origin."""
    folder = tmp_path_factory.mktemp("pair")
    a = llama(folder / "a", 1)
    return folder, a, llama(folder / "b", 2, a)


Pair = tuple[Path, LlamaForCausalLM, LlamaForCausalLM]


@pytest.fixture
def work(tmp_path: Path, pair: Pair) -> Path:
    for name in "ab":
        shutil.copytree(pair[0] / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("match", ["never", "auto"])
def test_another_version_of_the_library(work: Path, pair: Pair, match: str) -> None:
    """A's config as transformers 4 writes it, B's as 5 does."""
    config = config_of(work / "a")
    rope = config.pop("rope_parameters")
    config.update(rope_theta=rope["rope_theta"], rope_scaling=None, torch_dtype=config.pop("dtype"), use_cache=False)
    (work / "a" / "config.json").write_text(json.dumps({**config, "transformers_version": "4.40.0"}))
    done = merge(work / "a", work / "b", output=work / "out", match=match)
    assert not any("config" in note for note in done.notes)
    assert config_of(work / "out") == config_of(work / "a")
    got = LlamaForCausalLM.from_pretrained(work / "out").state_dict()
    for key, value in halves(*pair[1:]).items():
        torch.testing.assert_close(got[key], value)


def test_what_changes_the_function_is_refused_everywhere(work: Path) -> None:
    edit(work / "b", rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    a, b = str(work / "a"), str(work / "b")
    text = work / "text.txt"
    text.write_text("one line\nanother\n" * 20)
    for call in (
        lambda: merge(a, b, output=work / "out"),
        lambda: merge(a, b, output=work / "out", match="never"),
        lambda: merge(a, a, b, output=work / "out", match="never"),
        lambda: merge(a, a, base=b, method="ties", output=work / "out", match="never"),
        lambda: mergeid.plan(a, b),
        lambda: mergeid.predict(a, b),
        lambda: mergeid.align(b, a, output=work / "out"),
        lambda: mergeid.barrier(a, b, data=str(text)),
        lambda: mergeid.zip_models(a, b, data=str(text), output=work / "out"),
    ):
        with pytest.raises(
            MergeidError, match=r"rope_theta \((10000.0 and 1000000.0|1000000.0 and 10000.0)\).*--config a"
        ):
            call()
    assert not (work / "out").exists()


@pytest.mark.parametrize("match", ["never", "auto"])
@pytest.mark.parametrize("chosen", ["a", "b"])
def test_the_chosen_config_is_written(work: Path, pair: Pair, chosen: str, match: str) -> None:
    edit(work / "b", hidden_act="gelu", dtype="bfloat16", id2label={"0": "x"}, transformers_version="4.50")
    done = merge(work / "a", work / "b", output=work / "out", match=match, config=chosen)
    written = config_of(work / "out")
    assert written["hidden_act"] == {"a": "silu", "b": "gelu"}[chosen]
    assert written["dtype"] == "float32" and "x" not in json.dumps(written.get("id2label"))
    record = json.loads((work / "out" / "mergeid.json").read_text())
    assert record["config"]["from"] == str(work / chosen)
    assert record["config"]["overruled"][0]["fields"] == {"hidden_act": ["silu", "gelu"]}
    assert any("differ in hidden_act (silu and gelu)" in note for note in done.notes)
    got = load_file(work / "out" / "model.safetensors")
    for key, value in halves(*pair[1:]).items():
        torch.testing.assert_close(got[key], value)


def test_each_model_is_built_from_the_config_that_counts(work: Path) -> None:
    from mergeid.models.workbench import Workbench
    from mergeid.request.request import Reading, Run
    from mergeid.stages.open import open_models, pair_of

    edit(work / "b", hidden_act="relu", attention_dropout=0.5)
    for chosen, kind in (("a", "SiLU"), ("b", "ReLU")):
        met = open_models(Workbench(Reading(config=chosen), Run()), [work / "a", work / "b"])
        found = pair_of(met, met.models[1])
        acts = [type(x.model.model.layers[0].mlp.act_fn).__name__ for x in (found.a, found.b)]
        assert all(kind in act for act in acts)
        assert [x.model.config.attention_dropout for x in (found.a, found.b)] == [0.0, 0.5]


def test_live_modules() -> None:
    torch.manual_seed(0)
    a = LlamaForCausalLM(LlamaConfig(**TINY))
    b = LlamaForCausalLM(LlamaConfig(**{**TINY, "hidden_act": "relu"}))
    with pytest.raises(MergeidError, match=r"differ in hidden_act \(silu and relu\)"):
        merge(a, b)
    state = merge(a, b, config="b", match="never").state
    assert state is not None
    torch.testing.assert_close(state["lm_head.weight"], (a.lm_head.weight + b.lm_head.weight).detach() / 2)


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (nn.ReLU(), nn.GELU(), r"1 \(ReLU and GELU\)"),
        (nn.GELU(), nn.GELU("tanh"), r"1.approximate \(none and tanh\)"),
        (nn.LayerNorm(6), nn.LayerNorm(6, eps=0.1), r"1.eps \(1e-05 and 0.1\)"),
        (nn.ReLU(inplace=True), nn.ReLU(), None),
        (nn.Dropout(0.1), nn.Dropout(0.5), None),
        (nn.Dropout(0.1), nn.Identity(), None),
        (nn.BatchNorm1d(6, momentum=0.1), nn.BatchNorm1d(6, momentum=0.01), None),
    ],
    ids=str,
)
def test_layers_of_live_modules(one: nn.Module, two: nn.Module, said: str | None) -> None:
    """What a file leaves to its config is in the layers themselves."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3)) for layer in (one, two))
    if said is None:
        assert merge(a, b, match="never").notes == []
        return
    with pytest.raises(MergeidError, match=f"differ in {said}, which changes .* --config a|b"):
        merge(a, b, example_inputs=torch.randn(3, 4))
    done = merge(a, b, example_inputs=torch.randn(3, 4), config="b")
    assert done.state is not None and done.state.keys() == b.state_dict().keys()


def test_another_architecture_is_called_so(work: Path, tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"})).save_pretrained(
        work / "bert"
    )
    with pytest.raises(MergeidError, match=r"are different architectures \(LlamaForCausalLM and BertForMaskedLM\)"):
        merge(work / "a", work / "bert", output=work / "out")


# -- heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["never", "auto"])
@pytest.mark.parametrize("order", ["untied first", "tied first"])
def test_a_tied_head_and_one_of_its_own(tmp_path: Path, order: str, match: str) -> None:
    """The tied model's head is its embedding; the result has a head of its own, and its config says so."""
    tied = llama(tmp_path / "tied", 1, tie_word_embeddings=True)
    own = llama(tmp_path / "own", 2, tied, tie_word_embeddings=False)
    folders = ["own", "tied"] if order == "untied first" else ["tied", "own"]
    done = merge(*(tmp_path / f for f in folders), output=tmp_path / "out", match=match)
    assert any("the result has a separate head" in note for note in done.notes)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    got = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(got.lm_head.weight, (own.lm_head.weight + tied.model.embed_tokens.weight) / 2)
    torch.testing.assert_close(
        got.model.embed_tokens.weight, (own.model.embed_tokens.weight + tied.model.embed_tokens.weight) / 2
    )


@pytest.mark.parametrize("skip", [(), ("lm_head.weight",)])
@pytest.mark.parametrize("where", ["a", "b", "ab"])
def test_copies_of_a_tied_embedding(tmp_path: Path, where: str, skip: tuple[str, ...]) -> None:
    models = {name: llama(tmp_path / name, i, tie_word_embeddings=True) for i, name in enumerate("ab")}
    for name in where:
        file = tmp_path / name / "model.safetensors"
        state = load_file(file)
        save_file(
            {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"}
        )
    done = plain(tmp_path / "a", tmp_path / "b", output=tmp_path / "out", skip=skip)
    assert sum("lm_head.weight" in note and "is left out: it is a copy" in note for note in done.notes) == len(where)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    got = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    mean = (models["a"].model.embed_tokens.weight + models["b"].model.embed_tokens.weight) / 2
    torch.testing.assert_close(got.lm_head.weight, mean)


@pytest.mark.parametrize("skip", [(), ("lm_head.weight",)])
def test_a_head_that_contradicts_its_config(tmp_path: Path, skip: tuple[str, ...]) -> None:
    for i, name in enumerate("ab"):
        llama(tmp_path / name, i, tie_word_embeddings=True)
    file = tmp_path / "a" / "model.safetensors"
    state = load_file(file)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(MergeidError, match=r"ties lm_head.weight to model.embed_tokens.weight .* remove the tensor"):
        plain(tmp_path / "a", tmp_path / "b", output=tmp_path / "out", skip=skip)
    assert not (tmp_path / "out").exists()


def test_what_a_config_cannot_untie(tmp_path: Path) -> None:
    """With T5 an untied head is also scaled otherwise, so it is another function."""
    fields = {
        k: v for k, v in configs()["T5ForConditionalGeneration"].items() if k not in ("model_type", "architectures")
    }
    T5ForConditionalGeneration(T5Config(**fields)).save_pretrained(tmp_path / "tied")
    shutil.copytree(tmp_path / "tied", tmp_path / "untied")
    file = tmp_path / "untied" / "model.safetensors"
    state = load_file(file)
    save_file({**state, "lm_head.weight": state["shared.weight"] + 1}, file, metadata={"format": "pt"})
    edit(tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(MergeidError, match=r"lm_head\.weight|scale_decoder_outputs"):
        plain(tmp_path / "tied", tmp_path / "untied", output=tmp_path / "out")


# -- adapters ---------------------------------------------------------------------------------------------------


def test_lora_without_a_base_is_refused_by_name(work: Path) -> None:
    factors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.randn(4, 4) for x in ("A", "B")
    }
    for name in ("l1", "l2"):
        (work / name).mkdir()
        save_file(factors, work / name / "adapter_model.safetensors")
        (work / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    a, one, two = (str(work / name) for name in ("a", "l1", "l2"))
    for call in (
        lambda: merge(one, two, output=work / "out", match="never"),
        lambda: merge(a, one, output=work / "out"),
        lambda: merge(one, two, output=work / "out", transport=True),
        lambda: mergeid.plan(one, two),
        lambda: mergeid.graph(one),
    ):
        with pytest.raises(
            MergeidError, match=r"l1 is a PEFT adapter \(LoRA\) and does not name its base; name both as BASE\+"
        ):
            call()
    state = load_file(work / "a" / "model.safetensors")
    for name in ("m1", "m2"):  # a whole model saved with its factors
        save_file({**state, **factors}, work / f"{name}.safetensors")
    with pytest.raises(MergeidError, match=r"m1.safetensors holds LoRA factors .*lora_A.*merge_and_unload"):
        merge(work / "m1.safetensors", work / "m2.safetensors", output=work / "out", match="never")


# -- what else is said ------------------------------------------------------------------------------------------


def test_weights_of_a_recipe_as_they_are(work: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeid.commands.cli import run

    monkeypatch.chdir(work)
    (work / "r.yaml").write_text(
        "models:\n  - {model: a, parameters: {weight: 0.1}}\n  - {model: b, parameters: {weight: 1.0}}\n"
        "merge_method: linear\nparameters: {normalize: false}\n"
    )
    assert run(["merge", "r.yaml", "-o", "out", "--match", "never"]) == 0
    got = load_file("out/model.safetensors")
    for key, value in pair[1].state_dict().items():
        torch.testing.assert_close(got[key], 0.1 * value + pair[2].state_dict()[key])


@pytest.mark.parametrize("weights", [(0.3, 0.9), (2.0, 3.0), (-0.5, 0.25)])
def test_weights_as_they_are(work: Path, pair: Pair, weights: tuple[float, float]) -> None:
    """Elements on which all agree are scaled too."""
    shutil.copytree(work / "a", work / "same")
    plain(work / "a", work / "same", output=work / "out", weights=weights, normalize=False)
    got = load_file(work / "out" / "model.safetensors")
    for key, value in pair[1].state_dict().items():
        torch.testing.assert_close(got[key], sum(weights) * value)
    with pytest.raises(MergeidError, match="'slerp' needs weights that sum to 1"):
        plain(work / "a", work / "b", output=work / "o", method="slerp", weights=weights, normalize=False)


def test_recipes_are_told_of_their_own_keys() -> None:
    from mergeid.methods.recipe import parse_recipe

    models = {"models": [{"model": "a"}, {"model": "b"}]}
    with pytest.raises(MergeidError, match=r"'ties' needs the model .*; add base_model") as caught:
        parse_recipe({"merge_method": "ties", **models})
    assert "--" not in str(caught.value)
    with pytest.raises(MergeidError, match="'linear' uses no base model; leave out base_model") as caught:
        parse_recipe({"merge_method": "linear", "base_model": "c", **models})
    assert "--" not in str(caught.value)


@pytest.mark.parametrize("matcher", [None, "layerwise", "weight"])
def test_skipping_all_tensors_of_a_space(tmp_path: Path, matcher: str | None) -> None:
    """A classifier and a masked model on one encoder: whole spaces lie in what is skipped."""
    fields = {k: v for k, v in configs()["BertForMaskedLM"].items() if k not in ("model_type", "architectures")}
    torch.manual_seed(0)
    a, b = BertForSequenceClassification(BertConfig(**fields)), BertForMaskedLM(BertConfig(**fields))
    b.bert.load_state_dict(a.bert.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in b.bert.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    for name, model in (("a", a), ("b", b)):
        model.save_pretrained(tmp_path / name)
    skip = ["classifier.*", "cls.*", "bert.pooler.*"]
    match = "always" if matcher == "layerwise" else "auto"
    merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "out", skip=skip, matcher=matcher, match=match)
    got, key = load_file(tmp_path / "out" / "model.safetensors"), "bert.encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(got[key], (a.state_dict()[key] + b.state_dict()[key]) / 2)


def test_foreign_code_merges_as_it_lies(work: Path) -> None:
    for name in "ab":
        edit(work / name, model_type="mychat", auto_map={"AutoConfig": "configuration_mychat.C"})
    with pytest.raises(
        MergeidError, match=r"never runs code that comes with a checkpoint.*--match never, which builds"
    ):
        merge(work / "a", work / "b", output=work / "out")
    plain(work / "a", work / "b", output=work / "out")
    edit(work / "b", rms_norm_eps=0.1)
    with pytest.raises(MergeidError, match=r"differ in rms_norm_eps \(1e-06 and 0.1\)"):
        plain(work / "a", work / "b", output=work / "out2")


def test_sketches_of_two_functions(work: Path) -> None:
    text = work / "text.txt"
    text.write_text("one line\nanother\n" * 20)
    shutil.copytree(work / "b", work / "c")
    edit(work / "b", use_cache=False, attention_dropout=0.1)
    edit(work / "c", hidden_act="relu")
    tokens = {"input_ids": torch.randint(0, 90, (16, 8)), "labels": torch.randint(0, 90, (16, 8))}
    save_file(tokens, work / "data.safetensors")
    made = [
        mergeid.sketch(work / name, data=str(work / "data.safetensors"), output=work / f"{name}.sketch")
        for name in ("a", "b", "c")
    ]
    assert len(mergeid.predict_sketches([work / "a.sketch", made[1]]).pairs) == 1
    with pytest.raises(
        MergeidError, match=r"differ in hidden_act \(silu and relu\).*make both sketches with the config"
    ):
        mergeid.predict_sketches([work / "a.sketch", work / "c.sketch"])
    again = mergeid.sketch(work / "c", data=str(work / "data.safetensors"), arch=str(work / "a" / "config.json"))
    assert len(mergeid.predict_sketches([made[0], again]).pairs) == 1
