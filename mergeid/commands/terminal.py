"""A command from a verb: whatever the verb's signature says of an option, the terminal asks for.

A command function names what the terminal adds or asks for in another way; every other option of the verb is taken
over with its keyword, its default and its help (`mergeid.request.options`), and reaches the verb as it was given.
"""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin

import typer
from typer.models import OptionInfo

from mergeid.request import options
from mergeid.request.options import HOW, INPUT, OUTPUT, Option

Answer = TypeVar("Answer")
Other = TypeVar("Other")
READ = ("base", "data", "calibration")
"""Keywords that name what is read."""
PANELS = (INPUT, OUTPUT, HOW)


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """A verb with the options that the terminal was given for it.

    Attributes:
        asked: those options, bound to the verb's own parameters.
    """

    verb: Callable[..., Answer]
    asked: inspect.BoundArguments

    def __call__(self, *args: object, **kwargs: object) -> Answer:
        """Call the verb; what is said here comes before what the terminal was given."""
        return self.verb(*args, **{**self.asked.arguments, **kwargs})

    def to(self, verb: Callable[..., Other]) -> Call[Other]:
        """Another verb with those of the options that it has too."""
        signature = inspect.signature(verb)
        shared = {k: v for k, v in self.asked.arguments.items() if k in signature.parameters}
        return Call(verb, signature.bind_partial(**shared))

    def next(
        self, verb: Callable[..., object], *models: str, also: Sequence[str] = (), without: Sequence[str] = ()
    ) -> str:
        """The command to run after this one, as it is typed.

        Args:
            verb: of that command, which gets all options of this one that it takes too, except where its result goes.
            models: its arguments.
            also: more words. without: keywords of options that it does not get.
        """
        words, theirs = ["mergeid", verb.__name__, *models], inspect.signature(verb).parameters
        for p in _parameters(self.verb):
            option = _option(p)
            wanted = option is not None and option.panel != OUTPUT and p.name in theirs and p.name not in without
            if option is not None and wanted and self.given(p.name):
                words += _typed(p.name, option, self._value(p.name))
        return shlex.join([*words, *also])

    def given(self, keyword: str) -> bool:
        """Whether the terminal was given a value of its own for this keyword."""
        answer: bool = self._value(keyword) != inspect.signature(self.verb).parameters[keyword].default
        return answer

    def text(self, keyword: str) -> str:
        """The keyword's value as text."""
        return str(self._value(keyword))

    def number(self, keyword: str) -> float:
        """The keyword's value as a number."""
        return float(self.text(keyword))

    @property
    def device(self) -> str | None:
        """Where networks run."""
        found = self._value("device")
        return None if found is None else str(found)

    def path(self, keyword: str) -> Path | None:
        """The keyword's value as a path."""
        return Path(self.text(keyword)) if self._value(keyword) is not None else None

    @property
    def reads(self) -> list[str | None]:
        """What is read besides the models, and must not be written."""
        from mergeid.request.request import config_file

        return [*(self.asked.arguments.get(k) for k in READ), config_file(self.asked.arguments.get("arch"))]

    def _value(self, keyword: str) -> object:
        return self.asked.arguments.get(keyword, inspect.signature(self.verb).parameters[keyword].default)


def merge_after(call: Call[Any], a: str, b: str, how: Sequence[str] = ()) -> str:
    """The merge of a pair after another command, into a name that nothing has yet; `how`: more of its options."""
    from mergeid.io.output import free_name
    from mergeid.verbs.merge import merge

    # plain averages, which are the default, have no use for a base
    return call.next(merge, a, b, also=(*how, "-o", free_name(a)), without=("base",))


def command_of(verb: Callable[..., Answer]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: a command function, whose first argument is the `Call`, with all options of a verb that it does not
    name itself. An option that was not given is left to the verb."""

    def derive(function: Callable[..., int]) -> Callable[..., int]:
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _parameters(function)[1:]]
        named = {p.name for p in own}
        theirs = {p.name: p for p in _parameters(verb) if p.name not in named and _option(p) is not None}
        taken = {name: _in_terminal(p) for name, p in theirs.items()}

        @functools.wraps(function)
        def command(**given: object) -> int:
            said = {k: _plain(v) for k, v in given.items() if k in taken and v is not None}
            call = Call(verb, inspect.signature(verb).bind_partial(**said))
            return function(call, **{k: v for k, v in given.items() if k in named})

        signature = inspect.Signature(sorted((*taken.values(), *own), key=_place))
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        del command.__wrapped__  # type: ignore[attr-defined]
        return command

    return derive


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Its parameters, annotations evaluated where that needs nothing that only type checkers import."""
    names = {"o": options, **vars(sys.modules[function.__module__])}

    def evaluated(p: inspect.Parameter) -> inspect.Parameter:
        if not isinstance(p.annotation, str):
            return p
        try:
            return p.replace(annotation=eval(p.annotation, names))
        except NameError:
            return p

    return [evaluated(p) for p in inspect.signature(function).parameters.values()]


def _option(p: inspect.Parameter) -> Option | None:
    if get_origin(p.annotation) is not Annotated:
        return None
    return next((x for x in get_args(p.annotation)[1:] if isinstance(x, Option)), None)


def offered(words: Iterable[str]) -> Callable[[str], list[str]]:
    """What a shell offers for the beginning of a word."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _typed(keyword: str, option: Option, value: object) -> list[str]:
    """An option with its value as words."""
    flag, _, off = _flags(keyword, option)[0].partition("/")
    if option.kind is bool:
        return [flag if value else off]
    several = value if isinstance(value, (list, tuple)) else [value]
    return [word for each in several for word in (flag, str(each))]


def _flags(keyword: str, option: Option) -> tuple[str, ...]:
    return option.flags or (f"--{keyword.replace('_', '-')}",)


def _place(p: inspect.Parameter) -> tuple[bool, int]:
    """Arguments first, then options panel by panel."""
    info = get_args(p.annotation)[1]
    panel = getattr(info, "rich_help_panel", None)
    return isinstance(info, OptionInfo), PANELS.index(panel) if panel in PANELS else len(PANELS)


def _in_terminal(p: inspect.Parameter) -> inspect.Parameter:
    """The parameter as Typer reads it."""
    option = _option(p)
    assert option is not None
    required = p.default is inspect.Parameter.empty
    kind: Any = Enum(p.name, {c: c for c in option.choices}, type=str) if option.choices else option.kind
    if option.several:
        kind = list[option.kind]  # type: ignore[name-defined]
    info = typer.Option(
        *_flags(p.name, option),
        metavar=option.metavar or None,
        rich_help_panel=option.panel,
        help=option.help,
        min=option.least,
        max=option.most,
        show_default=option.shown and not required,
        autocompletion=offered(option.words) if option.words else None,
    )
    default: Any = None if option.several else p.default
    if option.choices and not required and p.default is not None:
        default = kind(p.default)
    optional = kind if required or default is not None else Union[kind, None]
    return inspect.Parameter(
        p.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[optional, info]
    )


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value
