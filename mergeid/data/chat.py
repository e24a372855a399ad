"""Conversations: lists of messages, written out by the chat template that lies beside the model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergeid.data.batching import told
from mergeid.errors import MergeidError

CHATS = ("messages", "conversations", "conversation")
"""Names under which records hold a list of messages."""
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""What data sets of ShareGPT's kind call the speakers."""


def chat_name(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The name under which all records have their messages; None: they are no conversations."""
    return next((n for n in CHATS if rows and all(isinstance(r.get(n), list) for r in rows)), None)


def written_out(rows: Sequence[Mapping[str, Any]], name: str, tokenizer: Any, source: str) -> list[dict[str, str]]:
    """``{"text": …}`` for each conversation, as the model was trained to read it.

    Args:
        name: under which they stand, as lists of ``{"role": …, "content": …}`` or ``{"from": …, "value": …}``.

    Raises:
        MergeidError: the tokenizer has no chat template, or it does not take these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise MergeidError(
            f"the data {source} holds conversations, but the tokenizer has no chat template; add chat_template.jinja "
            "to the model's folder, or give records with text"
        )
    return [{"text": _text(row[name], tokenizer, f"the data {source}, record {i},")} for i, row in enumerate(rows, 1)]


def _text(messages: Sequence[Any], tokenizer: Any, where: str) -> str:
    turns = [_turn(m, where) for m in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template is a program, and says what it likes
        raise MergeidError(f"{where} does not fit the model's chat template ({told(error)}); repair it") from error


def _turn(message: Any, where: str) -> dict[str, Any]:
    if isinstance(message, Mapping):
        if isinstance(message.get("role"), str):
            return dict(message)
        if isinstance(message.get("from"), str) and "value" in message:
            speaker = str(message["from"])
            return {"role": _ROLES.get(speaker, speaker), "content": message["value"]}
    raise MergeidError(f'{where} has a message without role and content; expected {{"role": "user", "content": "…"}}')
