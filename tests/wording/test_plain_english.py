"""Everything that users read in messages, help and documentation: short sentences, no odd phrases.

The strings are gathered from the sources, so that a new message is judged as soon as it is written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergeid.reporting.terms import explain

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "mergeid").rglob("*.py")) + sorted((ROOT / "adapters").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/pages").glob("*.md"))]
SPEAKING = {"MergeidError", "WillNotMerge", "NoModel", "MergeidWarning", "Option", "Argument", "switch", "Term", "warn"}
SPEAKING |= {"say", "note", "print", "append"}
LONGEST = 30
ODD = (
    r"\bas they lie\b|\bas it lies\b|\bneurons that lie\b",  # as they are
    r"\bsays? it no\b",
    r"\bthat is no\b(?! more)|\bare no (?:classes|classification)\b",  # that is not a …
    r"\bof a kind\b|\ball of a kind\b",
    r"\bin words\b",
    r"\bof it by\b",
    r"\bspeaks? (?:of|alone)\b|\bweights speak\b",  # are compared
    r"\bleaves nothing to\b",
    r"\bfor nothing\b",
    r"\bwhatever it be\b",
    r"\btrade places\b",  # change places
    r"\bis had\b|\bto be had\b",
    r"\bmore than one may\b",
    r"\bwithout a word\b",
    r"\b(?:is|are|holds?|gives?|names?) no (?:path|number|pair|axis|folder|table|sketch|hub|model|logits|list|state)\b",
    r"\bestimated? [^.;]{0,40}\bagain\b",  # re-estimated
    r"\bdata set\b",  # dataset
    r"\bnumber format\b",  # dtype
    r"\ball the same\b",  # anyway
    r"\bif not given\b",  # Default: …
    r"\b(?:models|experts|two) at least\b",  # at least two models
    r"\bis none of\b|\bnone of whose\b",
    r"\bgoes? with (?:a|single|--)\b|\bdoes not go with\b",  # cannot be combined with
    r"\bas asked\b|\basked for by\b",  # as requested by
    r"\bmay change places\b|\bget another place\b",  # can be permuted; change position
    r"\bmay be given several times\b",  # repeatable
    r"\bthan they are themselves\b",
    r"\bwhich the model has not\b",
    r"\bsays less\b|\bsays nothing of\b",  # is weaker evidence
)


def text_of(node: ast.AST) -> str:
    """Literal text of an expression; what is filled in counts as one word."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(v) if isinstance(v, ast.Constant) else "X" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)}. {text_of(node.orelse)}"
    return "X"


def messages() -> Iterator[tuple[str, str]]:
    """(place, text) of what the code says to users."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in SPEAKING:
                    for value in (*node.args, *(k.value for k in node.keywords if k.arg == "help")):
                        yield f"{place}:{node.lineno}", text_of(value)
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper():
                if place.startswith("mergeid/reporting"):
                    yield f"{place}:{node.lineno}", text_of(node.value)
            elif isinstance(node, ast.FunctionDef) and node.name == "command" and "/commands/" in place:
                yield f"{place}:{node.lineno}", ast.get_docstring(node) or ""


def prose() -> Iterator[tuple[str, str]]:
    """(page, paragraph) of the documentation, without code, tables and headings."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "\n\n", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:- |\d+\. |\|))", text):
            if not paragraph.lstrip().startswith(("|", "#", "!", ":::")):
                yield page.name, re.sub(r"`[^`]*`", "X", re.sub(r"\]\([^)]*\)", "]", paragraph))


def sentences(text: str) -> list[str]:
    """Split at full stops, question marks, semicolons and colons that end a clause."""
    plain = " ".join(text.split())
    return [s for s in re.split(r"(?<=[.?!;:])\s+(?=\S)", plain) if s]


TEXTS = [*messages(), *prose()]


def test_the_texts_are_found() -> None:
    assert len(TEXTS) > 700 and any("MergeidError" not in t for _, t in TEXTS)


def test_no_sentence_is_long() -> None:
    long = [f"{place}: {s}" for place, t in TEXTS for s in sentences(t) if len(re.findall(r"\w[\w'’-]*", s)) > LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("odd", ODD)
def test_no_odd_phrase(odd: str) -> None:
    found = [f"{place}: {' '.join(t.split())[:200]}" for place, t in TEXTS if re.search(odd, " ".join(t.split()))]
    assert not found, "\n".join(found)


SYMBOL = r"[\u0370-\u03ff]|\bJ\b|\bAUROC\b|\bSpearman\b|\bCKA\b"


def defines(sentence: str, symbol: str) -> bool:
    """Whether a sentence says what a symbol is: "σ is", "σ = …", "the covariance Σ of", "σ (sigma)"."""
    sign = rf"[*(`]*{symbol}[₀ᵢ_A-Za-z]*[*)`]*"
    ways = rf"{sign} ?(?:is|are|says|=|:|\()|= {sign}|(?:index|covariance) {sign}|{sign} (?:the|their)"
    return re.search(ways, sentence) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_symbol_is_defined_where_a_page_first_uses_it(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    first: dict[str, str] = {}
    for sentence in re.split(r"(?<=[.?!])\s+(?=\S)|\n\s*\n|\n(?=\|)", text):
        for symbol in re.findall(SYMBOL, sentence):
            first.setdefault(symbol, " ".join(sentence.split()))
    unknown = [f"{symbol}: {sentence}" for symbol, sentence in first.items() if not defines(sentence, symbol)]
    assert not unknown, "\n".join(unknown)


def test_symbols_in_messages_are_in_the_glossary() -> None:
    for place, text in messages():
        for symbol in set(re.findall(SYMBOL, text)) - {"σ"}:
            assert defines(text, symbol) or explain(symbol).meaning, place
