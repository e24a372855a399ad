"""Rows of embeddings and heads brought together by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

import mergeid
from mergeid.errors import MergeidError

WEIGHTS = "model.safetensors"
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def llama(out: Path, seed: int, rows: int, tokens: list[str] | None = None, extra: tuple[str, ...] = ()) -> Path:
    """A small Llama with that many rows; with tokens, a tokenizer of these and of added ones."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(out)
    if tokens is not None:
        core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token=tokens[0])
        fast.add_special_tokens({"additional_special_tokens": list(extra)})
        fast.save_pretrained(out)
    return out


def merged(out: Path, *sources: Path, **told: object) -> dict[str, torch.Tensor]:
    mergeid.merge(list(sources), output=out, match="never", force=True, **told)
    return load_file(out / WEIGHTS)


@pytest.mark.parametrize(("choice", "rows"), [("a", 40), ("b", 44), ("union", 44)])
def test_padded_rows(tmp_path: Path, choice: str, rows: int) -> None:
    a, b = llama(tmp_path / "a", 0, 40), llama(tmp_path / "b", 1, 44)
    x, y = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    with pytest.raises(MergeidError, match=r"40 and 44 rows.*--tokenizer union"):
        mergeid.merge(a, b, output=tmp_path / "no", match="never")
    found = merged(tmp_path / "out", a, b, tokenizer=choice)
    for name in ROWS:
        assert len(found[name]) == rows
        torch.testing.assert_close(found[name][:40], (x[name] + y[name][:40]) / 2)
        assert torch.equal(found[name][40:], y[name][40:rows])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_rows_follow_their_tokens(tmp_path: Path) -> None:
    """The same tokens in another order, some of a alone and some of b alone, in rows that both have."""
    words = [f"w{i}" for i in range(20)]
    a = llama(tmp_path / "a", 0, 32, words, ("<x>",))
    b = llama(tmp_path / "b", 1, 32, words[::-1], ("<y>", "<x>"))
    x, y = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    rows = [{t: i for t, i in transformers.AutoTokenizer.from_pretrained(p).get_vocab().items()} for p in (a, b)]
    with pytest.raises(MergeidError, match=r"tokenizers differ.*--tokenizer a"):
        mergeid.merge(a, b, output=tmp_path / "no", match="never")
    for choice, first in (("a", 0), ("b", 1), ("union", 1)):
        out = tmp_path / f"out-{choice}"
        found = merged(out, a, b, tokenizer=choice, weights=[0.25, 0.75])
        saved = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
        assert saved == rows[first]
        for name in ROWS:
            for token, row in saved.items():
                if token in rows[0] and token in rows[1]:
                    expected = 0.25 * x[name][rows[0][token]] + 0.75 * y[name][rows[1][token]]
                else:  # of one model alone
                    have, at = (x, rows[0]) if token in rows[0] else (y, rows[1])
                    expected = have[name][at[token]]
                torch.testing.assert_close(found[name][row], expected)
    inside = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(found[inside], 0.25 * x[inside] + 0.75 * y[inside])


def test_a_base_without_the_added_tokens(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(20)]
    base, a, b = (llama(tmp_path / n, i, 24, words, ("<x>",) * (n != "base")) for i, n in enumerate(("base", "a", "b")))
    told = {"base": base, "method": "task_arithmetic", "weights": [0.5, 0.5]}
    found = merged(tmp_path / "out", a, b, tokenizer="a", **told)
    name = ROWS[0]
    x, y = load_file(a / WEIGHTS)[name], load_file(b / WEIGHTS)[name]
    torch.testing.assert_close(found[name], (x + y) / 2)


def test_what_is_refused(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(20)]
    a = llama(tmp_path / "a", 0, 24, words, ("<x>",))
    b = llama(tmp_path / "b", 1, 24, words, ("<y>",))
    with pytest.raises(MergeidError, match=r"no model has every token: .*b has '<y>'.*--tokenizer a"):
        merged(tmp_path / "out", a, b, tokenizer="union")
    for choice in ("c", "base", "both"):
        with pytest.raises(MergeidError, match=f"--tokenizer '{choice}' is not the letter of a model"):
            merged(tmp_path / "out", a, b, tokenizer=choice)
