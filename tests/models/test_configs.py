"""Configs of models that meet: what changes the function is reported, what does not is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mergeid_timm import TimmAdapter
from mergeid_transformers import TransformersAdapter
from mergeid_transformers.configs import library_config
from safetensors.torch import save_file
from tiny_transformers import configs
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mergeid
from mergeid.basics.nested import returned_tensors
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.models.configs import agree, index_of
from mergeid.plugins import Architecture

ADAPTER = TransformersAdapter()
SAVED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "configs_transformers_4.json").read_text()
)
"""Name -> settings, and the config.json that transformers 4.51 saved for them."""


def plain(config: Any) -> Any:
    return json.loads(json.dumps(config, default=str))


def reported(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Fields that stop a merge."""
    return [d.field for d in ADAPTER.config_differences(a, b) if d.effect != "inputs"]


@pytest.mark.parametrize("name", SAVED)
def test_versions_of_the_library_do_not_count(name: str) -> None:
    """As saved by transformers 4, by 5, with all defaults written out, and with none."""
    case = SAVED[name]
    made = CONFIG_MAPPING[case["model_type"]](**copy.deepcopy(case["settings"]))
    made.architectures = case["architectures"]
    forms = {
        "4": case["saved"],
        "5": plain(made.to_diff_dict()),
        "all": plain(made.to_dict()),
        "bare": {"model_type": case["model_type"], **case["settings"]},
    }
    for one, two in (("4", "5"), ("5", "4"), ("4", "all"), ("bare", "4"), ("all", "5"), ("5", "bare")):
        assert reported(forms[one], forms[two]) == [], (one, two)


