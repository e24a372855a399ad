"""Small files beside the weights in which models differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergeid.io.opening import open_checkpoint
from mergeid.models.beside import differences_beside


def folder(path: Path, **files: Any) -> Path:
    path.mkdir()
    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    for name, content in files.items():
        place = path / name.replace("__", "/").replace("DOT", ".")
        place.parent.mkdir(exist_ok=True)
        place.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


CONFIG, GENERATION, JINJA = "configDOTjson", "generation_configDOTjson", "chat_templateDOTjinja"
MODULES, POOLING = "modulesDOTjson", "1_Pooling__configDOTjson"
LISTED = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}]
ENDS: list[dict[str, Any]] = [{"eos_token_id": n} for n in (2, 7, [2], [2, 5])]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "nothing": ({}, {}, None),
    "one end in two forms": ({GENERATION: ENDS[0]}, {GENERATION: ENDS[2]}, None),
    "ends": ({CONFIG: ENDS[0]}, {CONFIG: ENDS[1]}, r"eos_token_id \(2 and 7\), which generation uses"),
    "ends of generation": (
        {GENERATION: ENDS[3]},
        {GENERATION: ENDS[0], CONFIG: ENDS[1]},
        r"eos_token_id \(\[2, 5\] and 2\)",
    ),
    "inside": ({CONFIG: {"text_config": {"pad_token_id": 0}}}, {CONFIG: {"pad_token_id": 1}}, r"pad_token_id \(0 and"),
    "generation": ({}, {GENERATION: {}}, "b has generation_config.json; the result has none, since .*a has none"),
    "tokenizer": ({}, {"tokenizerDOTjson": {}}, r"b has a tokenizer; the result has none, .*\(--tokenizer b takes it"),
    "unread": ({"tokenizerDOTmodel": "x"}, {"tokenizerDOTmodel": "y"}, "its tokens are not compared"),
    "template": ({}, {JINJA: "x"}, r"b has a chat template; the result has none, .*\(--chat-template b takes"),
    "templates": ({JINJA: "x"}, {JINJA: "y"}, "different chat templates; the result has that of .*a "),
    "one template": ({JINJA: "x"}, {JINJA: "x "}, None),
    "pooling": (
        {MODULES: LISTED, POOLING: {"pooling_mode": "mean"}},
        {MODULES: LISTED, POOLING: {"pooling_mode": "cls"}},
        "1_Pooling/config.json: pooling_mode .*mean.* and .*cls.*; the result has that of .*a",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_said(tmp_path: Path, case: str) -> None:
    """Nothing was said of it."""
    mine, theirs, said = CASES[case]
    models = [open_checkpoint(folder(tmp_path / "a", **mine)), open_checkpoint(folder(tmp_path / "b", **theirs))]
    found = differences_beside(models, tokens=False, template=False)
    if said is None:
        assert found == []
        return
    (note,) = found
    assert re.search(said, note)


def test_what_was_chosen_is_not_said_again(tmp_path: Path) -> None:
    mine = {"tokenizerDOTjson": {}, "chat_templateDOTjinja": "x", CONFIG: {"eos_token_id": 2}}
    theirs = {"chat_templateDOTjinja": "y", CONFIG: {"eos_token_id": 3}}
    models = [open_checkpoint(folder(tmp_path / n, **f)) for n, f in (("a", mine), ("b", theirs))]
    assert differences_beside(models, tokens=True, template=True) == []
