"""The one door through which small files enter (JSON, YAML, text): regular files only, with limits on their size, on
how deep they nest, on what aliases make of them, and on how long their numbers are.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any

from mergeid.errors import UNSEEN, MergeidError, reason, shown

LARGEST = 512 << 20
"""Most bytes of a JSON or text file (tokenizers have some millions; graphs of large models have hundreds)."""
LARGEST_YAML = 256 << 10
"""Most bytes of a YAML file, which is read much more slowly."""
DEEPEST = 64
"""Most lists and tables inside one another."""
MOST_DIGITS = 300
"""Most digits of a whole number: more is beyond every floating-point number."""
_BEYOND = 10**MOST_DIGITS
MOST_NODES = 100_000
"""Most values of a YAML file, each alias counted as what it stands for."""

_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def check_regular(path: str | os.PathLike[str], expected: str) -> os.stat_result:
    """Raises `MergeidError` where there is no such file, or it is a folder, pipe, socket or device, which could make a
    reader wait for ever; `expected` says what should be there."""
    name = os.fspath(path)
    try:
        found = os.stat(os.path.expanduser(name))  # shells leave the ~ of --option=~/file as it is
    except (FileNotFoundError, NotADirectoryError):
        raise MergeidError(f"no such file or folder: {name}; expected {expected}") from None
    except ValueError:
        raise MergeidError(
            f"{name} is not a path (it contains a character that paths cannot have); expected {expected}"
        ) from None
    except OSError as error:
        raise MergeidError(f"cannot read {name}: {reason(error)}; expected {expected}") from None
    for is_kind, kind in _KINDS.items():
        if is_kind(found.st_mode):
            raise MergeidError(f"{name} is {kind}; expected {expected}")
    return found


def read_bytes(path: str | os.PathLike[str], expected: str, largest: int = LARGEST) -> bytes:
    """All bytes of a regular file of bounded size. Raises `MergeidError` where it is none, or cannot be read."""
    name = os.fspath(path)
    size = check_regular(path, expected).st_size
    if size <= largest:
        try:
            with open(os.path.expanduser(name), "rb") as file:
                content = file.read(largest + 1)
        except OSError as error:
            raise MergeidError(f"cannot read {name}: {reason(error)}; expected {expected}") from None
        if len(content) <= largest:
            return content
        size = len(content)
    raise MergeidError(f"{name} has {size:,} bytes, more than the {largest:,} allowed; expected {expected}")


def read_text(path: str | os.PathLike[str], expected: str, largest: int = LARGEST) -> str:
    """A text file in UTF-8 (a byte order mark is left out). Raises `MergeidError` as `read_bytes` does."""
    try:
        return read_bytes(path, expected, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MergeidError(
            f"{os.fspath(path)} cannot be read as text (byte {error.start:,} is not UTF-8); expected {expected}"
        ) from None


def read_json(path: str | os.PathLike[str], expected: str = "JSON", *, own: bool = False) -> Any:
    """What a JSON file says; see `parse_json`."""
    return parse_json(read_text(path, expected), os.fspath(path), expected, own=own)


def read_table(path: str | os.PathLike[str], expected: str = "a JSON object") -> dict[str, Any]:
    """A JSON object of another library. Raises `MergeidError` where the file holds none."""
    parsed = read_json(path, expected)
    if not isinstance(parsed, dict):
        raise MergeidError(f"{os.fspath(path)} does not hold a JSON object; expected {expected}")
    return parsed


def parse_json(text: str | bytes, name: str, expected: str = "JSON", *, own: bool = False) -> Any:
    """JSON within the limits.

    Args:
        text: UTF-8 where it is bytes.
        name: what messages call it.
        expected: what should be there.
        own: a format of mergeid's own: names that occur twice and numbers that are not finite are refused.

    Raises:
        MergeidError: broken, or beyond a limit.
    """
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=_unique if own else None,
            parse_constant=_refused_constant if own else None,
        )
    except RecursionError:
        raise MergeidError(_too_deep(name, expected)) from None
    except UnicodeDecodeError as error:
        why = f"byte {error.start:,} is not UTF-8"
        raise MergeidError(f"{name} is not valid JSON ({why}); expected {expected}") from None
    except ValueError as error:
        why = reason(error) if isinstance(error, json.JSONDecodeError) else _why(error)
        raise MergeidError(f"{name} is not valid JSON ({why}); expected {expected}") from None
    _check_limits(parsed, name, expected)
    return parsed


def _why(error: ValueError) -> str:
    return "a number has too many digits" if "digits" in str(error) else reason(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the name {shown(_twice(key for key, _ in pairs))} occurs twice")
    return found


def _refused_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _too_deep(name: str, expected: str) -> str:
    return f"{name} nests more than {DEEPEST} levels of lists and tables; expected {expected}"


def _check_limits(parsed: Any, name: str, expected: str) -> None:
    """Depth and whole numbers of what was parsed, without recursion."""
    level = [parsed]
    for _ in range(DEEPEST + 1):
        if not level:
            return
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, int) and not -_BEYOND < value < _BEYOND:
                raise MergeidError(f"{name} has a number with more than {MOST_DIGITS} digits; expected {expected}")
        level = below
    if level:
        raise MergeidError(_too_deep(name, expected))


def read_yaml_documents(path: str | os.PathLike[str], expected: str) -> list[Any]:
    """Every document of a YAML file in the values that JSON has too, with aliases counted as what they stand for; one
    that is empty (None) for an empty file.

    Raises:
        MergeidError: broken, another kind of value, a name given twice, or beyond a limit.
    """
    import yaml

    name, text = os.fspath(path), read_text(path, expected, LARGEST_YAML)
    loader = None
    try:
        loader = _loader()(text)
        parsed = []
        while loader.check_node():
            node = loader.get_node()
            _check_nodes(node, name, expected)
            parsed.append(loader.construct_document(node))
    except RecursionError:
        raise MergeidError(_too_deep(name, expected)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise MergeidError(f"{name} is not valid YAML{where}: {problem}; expected {expected}") from None
    finally:
        if loader is not None:
            loader.dispose()
    _check_limits(parsed, name, expected)
    return parsed or [None]


def _loader() -> Any:
    """PyYAML's safe loader without dates, binaries, sets and the like, and with errors where a value is none."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Texts, numbers, true and false, null, lists and tables."""

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep=deep)
            except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError):
                kind = str(node.tag).rsplit(":", 1)[-1]
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(node.value)} is not a valid {kind}", node.start_mark
                ) from None

    kept = ("null", "bool", "int", "float", "str", "seq", "map")
    constructors = {f"tag:yaml.org,2002:{kind}" for kind in kept}
    Loader.yaml_constructors = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in constructors
    }
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def _check_nodes(root: Any, name: str, expected: str) -> None:
    """How much a document holds once every alias is written out, and how deep, without writing it out."""
    import yaml

    sizes: dict[int, int] = {}
    depths: dict[int, int] = {}
    open_now: set[int] = set()
    stack: list[tuple[Any, Iterator[Any]]] = []

    def children(node: Any) -> Iterable[Any]:
        if isinstance(node, yaml.MappingNode):
            return (part for pair in node.value for part in pair)
        return node.value if isinstance(node, yaml.SequenceNode) else ()

    def enter(node: Any) -> None:
        if isinstance(node, yaml.MappingNode) and (twice := _twice(k.value for k, _ in node.value)) is not None:
            raise MergeidError(f"{name} has the name {shown(twice)} twice in one table; expected it once")
        open_now.add(id(node))
        sizes[id(node)], depths[id(node)] = 1, 1
        stack.append((node, iter(children(node))))

    if root is not None:
        enter(root)
    while stack:
        node, rest = stack[-1]
        child = next(rest, None)
        if child is None:
            stack.pop()
            open_now.discard(id(node))
            if stack:
                _account(sizes, depths, id(stack[-1][0]), id(node))
        elif id(child) in open_now:
            raise MergeidError(f"{name} has an alias that contains itself; expected {expected}")
        elif id(child) in sizes:
            _account(sizes, depths, id(node), id(child))
        else:
            enter(child)
        if sizes[id(node)] > MOST_NODES:
            raise MergeidError(
                f"{name} has more than {MOST_NODES:,} values once its aliases are expanded; expected {expected}"
            )
        if max(len(stack), depths[id(node)]) > DEEPEST:
            raise MergeidError(_too_deep(name, expected))


def _twice(keys: Iterable[Any]) -> str | None:
    """The first text that occurs twice."""
    seen: set[str] = set()
    return next((k for k in keys if isinstance(k, str) and (k in seen or seen.add(k))), None)  # type: ignore[func-returns-value]


def _account(sizes: dict[int, int], depths: dict[int, int], parent: int, child: int) -> None:
    sizes[parent] += sizes[child]
    depths[parent] = max(depths[parent], depths[child] + 1)


def json_text(value: Any, indent: int | None = 2) -> str:
    """A value as JSON that every parser reads, UTF-8 can write and no terminal obeys: characters that cannot be seen
    are escapes, which mean the same."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return UNSEEN.sub(lambda m: m[0] if m[0] == "\n" else json.dumps(m[0])[1:-1], text)