@pytest.mark.parametrize(
    "change",
    [
        {"torch_dtype": "bfloat16"},
        {"dtype": "float16"},
        {"use_cache": False},
        {"_name_or_path": "org/other", "transformers_version": "4.40.1"},
        {"attn_implementation": "sdpa", "_attn_implementation_autoset": True},
        {"hidden_dropout_prob": 0.3, "attention_dropout": 0.2},
        {"initializer_range": 0.5},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}},
        {"problem_type": "multi_label_classification"},
        {"gradient_checkpointing": True},
        {"rope_scaling": None, "mlp_bias": False, "attention_bias": False},
        {"head_dim": 8},
        {"pad_token_id": 5, "eos_token_id": [2, 7], "bos_token_id": 3},
        {"unsloth_version": "2024.9", "unsloth_fixed": True},
        {"vocab_size": 120},
        {"max_position_embeddings": 80},
        {"architectures": None},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_theta": 10000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_harmless_fields_of_a_decoder(change: dict[str, Any]) -> None:
    saved = SAVED["llama"]["saved"]
    for config in (saved, {k: v for k, v in saved.items() if not k.startswith("rope")}):
        assert reported(config, {**config, **change}) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_theta": 1e6}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"num_attention_heads": 2, "head_dim": 16}),
        ("llama", {"rms_norm_eps": 1e-5}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"model_type": "mistral"}),
        ("llama scaled", {"rope_scaling": {**SAVED["llama scaled"]["settings"]["rope_scaling"], "factor": 4.0}}),
        ("mistral", {"sliding_window": 8}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("gemma2", {"attn_logit_softcapping": 20.0}),
        ("gemma2", {"final_logit_softcapping": 10.0}),
        ("gemma2", {"query_pre_attn_scalar": 64}),
        ("gemma3 text", {"sliding_window_pattern": 2}),
        ("phi", {"partial_rotary_factor": 0.25}),
        ("gpt_neox", {"rotary_pct": 1.0}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("falcon", {"alibi": True}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"n_head": 2}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"layer_norm_eps": 1e-3}),
        ("bert", {"is_decoder": True}),
        ("roberta", {"pad_token_id": 0}),
        ("opt", {"do_layer_norm_before": False}),
        ("t5", {"tie_word_embeddings": False}),
        ("t5", {"layer_norm_epsilon": 1e-3}),
        ("bart", {"scale_embedding": True}),
        ("bart", {"decoder_attention_heads": 2}),
        ("vit", {"layer_norm_eps": 1e-3}),
        ("swin", {"num_heads": [4, 2]}),
        ("clip", {"text_config": {**SAVED["clip"]["saved"]["text_config"], "hidden_act": "gelu"}}),
        ("wav2vec2", {"conv_stride": [4, 2]}),
        ("deberta-v2", {"pos_att_type": ["p2c"]}),
        ("modernbert", {"global_attn_every_n_layers": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_fields_that_change_the_function(name: str, change: dict[str, Any]) -> None:
    saved = SAVED[name]["saved"]
    assert reported(saved, {**saved, **change}) != []
    assert reported({**saved, **change}, saved) != []


def test_classes_of_equal_tensors() -> None:
    saved = SAVED["bert classes"]["saved"]
    other = {**saved, "architectures": ["BertForMultipleChoice"]}
    (found,) = ADAPTER.config_differences(saved, other)
    assert found.field == "architectures" and found.effect == "head"
    assert ADAPTER.config_differences(saved, {**saved, "architectures": ["TFBertForSequenceClassification"]}) == []


def test_code_that_nobody_has() -> None:
    config = {"model_type": "mychat", "auto_map": {"AutoConfig": "c.C"}, "hidden_size": 8, "torch_dtype": "float16"}
    assert reported(config, {**config, "torch_dtype": "float32"}) == []
    assert reported(config, {**config, "scale": 2.0}) == ["scale"]


def test_the_chosen_config() -> None:
    """The other model's function, with one's own storage, labels and tokens."""
    ours = {**SAVED["llama"]["saved"], "torch_dtype": "bfloat16", "vocab_size": 120}
    theirs = {**SAVED["llama theta"]["saved"], "transformers_version": "5.0.0", "hidden_act": "gelu"}
    found = ADAPTER.adopted(ours, theirs, head=False)
    assert reported(found, theirs) == [] and set(reported(found, ours)) == {"hidden_act", "rope_parameters.rope_theta"}
    assert found["torch_dtype"] == "bfloat16" and found["vocab_size"] == 120
    assert ADAPTER.adopted(ours, ours, head=True) == ours


def checkpoint(name: str, config: dict[str, Any] | None) -> Checkpoint:
    return Checkpoint.from_tensors({"w": torch.zeros(2)}, source=name, config=config)


def test_agreeing() -> None:
    one, two = SAVED["llama"]["saved"], {**SAVED["llama"]["saved"], "rope_theta": 1e6, "rms_norm_eps": 1e-3}
    models = [checkpoint("A", one), checkpoint("B", two), checkpoint("C", one)]
    with pytest.raises(MergeidError) as caught:
        agree(models)
    said = str(caught.value)
    assert "A and B differ in" in said and "rope_theta (10000.0 and 1000000.0)" in said and "--config a|b|c" in said
    assert "rms_norm_eps (1e-06 and 0.001)" in said and "\n" not in said
    assert agree([models[0], models[2]]).record() == {}
    chosen = agree(models, models[1], config="c")
    assert chosen.base is not None
    assert all(reported(c.config or {}, one) == [] for c in (*chosen.models, chosen.base))
    chosen = agree(models, config="b")
    assert all(reported(c.config or {}, two) == [] for c in chosen.models)
    assert [c.config_changed for c in chosen.models] == [True, False, True]
    record = chosen.record()["config"]
    assert record["from"] == "B" and record["overruled"][0]["fields"]["rms_norm_eps"] == [1e-6, 1e-3]
    assert len(chosen.notes) == 1 and "the config of B" in chosen.notes[0]


def test_a_config_that_only_one_has() -> None:
    one = SAVED["llama"]["saved"]
    found = agree([checkpoint("A", None), checkpoint("B", one)])
    assert found.models[0].config == one and found.models[0].config_changed
    assert found.notes == ["A came without config.json; that of B was used"]
    assert agree([checkpoint("A", None), checkpoint("B", None)]).notes == []


def test_configs_of_a_library_that_nobody_knows() -> None:
    one = {"_class_name": "Net", "_version": "1", "act": "silu", "dtype": "float32", "num_classes": 3}
    agree([checkpoint("A", one), checkpoint("B", {**one, "_version": "2", "dtype": "float16", "num_classes": 4})])
    for change, said in (
        ({"act": "relu"}, r"act \(silu and relu\)"),
        ({"_class_name": "Other"}, r"architecture \(Net"),
    ):
        with pytest.raises(MergeidError, match=f"A and B differ in {said}"):
            agree([checkpoint("A", one), checkpoint("B", {**one, **change})])
        assert agree([checkpoint("A", one), checkpoint("B", {**one, **change})], config="a").models[1].config == one
    with pytest.raises(MergeidError, match=r"differ in architecture \(llama and resnet18\)"):
        agree([checkpoint("A", SAVED["llama"]["saved"]), checkpoint("B", {"architecture": "resnet18"})])


def test_what_names_a_model() -> None:
    assert [index_of(c, 3) for c in (None, "a", "c")] == [None, 0, 2]
    for wrong in ("d", "A", "first", ""):
        with pytest.raises(
            MergeidError, match=f"--config '{wrong}' is not the letter of a model; expected one of a, b, c"
        ):
            index_of(wrong, 3)


def test_timm() -> None:
    adapter = TimmAdapter()
    base = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {"mean": [0.5] * 3}}

    def fields(other: dict[str, Any], one: dict[str, Any] = base) -> list[tuple[str, str]]:
        return [(d.field, d.effect) for d in adapter.config_differences(one, other)]

    assert fields({**base, "architecture": "resnet18.a1_in1k", "num_features": 512}) == []
    assert fields({**base, "model_args": {"drop_rate": 0.3, "zero_init_last": False}}) == []
    assert fields({**base, "model_args": {"global_pool": "avg", "output_stride": 32}}) == []
    assert fields({**base, "model_args": {"global_pool": "max"}}) == [("model_args.global_pool", "function")]
    assert fields({**base, "architecture": "resnet18d"}) == [("architecture", "function")]
    assert fields({**base, "pretrained_cfg": {"mean": [0.4] * 3}}) == [("mean", "inputs")]
    vit = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32}}
    assert fields({**vit, "model_args": {"img_size": 32, "num_heads": 6}}, vit) == [
        ("model_args.num_heads", "function")
    ]
    assert fields({**vit, "model_args": {"img_size": 32, "num_heads": 3, "qkv_bias": True}}, vit) == []
    wide = {"architecture": "wide_resnet50_2"}
    assert fields(wide, {"architecture": "resnet50"}) == [("architecture", "width")]
    named = adapter.described(None, {"architecture": "timm/resnet18.tv_in1k"})
    assert named is not None and adapter.config_differences(base, named) == []


def outputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return returned_tensors(model(**{k: v for k, v in batch.items() if k != "labels"}))


def leaves(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def others(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(2 * value, 2)]
    if isinstance(value, float):
        return [3 * value + 0.1]
    if isinstance(value, str):
        return ["relu", "gelu_new"]
    if value is None:
        return [1, 0.5, True]
    numbers = isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value)
    return [[v + 1 for v in value]] if numbers else []


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(config)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return found


UNCOUNTED = (
    "output_hidden_states", "output_attentions", "return_dict", "tie_word_embeddings", "architectures", "model_type",
    "transformers_version",
)  # fmt: skip
"""Form of the output and by-products; and what is judged by itself."""


def silent(name: str, config: dict[str, Any], fields: str = "") -> tuple[int, list[str]]:
    """How many perturbed configs built a network of the same tensors, and what changed its outputs unreported."""

    def build(config: dict[str, Any]) -> nn.Module:
        options = {"config": config, "model_class": name, "pooler": True}
        return ADAPTER.build(Architecture("transformers", str(config["model_type"]), options)).double()

    full = {**plain(library_config(config["model_type"], config).to_dict()), "architectures": [name]}
    torch.manual_seed(0)
    model = build(full)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    arch = Architecture("transformers", config["model_type"], {"config": full, "model_class": name, "pooler": True})
    batch = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in ADAPTER.example_inputs(arch, model, torch.Generator().manual_seed(0), 2).items()
    }
    reference, state = outputs(model, batch), model.state_dict()
    shapes = {k: v.shape for k, v in state.items()}
    count, missed = 0, []
    for path, value in leaves(full):
        if path[-1] in UNCOUNTED or fields not in path[-1]:
            continue
        for other in others(value):
            perturbed = changed(full, path, other)
            try:
                again = build(perturbed)
                if {k: v.shape for k, v in again.state_dict().items()} != shapes:
                    continue
                again.load_state_dict(state)
                found = outputs(again, batch)
            except Exception:  # a config that means nothing
                continue
            count += 1
            same = found.keys() == reference.keys() and all(
                found[k].shape == t.shape and torch.allclose(found[k], t, rtol=1e-9, atol=1e-9, equal_nan=True)
                for k, t in reference.items()
            )
            if not same and not reported(full, perturbed):
                missed.append(f"{'.'.join(path)}: {value} -> {other}")
    return count, missed


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_no_field_is_silent(name: str) -> None:
    """Whatever single field changes the outputs is reported."""
    count, missed = silent(name, configs()[name], "e" if name.startswith("Bert") else "")
    assert missed == [] and count > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", configs())
def test_no_field_of_any_family_is_silent(name: str) -> None:
    count, missed = silent(name, configs()[name])
    assert missed == [] and count > 15


def test_texts_that_no_encoding_has_are_written_as_escapes(tmp_path: Path) -> None:
    """Half a character in a config of the one model, which the other lacks."""
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": torch.randn(4, 3, generator=torch.Generator().manual_seed(0))}, folder / "model.safetensors")
    (tmp_path / "b" / "config.json").write_text('{"note": "half \\udcff"}')
    mergeid.merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "o", match="never", config="b")
    assert json.loads((tmp_path / "o" / "config.json").read_text()) == {"note": "half \udcff"}


def test_a_template_that_no_encoding_has_is_refused(tmp_path: Path) -> None:
    """A template is a text file of its own, which has no escapes."""
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        (folder / "tokenizer_config.json").write_text('{"chat_template": "half \\udcff"}')
    with pytest.raises(MergeidError, match=r"chat_template.jinja would hold half a character \('.udcff'\)"):
        mergeid.merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "o", match="never", chat_template="b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
