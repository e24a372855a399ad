"""`mergeid.graph` for any module: several inputs, constraints by hand, and graphs by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command_line import mergeid as command
from graph_helpers import disturbed, on, only, worst_change
from torch import Tensor, nn

import mergeid
from mergeid import MergeidError
from mergeid.neuron_graph import NeuronGraph

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """One of two layers, by a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.out_a, self.out_b = nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        h = self.inner(x).relu()
        return self.out_b(self.b(h).tanh()) if second else self.out_a(self.a(h).relu())


class Grouped(nn.Module):
    """Two groups of hidden neurons that are normalised each for itself, and a plain hidden layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.grouped, self.norm = nn.Linear(6, 8), nn.Linear(6, 8), nn.GroupNorm(2, 8)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.plain(x), self.norm(self.grouped(x))], 1).relu())


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return disturbed(kind()).float()


def holds(graph: NeuronGraph, model: nn.Module, *inputs: tuple) -> None:
    double = model.double()
    for x in inputs:
        x = tuple(v.double() if isinstance(v, Tensor) else v for v in x)
        assert worst_change(graph, double, x) < 1e-9


def test_one_input_says_nothing_of_the_other_branch() -> None:
    """Why further inputs are needed: the neurons that both branches read move, and only the first follows."""
    model = made(Branches)
    graph = mergeid.graph(model, X)
    assert only(graph, "a.weight", 0).size == 5
    assert not on(graph, "b.weight", 0) and not on(graph, "out_b.weight", 1)
    assert ("b.weight", 0, "never read by the traced forward pass") in graph.frozen
    holds(graph, model, (X, False))
    assert worst_change(graph, model, (X.double(), True)) > 1e-3


def test_two_inputs_drive_two_branches() -> None:
    model = made(Branches)
    graph = mergeid.graph(model, X, more_inputs=[(X, True)])
    shared = only(graph, "inner.weight", 0)
    assert only(graph, "a.weight", 1) is only(graph, "b.weight", 1) is shared
    assert {s.size for s in graph.spaces} == {8, 5} and len(graph.spaces) == 3
    assert only(graph, "a.weight", 0) is not only(graph, "b.weight", 0)
    assert all(not on(graph, f"out_{x}.weight", 0) for x in "ab"), "the outputs of both branches stay"
    holds(graph, model, (X, False), (X, True))
    both = mergeid.graph(model.float(), (X, True), more_inputs=[{"x": X, "second": False}])
    assert [s.size for s in both.spaces] == [s.size for s in graph.spaces] and both.share == graph.share


class Late(Branches):
    """Reads the hidden neurons in another order in the second branch: each input alone lets them move."""

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        h = self.inner(x).relu()
        return self.out_b(self.b(h * torch.arange(8.0).to(x)).tanh()) if second else self.out_a(self.a(h).relu())


def test_every_input_is_verified() -> None:
    model = made(Late)
    written = mergeid.graph(made(Branches), X, more_inputs=[(X, True)]).to_json()
    hidden = only(NeuronGraph.from_json(written), "inner.weight", 0).id
    assert hidden in mergeid.graph(model, X, graph=written).by_id
    cut = mergeid.graph(model, X, more_inputs=[(X, True)], graph=written)
    assert hidden not in cut.by_id and {s.size for s in cut.spaces} == {5}


def test_freeze_by_hand() -> None:
    model = made(Branches)
    inputs = {"example_inputs": X, "more_inputs": [(X, True)]}
    graph = mergeid.graph(model, **inputs, freeze=["a.weight[0]"])
    assert not on(graph, "a.weight", 0) and not on(graph, "out_a.weight", 1)
    assert ("a.weight", 0, "frozen by hand") in graph.frozen
    assert ("out_a.weight", 1, "frozen by hand") in graph.frozen
    assert {s.size for s in graph.spaces} == {8, 5}
    assert mergeid.graph(model, **inputs, freeze=["*.weight"]).spaces == []
    outs = mergeid.graph(model, **inputs, freeze=["out_*[1]"])
    assert [s.size for s in outs.spaces] == [8]


def test_tied_spaces_move_together() -> None:
    model = made(Branches)
    graph = mergeid.graph(model, X, more_inputs=[(X, True)], tie=[("a.weight[0]", "b.bias[0]")])
    assert only(graph, "a.weight", 0) is only(graph, "b.weight", 0) is only(graph, "out_b.weight", 1)
    holds(graph, model, (X, False), (X, True))


def test_a_constraint_splits_a_space() -> None:
    """Plain neurons that follow grouped ones come in these groups."""
    model = made(Grouped)
    free = mergeid.graph(model, X)
    plain, grouped = only(free, "plain.weight", 0), only(free, "grouped.weight", 0)
    assert (plain.size, plain.blocks) == (8, 1) and (grouped.size, grouped.blocks) == (8, 2)
    tied = mergeid.graph(model, X, tie=[("plain.weight[0]", "grouped.weight[0]")])
    space = only(tied, "plain.weight", 0)
    assert space is only(tied, "norm.weight", 0) and (space.size, space.blocks) == (8, 2)
    holds(tied, model, (X,))


WRONG = {
    "format": "mergeid.graph/1",
    "tensors": {"inner.weight": {"shape": [8, 6]}, "inner.bias": {"shape": [8]}, "a.weight": {"shape": [5, 8]},
                "a.bias": {"shape": [5]}, "out_a.weight": {"shape": [2, 5]}},
    "spaces": [
        {"id": "hidden", "size": 8, "axes": [
            {"tensor": t, "axis": a, "index": [[0, i] for i in range(8)]}
            for t, a in (("inner.weight", 0), ("inner.bias", 0), ("a.weight", 1))]},
        {"id": "no bias", "size": 5, "axes": [
            {"tensor": t, "axis": a, "index": [[0, i] for i in range(5)]}
            for t, a in (("a.weight", 0), ("out_a.weight", 1))]},
        {"id": "inputs", "size": 6, "axes": [
            {"tensor": "inner.weight", "axis": 1, "index": [[0, i] for i in range(6)]}]},
    ],
}  # fmt: skip


def test_a_wrong_graph_is_cut_down() -> None:
    """The first space is right; the second forgets a bias, the third permutes the inputs."""
    model = made(Branches)
    graph = mergeid.graph(model, X, graph=WRONG)
    assert [s.id for s in graph.spaces] == ["hidden"]
    assert graph.tensors == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    why = {(t, a): w for t, a, w in graph.frozen}
    assert why["a.weight", 0] == "verification: the output changed under a permutation"
    assert why["b.weight", 0] == "not free in the given graph"
    assert graph.verified is not None and graph.verified["max_relative_error"] < 1e-9
    holds(graph, model, (X,))


def test_round_trip(tmp_path: Path) -> None:
    model = made(Grouped)
    graph = mergeid.graph(model, X)
    text = json.dumps(graph.to_json())
    file = tmp_path / "graph.json"
    file.write_text(text)
    for given in (file, str(file), json.loads(text), graph):
        again = mergeid.graph(model, X, graph=given)
        assert json.dumps(again.to_json()) == text


IN_A_PROCESS = """
import json, sys, torch, mergeid
from test_graph_any_module import Branches, Grouped, X, made
print(json.dumps([mergeid.graph(made(Branches), X, more_inputs=[(X, True)]).to_json(),
                  mergeid.graph(made(Grouped), X, tie=[("plain.bias[0]", "norm.bias[0]")]).to_json()]))
