"""What a recipe says of the result's tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from string import ascii_lowercase

from mergeid.errors import MergeidError
from mergeid.io.recipe_schema import ModelTokenEntry, RecipeFile, TokenEntry, ZeroEntry
from mergeid.request.vocabulary import TokenRow, Vocabulary

_OLD = "model:"
"""How older recipes of mergekit begin the name of the model whose tokenizer is meant."""


def vocabulary_of(told: RecipeFile, models: Sequence[str], base: str | None) -> Vocabulary | None:
    """The tokens that a recipe asks for; None: all models have the same.

    Args:
        models, base: as the merge gets them.

    Raises:
        MergeidError: models that the recipe does not merge, or both spellings of the setting.
    """
    entry = told.tokenizer
    if entry is not None and told.tokenizer_source is not None:
        raise MergeidError("tokenizer and tokenizer_source are the same setting; give only one")
    source = told.tokenizer_source if entry is None else entry.source
    if source is None:
        return None
    if source not in models:
        source = source.removeprefix(_OLD)

    def letter(name: str, whose: str) -> str:
        if name in models[: len(ascii_lowercase)]:
            return ascii_lowercase[models.index(name)]
        if name == base:
            return "base"
        raise MergeidError(f"{whose} is that of {name!r}, which is not a model of the recipe; expected one of them")

    def row(token: str, one: TokenEntry) -> TokenRow:
        if isinstance(one.source, ZeroEntry):
            return TokenRow(None, None, one.force)
        whose = f"tokenizer.tokens: the row of {token!r}"
        if isinstance(one.source, ModelTokenEntry):
            other = one.source.token if one.source.token is not None else one.source.token_id
            return TokenRow(letter(one.source.model, whose), other, one.force)
        return TokenRow(letter(one.source, whose), None, one.force)

    like = None
    if told.base_model is not None and told.base_model in (*models, base):
        like = letter(told.base_model, "base_model")
    if source == "base":
        source = like or told.base_model or "a"  # a base that is not merged lends its tokens all the same
    elif source != "union" and (source in (*models, base) or not os.path.isdir(source)):
        source = letter(source, "the tokenizer")
    tokens = entry.tokens or {} if entry is not None else {}
    multiple = (entry.pad_to_multiple_of if entry is not None else None) or 1
    return Vocabulary(source, like, {token: row(token, one) for token, one in tokens.items()}, multiple)
