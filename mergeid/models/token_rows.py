"""Rows of embeddings and heads, put where a vocabulary has their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergeid.io.derived import Formed
from mergeid.io.tensors import TensorSource
from mergeid.plugins import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_PADDING = "\0"
"""Begins what stands for the token of a row that has none."""
_PIECE = 4096
"""Rows that are formed at a time."""


@dataclass(frozen=True)
class Rows:
    """A model's rows by token.

    Attributes:
        size: number of rows.
        of: token -> row; rows without a token (padding) bear their number as one.
        named: whether the tokens are those of a tokenizer.
    """

    size: int
    of: dict[str, int]
    named: bool

    @classmethod
    def among(cls, size: int, tokens: Mapping[str, int] | None) -> Rows:
        """So many rows, of which these have tokens."""
        known = {t: row for t, row in (tokens or {}).items() if 0 <= row < size}
        used = set(known.values())
        padding = {f"{_PADDING}{row}": row for row in range(size) if row not in used}
        return cls(size, {**known, **padding}, tokens is not None)

    def rounded(self, multiple: int) -> Rows:
        """The rows that have tokens, and as many more as the multiple asks for."""
        last = max(self.tokens.values(), default=-1) + 1
        return Rows(-(-last // multiple) * multiple, self.tokens, self.named)

    @cached_property
    def at(self) -> dict[int, str]:
        """Row -> token."""
        return {row: token for token, row in self.of.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """Without padding; where there is no tokenizer, all."""
        return {t: row for t, row in self.of.items() if not (self.named and t.startswith(_PADDING))}


@dataclass(frozen=True)
class Target:
    """What all models get.

    Attributes:
        rows: of the result.
        folder: where its tokenizer lies; None: there is none.
        files: of the tokenizer, those that change, by name.
        like: the model whose row a token gets elsewhere; None, and where it has none: the mean of those that have it.
        given: token -> (model, row) that it is taken from; None: zeros.
        forced: those tokens for which that is so in all models.
    """

    rows: Rows
    folder: Path | None
    files: dict[str, str]
    like: int | None
    given: dict[str, tuple[int, int] | None]
    forced: frozenset[str]


def reordered(at: int, name: str, models: Sequence[TensorSource], rows: Sequence[Rows], target: Target) -> Formed:
    """One model's tensor (size, …) with a row for every token of the result, at (target.rows.size, …).

    Rows without a token get the mean of the others.
    """
    info, own = models[at].table[name], rows[at].of
    kept = {row: own[t] for t, row in target.rows.of.items() if t in own and t not in target.forced}
    lacking = {t: row for t, row in target.rows.of.items() if row not in kept}
    bare = [row for row in range(target.rows.size) if row not in kept and row not in set(lacking.values())]

    def form() -> Tensor:
        import torch

        mine = models[at].tensor(name)
        found = torch.zeros((target.rows.size, *info.shape[1:]), dtype=mine.dtype)
        found[torch.tensor(list(kept), dtype=torch.long)] = mine[torch.tensor(list(kept.values()), dtype=torch.long)]
        if lacking:
            tensors = [mine if i == at else m.tensor(name) for i, m in enumerate(models)]
            for tokens in _pieces(list(lacking)):
                found[[lacking[t] for t in tokens]] = _elsewhere(tokens, tensors, rows, target).to(mine.dtype)
        if bare:
            found[bare] = (found.sum(0, dtype=torch.float64) / max(len(found) - len(bare), 1)).to(mine.dtype)
        return found

    told = (at, [r.of for r in rows], target.rows.of, target.like, target.given, sorted(target.forced))
    how = hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()
    made = TensorInfo(info.dtype, (target.rows.size, *info.shape[1:]))
    return Formed(made, form, tuple((m, name) for m in models), how)


def _elsewhere(tokens: Sequence[str], tensors: Sequence[Tensor], rows: Sequence[Rows], target: Target) -> Tensor:
    """Rows (tokens, …) in float64 of tokens that a model lacks, from those that have them."""
    import torch

    total = torch.zeros((len(tokens), *tensors[0].shape[1:]), dtype=torch.float64)
    count = torch.zeros(len(tokens), dtype=torch.float64)
    ahead = target.like
    for i in sorted(range(len(tensors)), key=lambda i: i != ahead):
        first = {} if ahead is None else rows[ahead].of
        has = {k: rows[i].of[t] for k, t in enumerate(tokens) if t in rows[i].of and (i == ahead or t not in first)}
        to, of = (torch.tensor(list(side), dtype=torch.long) for side in (has, has.values()))
        total[to] += tensors[i][of].double()
        count[to] += 1
    total /= count.clamp(min=1).reshape(-1, *[1] * (total.dim() - 1))
    for k, token in enumerate(tokens):
        if token in target.given:
            source = target.given[token]
            total[k] = 0.0 if source is None else tensors[source[0]][source[1]].double()
    return total


def _pieces(tokens: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(tokens), _PIECE):
        yield tokens[start : start + _PIECE]