"""


def test_the_same_graph_in_another_process() -> None:
    texts = set()
    for seed in ("1", "2"):
        path = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *sys.path])
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    assert len(texts) == 1


def changed(**space: object) -> dict:
    return {**WRONG, "spaces": [{**WRONG["spaces"][0], **space}]}


SOME = [[0, i] for i in range(8)]
BAD_GRAPHS = {
    "has format": {"format": "other"},
    "'spaces'": {k: v for k, v in WRONG.items() if k != "spaces"},
    "tensors is a list of 1; expected a table": {**WRONG, "tensors": ["inner.weight"]},
    "8 neurons in 3 blocks": changed(blocks=3),
    "must come before it": changed(blocks=2, parents=["later"], axes=[]),
    "a different one for each": {**WRONG, "spaces": [WRONG["spaces"][0], WRONG["spaces"][0]]},
    "names more": changed(axes=[{"tensor": "inner.weight", "axis": 0, "index": [*SOME[:7], [0, 8]]}]),
    "that tensor has shape": changed(axes=[{"tensor": "inner.weight", "axis": -1, "index": SOME}]),
    "expected equally many": changed(axes=[{"tensor": "inner.weight", "axis": 0, "index": [*SOME[:7], [0, 6]]}]),
    "expected all that can be permuted": changed(
        axes=[{"tensor": "inner.weight", "axis": 0, "index": [*SOME[:7], None]}]
    ),
    "expected one space": {**WRONG, "spaces": [WRONG["spaces"][0], {**WRONG["spaces"][0], "id": "twice"}]},
    "give its block_parents": {
        **WRONG, "spaces": [WRONG["spaces"][0], {"id": "x", "size": 18, "blocks": 9, "parents": ["hidden"], "axes": []}]
    },
    "cannot follow its parents": {
        **WRONG,
        "spaces": [
            WRONG["spaces"][0],
            {"id": "x", "size": 4, "blocks": 2, "parents": ["hidden"], "block_parents": [[0], [1]], "axes": []},
        ],
    },
    "did you mean inner.weight": {**WRONG, "tensors": {"inner.weights": {"shape": [8, 6]}}, "spaces": []},
    "use the graph of this very architecture": {**WRONG, "tensors": {"inner.weight": {"shape": [9, 6]}}, "spaces": []},
}  # fmt: skip


@pytest.mark.parametrize("part", BAD_GRAPHS)
def test_bad_graphs(part: str) -> None:
    with pytest.raises(MergeidError, match=part):
        mergeid.graph(made(Branches), X, graph=BAD_GRAPHS[part])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"freeze": ["a.wieght[0]"]}, r"freeze 'a.wieght\[0\]' matches no axis of the model; did you mean .*a.weight"),
        ({"freeze": ["a.bias[1]"]}, r"freeze 'a.bias\[1\]' matches no axis"),
        ({"freeze": 3}, "freeze is 3; expected a list of texts"),
        ({"tie": [("a.weight", "b.weight[0]")]}, r"does not name an axis; expected TENSOR\[AXIS\]"),
        ({"tie": [("a.weight[2]", "b.weight[0]")]}, r"the model has no axis 'a.weight\[2\]'"),
        ({"tie": ["a.weight[0]"]}, "is not a pair"),
        ({"tie": [("a.weight[0]", "b.weight[1]")]}, r"\(5 positions\) to b.weight\[1\] \(8 positions\)"),
        ({"tie": [("a.weight[0]",)]}, "is not a pair"),
        ({"graph": "nowhere.json"}, "no such graph file: nowhere.json"),
        ({"graph": WRONG, "freeze": ["a.bias"]}, "freeze= and tie= are for a traced graph"),
        ({"more_inputs": [torch.zeros(2, 7)]}, r"Branches does not run on more_inputs\[0\] \(RuntimeError: mat1"),
        ({"more_inputs": [{"z": X}]}, r"does not run on more_inputs\[0\] \(TypeError"),
        ({"example_inputs": torch.zeros(2, 7)}, "does not run on example_inputs"),
    ],
)
def test_bad_input(options: dict, part: str) -> None:
    with pytest.raises(MergeidError, match=part):
        mergeid.graph(made(Branches), **{"example_inputs": X, **options})


def test_one_text_is_a_list_of_it() -> None:
    one, many = (mergeid.graph(made(Branches), X, freeze=f) for f in ("a.bias[0]", ["a.bias[0]"]))
    assert one.to_json() == many.to_json()


def test_no_output() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(MergeidError, match="Silent returned no floating-point tensor"):
        mergeid.graph(Silent(), X)


class Hidden(nn.Module):
    """One hidden layer with statistics; what follows differs in one habit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


