"""Rows of embeddings and heads brought together by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import mergeid
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.methods.recipe import parse_recipe
from mergeid.request.vocabulary import TokenRow, Vocabulary
from mergeid.stages.recipe import prepared

WEIGHTS = "model.safetensors"
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def llama(
    out: Path,
    seed: int,
    rows: int,
    tokens: list[str] | None = None,
    extra: tuple[str, ...] = (),
    *,
    tied: bool = False,
    end: int = 2,
) -> Path:
    """A small Llama with that many rows; with tokens, a tokenizer of these and of added ones."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=end, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(out)
    if tokens is not None:
        core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
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


WORDS = {
    "a": ([f"w{i}" for i in range(12)] + ["left"], ("<x>", "<both>")),
    "b": (["right", *[f"w{i}" for i in range(4, 16)]], ("<y>", "<both>")),
    "base": ([f"w{i}" for i in range(8)], ()),
}


def rows_of(folder: Path) -> dict[str, int]:
    found: dict[str, int] = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return found


def row_of(token: str, models: list[Path], tensor: str, first: Path | None = None) -> list[torch.Tensor]:
    """By hand: each model's row of a token; where it has none, that of `first`, or the mean of the others'."""
    own = [load_file(m / WEIGHTS)[tensor][rows_of(m)[token]] if token in rows_of(m) else None for m in models]
    have = [row for row in own if row is not None]
    preferred = None if first is None else own[models.index(first)]
    other = preferred if preferred is not None else torch.stack(have).mean(0)
    return [other if row is None else row for row in own]


@pytest.mark.parametrize("tied", [False, True])
def test_union_where_each_has_its_own_tokens(tmp_path: Path, tied: bool) -> None:
    a, b = (llama(tmp_path / n, i, 20, *WORDS[n], tied=tied, end=5 + i) for i, n in enumerate("ab"))
    out = tmp_path / "out"
    found = merged(out, a, b, tokenizer="union", weights=[0.25, 0.75])
    rows = rows_of(out)
    assert rows.keys() == rows_of(a).keys() | rows_of(b).keys() and len(set(rows.values())) == len(rows)
    assert rows_of(a).items() <= rows.items()  # those of the first stay where they are
    for name in ROWS[: 1 if tied else 2]:
        assert len(found[name]) == max(rows.values()) + 1 == 21
        for token, row in rows.items():
            x, y = row_of(token, [a, b], name)
            torch.testing.assert_close(found[name][row], 0.25 * x + 0.75 * y)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "w1 left right <y> w15 <x>"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]) == text.split()
    assert tokenizer.decode([rows["<y>"], rows["w15"]], skip_special_tokens=True) == "w15"
    named = [set(transformers.AutoTokenizer.from_pretrained(m).all_special_tokens) for m in (out, a, b)]
    assert named[0] == named[1] | named[2]  # those of b were only known to the tokenizer's core
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 21 and model.config.eos_token_id == model.generation_config.eos_token_id == 5
    assert model(torch.tensor([list(rows.values())])).logits.isfinite().all()


def test_a_tied_and_an_untied_model(tmp_path: Path) -> None:
    """The head of the tied one is its embedding, for tokens that only one of the two has as well."""
    a = llama(tmp_path / "a", 0, 20, *WORDS["a"], tied=True)
    b = llama(tmp_path / "b", 1, 20, *WORDS["b"])
    found = merged(tmp_path / "out", a, b, tokenizer="union")
    x, y = load_file(a / WEIGHTS)[ROWS[0]], load_file(b / WEIGHTS)[ROWS[1]]
    for token, row in rows_of(tmp_path / "out").items():
        have = [t[rows_of(m)[token]] for t, m in ((x, a), (y, b)) if token in rows_of(m)]
        torch.testing.assert_close(found[ROWS[1]][row], torch.stack(have).mean(0))


def test_the_base_comes_first(tmp_path: Path) -> None:
    """A union begins with the base's tokenizer, and its row stands for the models without a token."""
    places = {n: llama(tmp_path / n, i, 20, *words) for i, (n, words) in enumerate(WORDS.items())}
    out, models = tmp_path / "out", list(places.values())
    told = {"base": places["base"], "method": "task_arithmetic", "weights": [0.5, 0.25]}
    found = merged(out, *models[:2], tokenizer="union", **told)
    rows = rows_of(out)
    assert rows_of(places["base"]).items() <= rows.items()
    for name in ROWS:
        for token, row in rows.items():
            x, y, origin = row_of(token, models, name, places["base"])
            torch.testing.assert_close(found[name][row], origin + 0.5 * (x - origin) + 0.25 * (y - origin))


