"""Every reader of files that users bring: any content is read, or refused with a `MergeidError`. Hypothesis shrinks
what is neither."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.oracle import CONTROL
from mergeid.data.text import read_records
from mergeid.errors import MergeidError
from mergeid.io.folders import read_index
from mergeid.io.header import read_header
from mergeid.methods.recipe import read_stages
from mergeid.neuron_graph.by_hand import read_graph

FAST = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
SLOW = settings(FAST, max_examples=3000)

texts = st.text(st.characters(exclude_categories=()), max_size=12)
numbers = st.one_of(st.integers(), st.floats(), st.integers(-(2**70), 2**70))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)


def either(meant: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what a field means, now and then anything."""
    return st.one_of(meant, meant, meant, values)


def table(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A table with these fields, each of which may be missing or anything."""
    return st.fixed_dictionaries({}, optional={name: either(field) for name, field in fields.items()})


sizes = st.integers(0, 8)
entry = table(
    dtype=st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F4", "X"]),
    shape=st.lists(st.one_of(sizes, numbers), max_size=4),
    data_offsets=st.lists(st.one_of(sizes, numbers), min_size=2, max_size=2),
)
headers = st.dictionaries(texts, either(entry), max_size=4)
setting = st.one_of(st.floats(0, 1), st.lists(st.floats(0, 1), max_size=3), table(filter=texts, value=st.floats(0, 1)))
recipes = table(
    merge_method=st.sampled_from(["linear", "ties", "slerp", "dare_ties", "model_stock", "task_arithmetic", "karcher"]),
    models=st.lists(either(table(model=texts, parameters=table(weight=setting, density=setting))), max_size=3),
    base_model=texts,
    parameters=table(t=setting, normalize=st.booleans(), weight=setting),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
axes = table(tensor=texts, axis=sizes, index=st.lists(st.one_of(st.none(), st.lists(sizes, min_size=2, max_size=2))))
graphs = table(
    format=st.just("mergeid.graph/1"),
    model=texts,
    versions=st.dictionaries(texts, texts, max_size=2),
    tensors=st.dictionaries(texts, table(shape=st.lists(sizes, max_size=3)), max_size=3),
    spaces=st.lists(
        either(
            table(
                id=st.sampled_from(["s0", "s1"]),
                label=texts,
                size=sizes,
                blocks=sizes,
                parents=st.lists(st.sampled_from(["s0", "s1"]), max_size=2),
                block_parents=st.lists(st.lists(sizes, max_size=2), max_size=3),
                axes=st.lists(either(axes), max_size=2),
            )
        ),
        max_size=3,
    ),
    share=st.floats(0, 1),
    frozen=st.lists(either(table(tensor=texts, axis=sizes, why=texts)), max_size=2),
    verified=either(table(max_relative_error=st.floats(), samples=sizes, dtype=texts)),
)
indices = table(metadata=table(total_size=sizes), weight_map=st.dictionaries(texts, either(texts), max_size=4))
records = st.lists(either(table(text=texts, label=sizes)), max_size=4)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def header_file(value: Any) -> bytes:
    text = dumped(value)
    return struct.pack("<Q", len(text)) + text + bytes(32)


def yaml_file(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return dumped(value)


def lines(rows: Any) -> bytes:
    return b"\n".join(map(dumped, rows if isinstance(rows, list) else [rows]))


Read = Callable[[Path], Any]
READERS: dict[str, tuple[str, st.SearchStrategy[Any], Callable[[Any], bytes], Read]] = {
    "header": ("a.safetensors", headers, header_file, read_header),
    "index": ("model.safetensors.index.json", indices, dumped, read_index),
    "recipe": ("r.yaml", recipes, yaml_file, read_stages),
    "graph": ("g.json", graphs, dumped, read_graph),
    "records": ("d.jsonl", records, lines, read_records),
}


def tried(reader: str, content: bytes) -> None:
    name, _, _, read = READERS[reader]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            read(path)
        except MergeidError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) <= 1000 and not CONTROL.search(message)


@pytest.mark.parametrize("pace", [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS)
def test_values_of_every_kind(reader: str, pace: settings) -> None:
    @pace
    @given(READERS[reader][1])
    def check(value: Any) -> None:
        tried(reader, READERS[reader][2](value))

    check()


@pytest.mark.parametrize("reader", READERS)
def test_bytes_of_every_kind(reader: str) -> None:
    @FAST
    @given(st.one_of(st.binary(max_size=60), values.map(dumped), texts.map(lambda t: t.encode("utf-8", "replace"))))
    def check(content: bytes) -> None:
        tried(reader, content if reader != "header" else struct.pack("<Q", max(len(content) - 8, 0)) + content)

    check()