class Unanswered(Hidden):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.norm.eval()


class Versioned(Hidden):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def habit(kind: type[nn.Module]) -> nn.Module:
    """With the weights of `Hidden`, whose neurons all differ."""
    model = kind()
    model.load_state_dict(made(Hidden).state_dict(), strict=False)
    model.eval()
    return model


@pytest.mark.parametrize("kind", [Hidden, Unanswered, Versioned])
def test_habits_of_modules_say_nothing_of_their_neurons(kind: type[nn.Module]) -> None:
    model, other, merged = (habit(kind) for _ in range(3))
    graph = mergeid.graph(model, X)
    assert only(graph, "a.weight", 0) is only(graph, "norm.running_var", 0) is only(graph, "b.weight", 1)
    element = graph.random_element(torch.Generator().manual_seed(3))
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    other.load_state_dict(graph.apply_state(element, tensors), strict=False)
    torch.testing.assert_close(other(X), model(X))
    assert not torch.allclose(other.a.weight, model.a.weight)
    data = [{"arg0": x, "labels": torch.tensor(k % 4)} for k, x in enumerate(torch.randn(24, 6))]
    state = mergeid.merge(model, other, example_inputs=X, data=data, match="always").state
    merged.load_state_dict(state, strict=False)
    torch.testing.assert_close(merged(X), model(X), rtol=1e-4, atol=1e-5)