def test_special_tokens_follow(tmp_path: Path) -> None:
    """Under the tokens of b its special tokens count; left to union, the first model's, by their new numbers."""
    words = [f"w{i}" for i in range(8)]
    a = llama(tmp_path / "a", 0, 9, words, ("<a>",), end=8)
    b = llama(tmp_path / "b", 1, 11, [*words, "w8", "w9"], ("<b>",), end=10)
    for choice, end in (("a", "<a>"), ("b", "<b>"), ("union", "<a>")):
        out = tmp_path / f"out-{choice}"
        merged(out, a, b, tokenizer=choice)
        for file in ("config.json", "generation_config.json"):
            assert json.loads((out / file).read_text())["eos_token_id"] == rows_of(out)[end]


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    """The tokens of any folder, some of which no model has."""
    a, b = (llama(tmp_path / n, i, 20, *WORDS[n]) for i, n in enumerate("ab"))
    other = llama(tmp_path / "other", 2, 6, ["w4", "w3", "right", "new"], ("<x>",))
    out = tmp_path / "out"
    result = mergeid.merge(a, b, output=out, match="never", tokenizer=str(other))
    assert any("no model has a row for 'new'" in note for note in result.notes)
    found = load_file(out / WEIGHTS)[ROWS[0]]
    assert rows_of(out) == rows_of(other) and len(found) == 5 and not found[3].any()
    for token in ("w4", "w3", "right", "<x>"):
        torch.testing.assert_close(found[rows_of(out)[token]], sum(row_of(token, [a, b], ROWS[0])) / 2)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    a, b = llama(tmp_path / "a", 0, 20, *WORDS["a"]), llama(tmp_path / "b", 1, 24)
    result = mergeid.merge(a, b, output=tmp_path / "out", match="never", tokenizer="a")
    assert any("rows are taken to be those of" in note for note in result.notes)
    x, y = (load_file(m / WEIGHTS)[ROWS[0]] for m in (a, b))
    torch.testing.assert_close(load_file(tmp_path / "out" / WEIGHTS)[ROWS[0]], (x + y[:20]) / 2)
    short = llama(tmp_path / "short", 1, 8)
    with pytest.raises(MergeidError, match=r"short has no tokenizer that can be read, and 8 rows, fewer"):
        merged(tmp_path / "no", a, short, tokenizer="a")


def test_rows_of_single_tokens(tmp_path: Path) -> None:
    a, b = (llama(tmp_path / n, i, 20, *WORDS[n]) for i, n in enumerate("ab"))
    told = {
        "left": TokenRow("b", "right"),  # for b alone, which lacks it
        "w5": TokenRow("b", force=True),
        "w6": TokenRow("a", 3, force=True),
        "w7": TokenRow("a"),  # all have it
        "<new>": TokenRow(None),
        "<copy>": TokenRow("a", "w1"),
    }
    out = tmp_path / "out"
    found = merged(out, a, b, tokenizer=Vocabulary("union", tokens=told, multiple=16))
    rows = rows_of(out)
    assert rows.keys() == rows_of(a).keys() | rows_of(b).keys() | {"<new>", "<copy>"}
    for name in ROWS:
        x, y = (load_file(m / WEIGHTS)[name] for m in (a, b))
        at = rows_of(a), rows_of(b)
        expected = {
            "left": (x[at[0]["left"]] + y[at[1]["right"]]) / 2,
            "w5": y[at[1]["w5"]],
            "w6": x[3],
            "w7": (x[at[0]["w7"]] + y[at[1]["w7"]]) / 2,
            "<new>": torch.zeros(16),
            "<copy>": x[at[0]["w1"]],
        }
        for token, row in expected.items():
            torch.testing.assert_close(found[name][rows[token]], row)
        assert len(found[name]) == 32
        torch.testing.assert_close(found[name][24:], found[name][:24].mean(0).expand(8, -1))
    with pytest.raises(MergeidError, match=r"row of token '<new>' is to be that of 'w99' in .*b, which has no such"):
        merged(out, a, b, tokenizer=Vocabulary("union", tokens={"<new>": TokenRow("b", "w99")}))


def test_recipes_with_slices(tmp_path: Path) -> None:
    """Embedding of one model, head of another: both by the same tokens."""
    a, b = (llama(tmp_path / n, i, 20, *WORDS[n]) for i, n in enumerate("ab"))
    slices = [{"sources": [{"model": str(m), "layer_range": [0, 1]}]} for m in (a, b)]
    told = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}
    with pytest.warns(MergeidWarning, match="rows of .* belong to tokens of the result"):
        done = prepared(parse_recipe(told), {})
    assert done.recipe.tokenizer is None
    out = tmp_path / "out"
    mergeid.merge(done.models, output=out, match="never", method="passthrough")
    found = load_file(out / WEIGHTS)
    for token, row in rows_of(out).items():
        for i, name in enumerate(ROWS):
            torch.testing.assert_close(found[name][row], row_of(token, [a, b], name)[i])
    transformers.LlamaForCausalLM.from_pretrained(out)


def test_what_is_refused(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(20)]
    a = llama(tmp_path / "a", 0, 24, words, ("<x>",))
    b = llama(tmp_path / "b", 1, 24, words, ("<y>",))
    for choice in ("c", "base", "both"):
        with pytest.raises(MergeidError, match=f"--tokenizer '{choice}' is not the letter of a model"):
            merged(tmp_path / "out", a, b, tokenizer=choice)
    with pytest.raises(MergeidError, match=r"model\.safetensors is not a folder; expected one with a tokenizer"):
        merged(tmp_path / "out", a / WEIGHTS, b, tokenizer="union")
    with pytest.raises(MergeidError, match=r"empty has no tokenizer that can be read; expected tokenizer\.json"):
        (tmp_path / "empty").mkdir()
        merged(tmp_path / "out", a, b, tokenizer=str(tmp_path / "empty"))
    (a / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (a / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate([*words, "<z>"])}))
    with pytest.raises(MergeidError, match=r"has no tokenizer\.json, to which tokens can be added"):
        merged(tmp_path / "out", a, b, tokenizer="union")
