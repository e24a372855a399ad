"""Errors that are meant for the user: one clear sentence each, never a traceback in the terminal.

Whatever becomes a message goes through `plain` by itself, so that no file can put terminal escapes, a wall of text or
a line break into one. `shown` and `listed` quote what came from outside: short, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
"""Control characters, characters that turn the direction of text or cannot be seen, and halves of surrogate pairs."""

_WORD, _LONG, _SENTENCE, _QUOTED = 160, 600, 1000, 100
"""Most characters of one word, of a message that is still easy to read, of any message, of what is quoted in one."""


def visible(text: str) -> str:
    r"""The text with what a terminal would obey, or nobody could see, written as an escape (``\x1b``); lines stay."""
    return UNSEEN.sub(lambda m: m[0] if m[0] in "\n\t" else _escape(m[0]), text)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def cut(text: str, most: int) -> str:
    """The text, its middle left out where it has more than `most` characters."""
    if len(text) <= most:
        return text
    tail = most * 2 // 5
    return f"{text[: most - tail - 1]}…{text[-tail:]}"


def plain(message: object) -> str:
    """A message as one line of bounded length that no terminal acts on; a message that is so already stays as it is."""
    text = str(message)
    if len(text) > 100 * _SENTENCE:  # what nobody reads is not worth the work
        text = cut(text, 50 * _SENTENCE)
    words = visible(" ".join(text.split())).split(" ")
    text = " ".join(cut(word, _WORD) for word in words)
    if len(text) > _LONG:  # long names give way first
        text = " ".join(cut(word, _WORD // 4) for word in words)
    return cut(text, _SENTENCE)


def is_text(value: str) -> bool:
    """Whether UTF-8 can write it: no halves of surrogate pairs, which JSON and pickles can hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object, most: int = _QUOTED) -> str:
    """A value from outside as a message quotes it: text in quotes, numbers as they are, anything else by its kind."""
    if value is None or isinstance(value, bool):
        return {None: "empty", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(cut(value, most))
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "a number of more than 40 digits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return {0: "an empty table", 1: "a table of one entry"}.get(len(value), f"a table of {len(value)} entries")
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"of type {type(value).__name__}"


def listed(names: Iterable[object], most: int = 8) -> str:
    """Names in a row, shortened where there are many: ``a, b, c and 12 more``."""
    found = [cut(str(name), _QUOTED) for name in names]
    if len(found) <= most:
        return ", ".join(found)
    return f"{', '.join(found[:most])} and {len(found) - most} more"


def reason(error: BaseException) -> str:
    """What an error of the system or of a library says, in a few words for a sentence of ours."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return cut(visible(first), 300).rstrip(".") or type(error).__name__


class MergeidError(Exception):
    """Bad input. The message is one sentence that names the file, tensor or option, what was expected and
    what to do; the command line prints it and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(plain(message))


class NoModel(MergeidError):
    """The weights may be fine, but no model can be built of them: unknown architecture, foreign code, names that do not
    fit. What needs no model goes on."""


class WillNotMerge(MergeidError):
    """The answer is "no": the plan says that the pair will not merge. Nothing was written."""

    exit_code = 1


class MergeidWarning(UserWarning):
    """Something worth knowing that does not stop the work (printed on stderr, exit code unchanged)."""

    def __init__(self, message: object = "") -> None:
        super().__init__(plain(message))
