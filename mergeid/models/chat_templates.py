"""The chat template of a merge: a model's own, the one that most models have, or one that is given."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

from mergeid.basics.reading import read_table, read_text
from mergeid.errors import MergeidError, shown
from mergeid.io.checkpoint import Checkpoint

JINJA, CONFIG = "chat_template.jinja", "tokenizer_config.json"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""OpenAI's, which many models were trained with."""


def with_chat_template(models: Sequence[Checkpoint], choice: str | None) -> list[Checkpoint]:
    """The models, the first with the chat template that its output gets.

    Args:
        models: all that meet, the base last.
        choice: "auto": what most of them have, the first one's among equals; "a", "b", …: that model's; "chatml"; the
            path of a file; or the template itself. None: the first one's, as it lies there.

    Raises:
        MergeidError: no such template, or the first model is no folder.
    """
    if choice is None:
        return list(models)
    first = models[0]
    if not first.is_folder:
        raise MergeidError(f"{first.source} is not a folder; expected one with a tokenizer for --chat-template")
    text = _chosen(models, choice)
    if text is None:
        return list(models)
    written = {JINJA: text}
    config = first.tokenizer_folder / CONFIG
    if config.is_file():  # older versions of transformers read it there
        changed = first.beside.get(CONFIG)
        stated = read_table(config, "the tokenizer's config") if changed is None else json.loads(changed)
        written[CONFIG] = json.dumps({**stated, "chat_template": text}, indent=2, ensure_ascii=False) + "\n"
    return [replace(first, beside={**first.beside, **written}), *models[1:]]


def chat_template(model: Checkpoint) -> str | None:
    """The template that lies beside a model's tokenizer; None: there is none."""
    folder = model.tokenizer_folder
    if not model.is_folder or not folder.is_dir():
        return None
    if (folder / JINJA).is_file():
        return read_text(folder / JINJA, "a chat template")
    stated = read_table(folder / CONFIG, "the tokenizer's config") if (folder / CONFIG).is_file() else {}
    found = stated.get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _chosen(models: Sequence[Checkpoint], choice: str) -> str | None:
    if choice == "auto":
        known = [t.strip() for m in models if (t := chat_template(m)) is not None]
        return Counter(known).most_common(1)[0][0] if known else None
    if choice == "chatml":
        return CHATML
    if len(choice) == 1:
        at = ascii_lowercase.find(choice)
        found = chat_template(models[at]) if 0 <= at < len(models) else None
        if found is None:
            raise MergeidError(
                f"--chat-template {choice!r} is not a model with a chat template; expected auto, chatml or a file"
            )
        return found
    if "{" in choice:
        return choice
    if Path(choice).expanduser().is_file():
        return read_text(Path(choice).expanduser(), "a chat template")
    raise MergeidError(
        f"chat template {shown(choice)} is not known; expected auto, a, b, …, chatml, a file, or a Jinja template"
    )
