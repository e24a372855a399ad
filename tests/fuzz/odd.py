"""Odd texts, numbers, JSON and bytes, and ways to damage good ones."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

TEXTS = (
    "", " ", "a", "w", "0", "-1", "None", "null", "true", "NaN", "inf", "1e999", "1_000", "٣", "²", "0x10", "--help",
    "-",
    "--", "*", "**", "[", "[]", "[!a]", "?", "{0}", "%s", "%(x)s", "\\", "/", ".", "..", "../x", "/etc/passwd", "~",
    "~nobody_here/x", "C:\\x", "a" * 255, "a" * 300, "x" * 5000, "a/" * 300, "ü", "日本語", "\u202eabc", "💥" * 60,
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07", "\x9b31m", "\x7f", "a\nb", "\r", "a\tb", "\x00", "a\x00b", "\ud800", "\udcff", "__metadata__",
    "__class__", "weight", "layers.0", "org/name", "org/name@v1", "a:b", "module:function", "float32", "bfloat16",
    "cpu",
    "cuda:99", "linear", "ties", "https://localhost:1/x", "file:///etc/passwd", "\ufeff", "'", '"', ";", "$(id)",
    "`id`",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1,
    10**30, -(10**30), 10**400, 0.5, -0.0, 1.5, 1e-320, 1e-9, 3e38, 1e39, 1e308, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip
ATOMS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [{}], {"": {}}, [None], [1, "a"], {"a": 1})


def text(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(TEXTS)
    return "".join(
        chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0xD800)))) for _ in range(rng.randrange(1, 30))
    )


def word(rng: random.Random) -> str:
    """A text that a command line can hold (no NUL; bytes that are no UTF-8 as surrogates)."""
    while True:
        found = text(rng).replace("\x00", "\x01").replace("\ud800", "\udc80")
        try:
            found.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            continue
        return found


def value(rng: random.Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = rng.randrange(6 if depth else 3)
    if kind == 0:
        return text(rng)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return copy.deepcopy(rng.choice(ATOMS))
    if kind == 3:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {text(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    found: list[tuple[Any, Any]] = []
    rest = [tree]
    while rest:
        node = rest.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            rest.append(node[key])
    return found


def damaged(rng: random.Random, tree: Any, times: int | None = None) -> Any:
    """A copy of a JSON value with a few places changed."""
    tree = copy.deepcopy(tree)
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        places = nodes(tree)
        if not places or rng.random() < 0.02:
            tree = value(rng)
            continue
        node, key = rng.choice(places)
        how = rng.randrange(8)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, dict):
            node[text(rng)] = node.pop(key)
        elif how == 2:
            other, at = rng.choice(places)
            node[key] = (
                copy.deepcopy(other[at]) if at in (other if isinstance(other, dict) else range(len(other))) else 0
            )
        elif how == 3 and isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        elif how == 4 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
            step = rng.choice((1, -1, 2, 1000))
            node[key] = node[key] + step
        elif how == 5:
            node[key] = rng.choice(NUMBERS)
        elif how == 6 and isinstance(node, dict):
            node[text(rng)] = value(rng)
        else:
            node[key] = value(rng)
    return tree


def deep(rng: random.Random) -> str:
    """JSON (and YAML) that is nested too deeply for any parser that recurses."""
    n = rng.choice((500, 2_000, 100_000))
    return rng.choice(("[" * n, "[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, '{"a":[' * n))


def written(rng: random.Random, tree: Any, ways: float = 0.15) -> bytes:
    """JSON text of a value; with probability `ways` in an odd way."""
    dumped = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    plain = dumped.encode("utf-8", "surrogatepass")
    if rng.random() >= ways:
        return plain
    how = rng.randrange(8)
    if how == 0:
        return b"\xef\xbb\xbf" + plain
    if how == 1:
        return dumped.encode(rng.choice(("utf-16", "utf-32")), "surrogatepass")
    if how == 2:
        return deep(rng).encode()
    if how == 3:
        return plain.replace(b"1", b"1" * rng.choice((400, 5000)), 1)
    if how == 4 and plain[:1] == b"{":  # a key twice
        first = plain[1:].split(b":", 1)[0]
        return b"{" + first + b": 1, " + plain[1:]
    if how == 5:
        return plain[:-1] + b",}"
    return damaged_bytes(rng, plain)


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut off, put in, doubled or zeroed."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(raw) + 1)
        how = rng.randrange(6)
        if how == 0 and raw:
            raw[min(at, len(raw) - 1)] = rng.randrange(256)
        elif how == 1:
            del raw[at:]
        elif how == 2:
            raw[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif how == 3:
            size = rng.choice((1, 4, 64))
            raw[at : at + size] = bytes(min(size, len(raw) - at))
        elif how == 4:
            raw[at:at] = raw[at : at + rng.choice((1, 16, 200))]
        else:
            del raw[at : at + rng.choice((1, 4, 32))]
    return bytes(raw)