class Particular(nn.Module):
    """Runs in one number format, or on some weights alone."""

    def __init__(self, about: str) -> None:
        super().__init__()
        self.a, self.b, self.about = nn.Linear(6, 8), nn.Linear(8, 4), about
        self.std = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).tanh())
        if self.about == "asserts":
            assert x.dtype == torch.float32, "needs float32"
        elif self.about == "looks up":
            y = y * {torch.float32: 1.0, torch.float16: 2.0}[x.dtype]
        elif self.about == "spread":
            y = torch.distributions.Normal(y, self.std).mean
        elif self.about == "finite":
            y = y / self.std.sqrt()
            if not y.isfinite().all():
                raise ValueError("activations that are not finite")
        elif self.about == "order" and abs(float((self.std * torch.arange(4)).sum()) - 0.6) > 1e-3:
            raise ValueError("these weights are not mine")
        elif self.about == "itself" and self.a.weight.data_ptr() != self.home:
            raise KeyError("a copy")
        return y


@pytest.mark.parametrize("about", ["asserts", "looks up", "spread", "finite"])
def test_models_that_refuse_other_weights_or_formats_are_run_as_they_like_it(about: str) -> None:
    torch.manual_seed(0)
    model = Particular(about).eval()
    graph = mergeid.graph(model, X)
    assert only(graph, "a.weight", 0) is only(graph, "b.weight", 1)
    assert graph.verified is not None and graph.verified["error_when_misapplied"] > 1e-3
    single = about in ("asserts", "looks up")
    assert graph.verified["dtype"] == ("float32" if single else "float64")
    other = Particular(about)
    other.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(0)), model.state_dict()))
    torch.testing.assert_close(other(X), model(X))


