"""Whose tokens a result has, and where the rows of single tokens come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenRow:
    """Where the row of one token comes from, in the embedding and in the head.

    Attributes:
        model: "a", "b", … or "base"; None: zeros.
        token: another token of that model, or the number of one of its rows; None: the same token.
        force: for every model, also for those that have the token.
    """

    model: str | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a result.

    Attributes:
        source: "union"; "a", "b", … or "base"; or a folder with a tokenizer.
        like: the model that a union starts from, and whose row a token gets in models without it; None: the base, and
            where there is none, a union starts from the first model.
        tokens: token -> its row. Those that the tokenizer lacks are added to it.
        multiple: what the number of rows is rounded up to, padding rows of the models being left out; None: those of
            the model that `source` names, or that the union starts from, stay.
    """

    source: str
    like: str | None = None
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    multiple: int | None = None

    @classmethod
    def of(cls, given: str | Vocabulary | None) -> Vocabulary | None:
        """What a caller says."""
        return cls(given) if isinstance(given, str) else given
