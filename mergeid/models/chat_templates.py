"""The chat template of a merge: a model's own, the one that most models have, or one that is given."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

from mergeid.basics.reading import json_text, read_table, read_text
from mergeid.errors import MergeidError, shown
from mergeid.io.checkpoint import Checkpoint

JINJA, CONFIG = "chat_template.jinja", "tokenizer_config.json"
TEMPLATES = {
    "alpaca": r"""
{%- set heads = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} -%}
{%- set told = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list -%}
{{- (told | last | trim if told else '') ~ '\n\n' -}}
{%- for turn in messages -%}
  {%- if turn.role in heads -%}
    {{- '### ' ~ heads[turn.role] ~ ':\n' ~ turn.content | trim ~ ('' if loop.last else '\n\n') -}}
  {%- endif -%}
{%- endfor -%}
{{- '### Response:\n' if add_generation_prompt and messages[-1].role != 'assistant' -}}
""",
    "chatml": r"""
{%- for turn in messages -%}
  {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
""",
    "exaone": r"""
{%- for turn in messages -%}
  {{- '        [|system|][|endofturn|]\n\n' if loop.first and turn.role != 'system' -}}
  {{- '    [|' ~ turn.role ~ '|]' ~ turn.content ~ '\n        ' -}}
  {{- ('' if turn.role == 'user' else '[|endofturn|]') ~ '\n\n' -}}
{%- endfor -%}
{{- '    [|assistant|]\n' if add_generation_prompt -}}
""",
    "llama3": r"""
{%- set head = '<|start_header_id|>%s<|end_header_id|>\n\n' -%}
{%- for turn in messages -%}
  {{- bos_token if loop.first -}}
  {{- head | format(turn.role) ~ turn.content | trim ~ '<|eot_id|>\n' -}}
{%- endfor -%}
{{- head | format('assistant') if add_generation_prompt -}}
""",
    "mistral": r"""
{{- bos_token -}}
{%- set system = messages[0].role == 'system' -%}
{%- for turn in (messages[1:] if system else messages) -%}
  {%- if turn.role != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('expected user and assistant in turn, after a system message or none') -}}
  {%- elif turn.role == 'assistant' -%}
    {{- ' ' ~ turn.content ~ eos_token -}}
  {%- else -%}
    {{- ' [INST] ' ~ (messages[0].content ~ '\n\n' if system and loop.first else '') ~ turn.content ~ ' [/INST]' -}}
  {%- endif -%}
{%- endfor -%}
""",
}
"""By mergekit's names; what they give is the same, white space too."""
_NAMES = ", ".join(TEMPLATES)
_OF_TRANSFORMERS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Its own tags, which mark what the assistant says."""


def with_chat_template(models: Sequence[Checkpoint], choice: str | None, own: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The models, the first with the chat template that its output gets.

    Args:
        models: all that meet, the base last.
        own: the same with the tokenizers that they came with.
        choice: "auto": what most of them have, the first one's among equals; "a", "b", …: that model's; a name
            of `TEMPLATES`; the path of a file; or the template itself. None: the first one's, as it lies there.

    Raises:
        MergeidError: no such template, or the first model is no folder.
    """
    if choice is None:
        return list(models)
    first = models[0]
    if not first.is_folder:
        raise MergeidError(f"{first.source} is not a folder; expected one with a tokenizer for --chat-template")
    text = _chosen(own, choice)
    if text is None:
        return list(models)
    written = {JINJA: text}
    config = first.tokenizer_folder / CONFIG
    if config.is_file():  # older versions of transformers read it there
        changed = first.beside.get(CONFIG)
        stated = read_table(config, "the tokenizer's config") if changed is None else json.loads(changed)
        written[CONFIG] = json_text({**stated, "chat_template": text}) + "\n"
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


def commonest(models: Sequence[Checkpoint]) -> str | None:
    """The template that most models have, the first one's among equals; None: they have none."""
    known = [t.strip() for m in models if (t := chat_template(m)) is not None]
    return Counter(known).most_common(1)[0][0] if known else None


def _chosen(models: Sequence[Checkpoint], choice: str) -> str | None:
    if choice == "auto":
        return commonest(models)
    if choice in TEMPLATES:
        return TEMPLATES[choice].strip()
    if len(choice) == 1:
        at = ascii_lowercase.find(choice)
        found = chat_template(models[at]) if 0 <= at < len(models) else None
        if found is None:
            raise MergeidError(
                f"--chat-template {choice!r} is not a model with a chat template; expected auto, {_NAMES} or a file"
            )
        return found
    if "{" in choice:
        return _parsed(choice, "the chat template")
    if Path(choice).expanduser().is_file():
        return _parsed(read_text(Path(choice).expanduser(), "a chat template"), f"the chat template {choice}")
    raise MergeidError(
        f"chat template {shown(choice)} is not known; expected auto, a, b, …, {_NAMES}, a file, or a Jinja template"
    )


def _parsed(text: str, what: str) -> str:
    """A template as it is. Raises `MergeidError` where Jinja cannot read it."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_OF_TRANSFORMERS.sub("", text))
    except TemplateSyntaxError as error:
        raise MergeidError(
            f"{what} is not valid Jinja in line {error.lineno} ({error.message}); correct it, or name one of {_NAMES}"
        ) from None
    return text