def test_a_permutation_on_which_the_model_raises_is_wrong() -> None:
    torch.manual_seed(0)
    model = Particular("order").eval()
    model.std.data = torch.tensor([0.3, 0.0, 0.0, 0.2])
    graph = mergeid.graph(model, X)
    hidden = only(graph, "a.weight", 0)
    wrong = graph.to_json()
    wrong["spaces"].append(
        {"id": "w", "size": 4, "axes": [{"tensor": "std", "axis": 0, "index": [[0, k] for k in range(4)]}]}
    )
    assert [s.id for s in mergeid.graph(model, X, graph=wrong).spaces] == [hidden.id]


def test_a_model_whose_copies_do_not_run_is_refused_in_a_sentence() -> None:
    model = Particular("itself").eval()
    model.home = model.a.weight.data_ptr()
    expected = r"a copy of Particular does not run on its example inputs, .* \(KeyError: 'a copy'\), so its graph"
    with pytest.raises(MergeidError, match=expected):
        mergeid.graph(model, X)


NO_MODEL = "expected a file, a folder, a hub id or a live module: "


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            dict(nn.Linear(6, 4).state_dict()),
            f"a model is a dict of tensors; {NO_MODEL}load it into its module, or save",
        ),
        (nn.Linear, f"a model is the class Linear; {NO_MODEL}make a module of it"),
        (X, f"a model is an object of type Tensor; {NO_MODEL}name its file, or give its module"),
        (len, f"a model is an object of type builtin_function_or_method; {NO_MODEL}"),
        (7, f"a model is an object of type int; {NO_MODEL}"),
    ],
)
def test_what_is_no_model_is_refused_in_a_sentence(given: object, expected: str) -> None:
    with pytest.raises(MergeidError, match=expected):
        mergeid.graph(given, X)
    for verb in (mergeid.merge, mergeid.plan):
        with pytest.raises(MergeidError, match=expected):
            verb(given, given)
    with pytest.raises(MergeidError, match=expected):
        mergeid.merge(given, given, match="never")


def test_no_further_inputs() -> None:
    model = made(Branches)
    assert len(mergeid.graph(model, X, more_inputs=None).spaces) == len(mergeid.graph(model, X).spaces)
    with pytest.raises(MergeidError, match="more_inputs is 3; expected a list or None"):
        mergeid.graph(model, X, more_inputs=3)


def test_packed_weights_hold_no_neurons() -> None:
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), {nn.Linear})
        graph = mergeid.graph(nn.Sequential(*layers, packed), X)
    assert only(graph, "0.weight", 0) is only(graph, "2.weight", 1)
    assert not on(graph, "2.weight", 0)


def test_not_json(tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    file.write_text("{")
    with pytest.raises(MergeidError, match=r"graph.json is not valid JSON"):
        mergeid.graph(made(Branches), X, graph=file)


def test_command_line(tmp_path: Path) -> None:
    """A graph written by the command, corrected by hand, and read again."""
    written = command("graph", "timm/test_resnet", "--json", "graph.json", cwd=tmp_path)
    assert written.code == 0, written.stderr
    graph = json.loads((tmp_path / "graph.json").read_text())
    kept = graph["spaces"].pop()
    (tmp_path / "fewer.json").write_text(json.dumps(graph))
    again = command("graph", "timm/test_resnet", "--from", "fewer.json", "--json", cwd=tmp_path)
    assert again.code == 0, again.stderr
    found = json.loads(again.stdout)
    assert [s["id"] for s in found["spaces"]] == [s["id"] for s in graph["spaces"]]
    assert found["verified"]["max_relative_error"] < 1e-6
    lost = {(a["tensor"], a["axis"]) for a in kept["axes"]}
    assert {(f["tensor"], f["axis"]) for f in found["frozen"] if f["why"] == "not free in the given graph"} == lost
    missing = command("graph", "timm/test_resnet", "--from", "none.json", cwd=tmp_path)
    assert missing.code == 2 and missing.lines == [missing.stderr.strip().splitlines()[-1]]
    assert "no such graph file: none.json" in missing.stderr
