"""Names of models in recipes, as text and as tables."""

from __future__ import annotations

from typing import Any

import pytest

from mergeid.errors import MergeidError
from mergeid.methods.recipe import parse_recipe


def recipe(model: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": model}]}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("org/a@v1+l", "org/a@v1+l"),
        ({"model": "a"}, "a"),
        ({"model": {"path": "org/a", "revision": "v1"}, "lora": "b"}, "org/a@v1+b"),
        ({"model": "a", "lora": {"path": "org/l", "revision": "v2"}}, "a+org/l@v2"),
        ({"model": {"path": "a", "revision": None}, "lora": None, "override_architecture": None}, "a"),
    ],
)
def test_a_table_says_the_same_as_text(written: Any, name: str) -> None:
    assert parse_recipe(recipe(written)).models == [name]


@pytest.mark.parametrize(
    ("written", "match"),
    [
        (3, r"models\[0\].model is 3; expected a path or hub id, or a table with model \(path, revision\) and lora"),
        ({"path": "a"}, "expected a path or hub id"),
        ({"model": "a", "adapter": "l"}, "expected a path or hub id"),
        ({"model": {"path": "a", "revision": 1}}, "expected a path or hub id"),
        ({"model": "a", "override_architecture": "X"}, "has the key 'override_architecture', which is not supported"),
    ],
)
def test_what_names_no_model_is_refused(written: Any, match: str) -> None:
    with pytest.raises(MergeidError, match=match):
        parse_recipe(recipe(written))


def test_the_base_lends_its_tokens_where_it_is_not_merged() -> None:
    told: dict[str, Any] = {"base_model": "b", "tokenizer_source": "base"}
    told |= {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}
    found = parse_recipe(told).tokenizer
    assert found is not None and found.source == "b"
