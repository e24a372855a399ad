"""No batch axis is guessed, nothing is reordered: models get what the caller gives, whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_helpers import disturbed, worst_change
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import mergeid
from mergeid.errors import MergeidError


def seeded(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Graph(nn.Module):
    """Two rounds of messages along an edge list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        h = torch.zeros(len(x), 16, dtype=x.dtype).index_add(0, target, self.a(x)[source]).relu()
        return self.b(torch.zeros_like(h).index_add(0, target, h[source]))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32)
        self.trunk = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.trunk(self.front(x), mask=mask))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.head = nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x: PackedSequence) -> Tensor:
        return self.head(self.front(x.data).tanh())[: int(x.batch_sizes[0])]


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i + 2, 8) for i in range(12))
        self.head = nn.Linear(8, 3)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.head(sum((f(x) for f, x in zip(self.layers, xs, strict=True)), torch.zeros(())).relu())


class Writes(nn.Module):
    """Normalises its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        return self.b(self.a(x).tanh())


class Features:
    """What a graph library would hand over."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.x, self.edges = x, edges


class OfObject(Graph):
    def forward(self, data: Features) -> Tensor:  # type: ignore[override]
        return super().forward(data.x, data.edges)


EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 2], [1, 2, 3, 4, 5, 0, 0, 4]])
CASES: dict[str, tuple[type[nn.Module], Any, list[int]]] = {
    "edge list": (Graph, (seeded((6, 8)), EDGES), [16]),
    "as many edges as nodes": (Graph, (seeded((8, 8)), EDGES), [16]),
    "an object": (OfObject, Features(seeded((6, 8)), EDGES), [16]),
    "sequence first": (SequenceFirst, (seeded((7, 2, 6)), torch.triu(torch.full((7, 7), -math.inf), 1)), [16, 4, 32]),
    "packed": (Packed, (pack_sequence([seeded((n, 5), n) for n in (4, 3, 1)]),), [12]),
    "twelve positions": (Many, tuple(seeded((4, i + 2), i) for i in range(12)), [8]),
    "written in place": (Writes, seeded((3, 4)), [8]),
}


@pytest.mark.parametrize("case", CASES)
def test_inputs_reach_the_model_whole_and_in_order(case: str) -> None:
    kind, inputs, sizes = CASES[case]
    torch.manual_seed(0)
    model = disturbed(kind()).float()
    graph = mergeid.graph(model, inputs)
    assert set(sizes) <= {s.size for s in graph.spaces}
    assert graph.verified is not None and graph.verified["error_when_misapplied"] > 1e-3
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    assert worst_change(graph, model, given) < 1e-5


def test_inputs_are_not_changed() -> None:
    x = seeded((3, 4))
    before = x.clone()
    torch.manual_seed(0)
    mergeid.graph(Writes(), x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        (torch.zeros(2, 7), r"Many does not run on example_inputs \(RuntimeError: mat1 and mat2"),
        ({"z": torch.zeros(1)}, r"Many does not run on example_inputs \(TypeError"),
    ],
)
@pytest.mark.parametrize("verb", ["graph", "plan", "merge"])
def test_what_does_not_run_is_one_sentence(verb: str, inputs: Any, part: str) -> None:
    calls = {
        "graph": lambda: mergeid.graph(Many(), inputs),
        "plan": lambda: mergeid.plan(Many(), Many(), example_inputs=inputs),
        "merge": lambda: mergeid.merge(Many(), Many(), example_inputs=inputs),
    }
    with pytest.raises(MergeidError, match=part):
        calls[verb]()


def test_why_an_axis_of_one_is_not_free() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 1)).eval()
    graph = mergeid.graph(model, seeded((2, 1, 8, 8)))
    reasons = {(t, a): why for t, a, why in graph.frozen}
    assert reasons["3.weight", 0] == reasons["0.weight", 1] == "single neuron"
    assert [s.size for s in graph.spaces] == [8]


class Offloaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8, bias=False)
        self.c = nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(self.a(x)).relu()))


def offloaded(seed: int) -> Offloaded:
    torch.manual_seed(seed)
    return disturbed(Offloaded(), seed).float()


@pytest.mark.parametrize("where", ["cpu", "disk", "some"])
def test_offloaded_models(where: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    plain, model = offloaded(0), offloaded(0)
    x = seeded((4, 8))
    if where == "cpu":
        model = cpu_offload(model)
    elif where == "disk":
        disk_offload(model, str(tmp_path))
    else:
        places = {"a": "disk", "b": "cpu", "c": "cpu", "norm": "cpu"}
        model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    expected = mergeid.graph(plain, x)
    found = mergeid.graph(model, x)
    assert [(s.size, [(a.tensor, a.axis) for a in s.axes]) for s in found.spaces] == [
        (s.size, [(a.tensor, a.axis) for a in s.axes]) for s in expected.spaces
    ]
    assert len(found.spaces) == 2 and found.verified is not None
    other = offloaded(1)
    merged = mergeid.merge(model, other, example_inputs=x, match="never").state
    torch.testing.assert_close(merged["a.weight"], (plain.a.weight + other.a.weight).detach() / 2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))  # still offloaded, and it still runs


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(MergeidError, match=r"parameter '0\.weight' of Sequential has no shape yet"):
        mergeid.graph(nn.Sequential(nn.LazyLinear(4)), seeded((2, 4)))


class WithNorm(Graph):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return super().forward(self.norm(x), edges)


@pytest.mark.parametrize("form", ["dicts", "tuples", "objects"])
def test_calibration_items_that_are_whole_inputs(form: str) -> None:
    """Graphs of different sizes, also of as many edges as nodes: a planted permutation is found, and B comes back."""
    kind: type[nn.Module] = OfObject if form == "objects" else WithNorm
    torch.manual_seed(0)
    a = disturbed(kind()).float()
    generator = torch.Generator().manual_seed(2)
    graphs = []
    for i in range(20):
        n = 5 + i % 4
        edges = torch.randint(n, (2, n if i % 2 else 9), generator=generator)
        graphs.append((torch.randn(n, 8, generator=generator), edges))
    data: list[Any] = {
        "dicts": [{"arg0": x, "arg1": e} for x, e in graphs],
        "tuples": graphs,
        "objects": [Features(x, e) for x, e in graphs],
    }[form]
    example = Features(*graphs[0]) if form == "objects" else graphs[0]
    graph = mergeid.graph(a, example)
    b = kind()
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(5)), a.state_dict()))
    result = mergeid.merge(a, b.eval(), data=data, example_inputs=example, repair=False)
    assert result.verdict == "match"
    for key, value in a.state_dict().items():
        torch.testing.assert_close(result.state[key], value)
    if form != "objects":
        mergeid.merge(a, b, data=data, example_inputs=example)  # statistics are estimated again, graph by graph


def test_whole_inputs_are_not_stacked() -> None:
    """What compares examples with one another refuses inputs that are a graph each."""
    a = disturbed(Graph()).float()
    data = [(torch.randn(6, 8), torch.randint(6, (2, 6))) for _ in range(20)]
    with pytest.raises(MergeidError, match="sketch puts examples into"):
        mergeid.sketch(a, data=data, example_inputs=data[0])


def test_examples_of_a_live_module_are_tensors_tuples_or_dicts() -> None:
    a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    rows = list(seeded((64, 4)))
    plans = [
        mergeid.plan(a, b, data=data, example_inputs=seeded((2, 4))).to_json()
        for data in (rows, [(row,) for row in rows], [{"arg0": row} for row in rows])
    ]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("data", [{"arg0": seeded((64, 4))}, "rows.npz"])
def test_data_that_holds_no_examples_is_refused(data: object) -> None:
    a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    with pytest.raises(MergeidError, match="expected a sequence of examples"):
        mergeid.plan(a, b, data=data, example_inputs=seeded((2, 4)))
