"""Predictions of pairs and of sketches, in Python and in the terminal."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import mergeid
from safetensors.torch import save_file
from test_bad_input import all_refused
from torch import Tensor, nn

import mergeid as m
from mergeid.errors import MergeidError
from mergeid.prediction.sketch import load_sketch
from mergeid.results.prediction import Outlook, PredictResult, advise


def trained(seed: int, steps: int = 60, start: nn.Module | None = None) -> nn.Module:
    """Sums of inputs sorted into classes: enough to have something to lose."""
    torch.manual_seed(seed)
    net = copy.deepcopy(start) if start else nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(steps):
        x = torch.randn(64, 6)
        loss = nn.functional.cross_entropy(net(x), labels(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def labels(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).long() + 2 * (x[:, 1] * x[:, 2] > 0).long()


X = torch.randn(200, 6, generator=torch.Generator().manual_seed(5))
DATA = [{"arg0": x} for x in X]


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    base = trained(0)
    return {"a": trained(1, 20, base), "near": trained(2, 20, base), "far": trained(3, 80)}


def predict(a: nn.Module, b: nn.Module, **how: object) -> PredictResult:
    return m.predict(a, b, example_inputs=X[:2], **{"data": DATA, **how})


def by_name(found: PredictResult) -> dict[str, Outlook]:
    return {o.label: o for o in found.outlooks}


def test_near_and_far(nets: dict[str, nn.Module]) -> None:
    near, far = predict(nets["a"], nets["near"]), predict(nets["a"], nets["far"])
    assert near.best.nats.expected < far.outlooks[0].nats.expected
    assert far.best.nats.expected <= far.outlooks[0].nats.expected
    for found in (near, far):
        for o in found.outlooks:
            assert 0 <= o.nats.low <= o.nats.expected <= o.nats.high
            assert o.nats.within is not None and 0 <= o.nats.within <= 1
        assert found.advice.endswith(".") and "\n" not in found.advice
        assert found.bound is not None and "does not apply" in found.bound.statement
        json.dumps(found.to_json())
    assert far.outlooks[0].layers[0].layer in {"0.weight", "2.weight"}
    looser = predict(nets["a"], nets["near"], tolerate=5.0)
    assert (looser.best.nats.within or 0) >= (near.best.nats.within or 0)


def test_with_itself_nothing_is_lost(nets: dict[str, nn.Module]) -> None:
    for data in (DATA, None):
        found = predict(nets["a"], copy.deepcopy(nets["a"]), data=data)
        assert [o.label for o in found.outlooks] == ["direct"]
        assert found.best.nats.expected == 0 and found.best.nats.within == 1
        assert "as is" in found.advice


def test_what_is_skipped_is_taken_from_the_first_model(nets: dict[str, nn.Module]) -> None:
    """Models that differ in their heads alone: with A's head both are A, whatever B says with its own."""
    other = copy.deepcopy(nets["a"])
    with torch.no_grad():
        other[2].weight.neg_()  # type: ignore[index, union-attr, operator]
    assert (predict(nets["a"], other).best.nats.within or 0) < 1
    found = predict(nets["a"], other, skip=["2.*"])
    assert found.best.nats.expected == 0 and found.best.nats.within == 1


def test_scrambled_models_are_the_same_models(nets: dict[str, nn.Module]) -> None:
    graph = m.graph(nets["a"], X[:2])
    element = graph.random_element(torch.Generator().manual_seed(1))

    def scrambled(net: nn.Module) -> nn.Module:
        other = copy.deepcopy(net)
        other.load_state_dict(graph.apply_state(element, net.state_dict()))
        return other

    plain = by_name(predict(nets["a"], nets["near"]))
    both = by_name(predict(scrambled(nets["a"]), scrambled(nets["near"])))
    assert both["direct"].nats.expected == pytest.approx(plain["direct"].nats.expected, rel=1e-3, abs=1e-4)
    one = by_name(predict(nets["a"], scrambled(nets["near"])))
    matched = plain.get("matched", plain["direct"])
    assert one["matched"].nats.expected == pytest.approx(matched.nats.expected, rel=1e-3, abs=1e-4)
    assert one["direct"].nats.expected > one["matched"].nats.expected


def test_batch_size_and_seed_of_nothing(nets: dict[str, nn.Module]) -> None:
    one, two = (predict(nets["a"], nets["far"], batch_size=n) for n in (7, 64))
    for p, q in zip(one.outlooks, two.outlooks, strict=True):
        assert p.nats.expected == pytest.approx(q.nats.expected, rel=1e-4, abs=1e-6)


def test_the_bound(nets: dict[str, nn.Module]) -> None:
    near = predict(nets["a"], nets["near"], base=copy.deepcopy(nets["a"])).bound
    far = predict(nets["a"], nets["far"], base=copy.deepcopy(nets["near"])).bound
    assert near is not None and far is not None
    assert near.holds and "holds asymptotically" in near.statement
    assert not far.holds and "does not hold: β" in far.statement
    assert all(x.bound == pytest.approx(x.beta**1.5) for x in (*near.layers, *far.layers))


def test_advice() -> None:
    from mergeid.prediction.model import Interval

    def way(name: str, expected: float, low: float, within: float, beyond: float = 0.0) -> Outlook:
        return Outlook(name, False, Interval(expected, low, expected * 2, 0.0, within, beyond), None, [])

    assert advise([way("direct", 0.001, 0, 0.97), way("matched", 0.001, 0, 0.98)], 0.01).startswith("Merge them as is")
    assert "after matching" in advise([way("direct", 1.0, 0.3, 0.01), way("matched", 0.001, 0, 0.95)], 0.01)
    assert advise([way("direct", 1.0, 0.3, 0.01)], 0.01).startswith("Do not average")
    assert advise([way("direct", 0.05, 0.0, 0.5)], 0.01).startswith("Measure before")
    assert advise([way("direct", 0.0, 0.0, 0.99, 7.0)], 0.01).startswith("Cannot tell")


def test_a_collapsed_model_is_not_trusted(nets: dict[str, nn.Module]) -> None:
    """One that says the same of every input, whatever that is: sure of one class, or of none."""
    for bias in (torch.zeros(4), torch.tensor([9.0, 0, 0, 0])):
        dead = copy.deepcopy(nets["a"])
        with torch.no_grad():
            dead[2].weight.zero_()  # type: ignore[index, union-attr, operator]
            dead[2].bias.copy_(bias)  # type: ignore[index, union-attr, operator]
        for data in (DATA, None):
            found = predict(nets["a"], dead, data=data)
            assert not any(o.nats.trusted for o in found.outlooks)
            kind = "input" if data is not None else "random input"
            assert found.advice.startswith(f"Cannot tell: one of the models makes the same prediction for every {kind}")
    assert all(o.nats.trusted for o in predict(nets["a"], nets["near"]).outlooks)


@pytest.mark.parametrize("size", [1.0, 20.0, 1e3])
def test_no_prediction_leaves_its_limits(nets: dict[str, nn.Module], size: float) -> None:
    """Networks as sure of themselves as one likes, with data and without: what is lost ends at a uniform guess."""
    loud = copy.deepcopy(nets["far"])
    with torch.no_grad():
        for p in loud.parameters():
            p.mul_(size ** (1 / 2))
    for data in (DATA, None):
        for o in predict(nets["a"], loud, data=data).outlooks:
            assert 0 <= o.nats.low <= o.nats.expected <= o.nats.high <= np.log(4) + 1e-12
            if o.points is not None:
                assert 0 <= o.points.low <= o.points.expected <= o.points.high <= 100


def test_bad_input(nets: dict[str, nn.Module]) -> None:
    with pytest.raises(MergeidError, match="--tolerate must be a loss"):
        predict(nets["a"], nets["far"], tolerate=-1.0)
    with pytest.raises(MergeidError, match="--tolerate must be a loss"):
        m.predict_sketches(["a.sketch", "b.sketch"], tolerate=float("nan"))
    with pytest.raises(MergeidError, match=r"at least 16 examples are needed .*, and there are 3; .* a larger --limit"):
        predict(nets["a"], nets["far"], data=DATA[:3])
    with pytest.raises(MergeidError, match=r"and there are 5; .* a larger --limit"):
        predict(nets["a"], nets["far"], limit=5)
    numbers = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 1)).eval()
    with pytest.raises(MergeidError, match="not class logits"):
        predict(numbers, copy.deepcopy(numbers))


# -- sketches -----------------------------------------------------------------------------------------------


def sketched(net: nn.Module, output: Path | None = None, data: object = DATA) -> object:
    return m.sketch(net, data=data, example_inputs=X[:2], output=output)


def test_sketches_in_memory_and_on_disk(nets: dict[str, nn.Module], tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.sketch" for name in nets]
    made = [sketched(net, file) for net, file in zip(nets.values(), files, strict=True)]
    one, two = m.predict_sketches(made), m.predict_sketches(files)
    assert two.names == list(nets)
    assert np.array(one.expected()).shape == (3, 3)
    np.testing.assert_allclose(one.expected(), two.expected(), rtol=1e-6)
    assert one.expected()[0][1] <= one.pairs[0, 2].outlooks[0].nats.expected
    json.dumps(two.to_json())
    again = load_sketch(files[0])
    for name, values in made[0].activations.items():  # type: ignore[attr-defined]
        torch.testing.assert_close(again.activations[name], values, rtol=0, atol=0)


def test_a_sketch_of_a_scrambled_model_matches(nets: dict[str, nn.Module]) -> None:
    graph = m.graph(nets["far"], X[:2])
    other = copy.deepcopy(nets["far"])
    element = graph.random_element(torch.Generator().manual_seed(3))
    other.load_state_dict(graph.apply_state(element, other.state_dict()))
    found = m.predict_sketches([sketched(nets["far"]), sketched(other)]).pairs[0, 1]
    ways = by_name(found)
    assert ways["matched"].nats.expected == pytest.approx(0, abs=1e-6)
    assert ways["direct"].nats.expected > 0.05


def test_sketches_say_too_that_inputs_are_of_another_kind(nets: dict[str, nn.Module]) -> None:
    """Inputs that differ only where the training's told nothing: the models are sure, each of something else."""
    odd = [{"arg0": torch.cat([torch.zeros(3), 100 * x[3:]])} for x in X]
    for data, told in ((odd, True), (DATA, False)):
        notes = m.predict_sketches([sketched(nets[k], data=data) for k in ("a", "far")]).pairs[0, 1].notes
        assert any("of another kind than the training data" in note for note in notes) == told


def test_the_drawn_matrix_makes_no_mountains_of_molehills(
    nets: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses next to nothing are dark, and a model has none with itself."""
    from mergeid.commands import predict as command
    from mergeid.reporting import plots

    drawn: list[tuple[np.ndarray, float]] = []
    monkeypatch.setattr(
        plots, "plot_heat_map", lambda rows, columns, values, *_, largest, **__: drawn.append((values, largest))
    )
    for names in (("a", "near"), ("a", "far")):
        matrix = m.predict_sketches([sketched(nets[name]) for name in names])
        command.matrix_shown(SimpleNamespace(as_json=True), matrix, tmp_path / "x.png")  # type: ignore[arg-type]
    assert all(np.isnan(values.diagonal()).all() for values, _ in drawn)
    (near, least), (far, most) = drawn
    assert near[0, 1] < 0.05 and least == 0.1 and most == max(0.1, far[0, 1])


def test_no_model_runs_for_sketches(nets: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    made = [sketched(net) for net in nets.values()]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a module was run")

    monkeypatch.setattr(nn.Module, "__call__", refuse)
    m.predict_sketches(made)


def test_sketches_that_do_not_compare(nets: dict[str, nn.Module], tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 4)).eval()
    with pytest.raises(MergeidError, match="different architectures"):
        m.predict_sketches([sketched(nets["a"]), sketched(wide)])
    with pytest.raises(MergeidError, match="different inputs"):
        m.predict_sketches([sketched(nets["a"]), sketched(nets["far"], data=DATA[:50])])
    with pytest.raises(MergeidError, match="at least two"):
        m.predict_sketches([sketched(nets["a"])])
    save_file({"x": torch.zeros(2)}, tmp_path / "x.sketch")
    with pytest.raises(MergeidError, match=r"x\.sketch is not a sketch; make one with: mergeid sketch"):
        m.predict_sketches([tmp_path / "x.sketch", tmp_path / "x.sketch"])
    sketched(nets["a"], tmp_path / "a.sketch")
    with pytest.raises(MergeidError, match="exists already"):
        sketched(nets["a"], tmp_path / "a.sketch")
    with pytest.raises(MergeidError, match=r"needs the ending \.sketch"):
        sketched(nets["a"], tmp_path / "a.json")


# -- the commands -------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path) -> Path:
    import timm

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        net = timm.create_model("test_resnet", num_classes=4, in_chans=1)
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
    images = np.random.default_rng(0).standard_normal((40, 1, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "data.npz", images=images)
    return tmp_path


@pytest.mark.slow
def test_the_commands(work: Path) -> None:
    pair = ("predict", "a.safetensors", "b.safetensors")
    done = mergeid(*pair, "--data", "data.npz", "-o", "p.json", "--base", "a.safetensors", cwd=work, columns=140)
    assert done.code == 0, done.stderr
    assert done.written == ["p.json"]
    assert "nats lost" in done.stdout and "the bound of arXiv 2606.04754" in done.stdout
    found = json.loads((work / "p.json").read_text())
    assert found["format"] == "mergeid.predict/1" and found["mode"] == "inputs"
    assert {o["repaired"] for o in found["outlooks"]} == {False, True}
    done = mergeid(*pair, "--json", cwd=work)
    assert json.loads(done.stdout)["mode"] == "weights" and done.written == []
    for name in "ab":
        done = mergeid("sketch", f"{name}.safetensors", "--data", "data.npz", "-o", f"{name}.sketch", cwd=work)
        assert done.code == 0 and done.written == [f"{name}.sketch"], done.stderr
    done = mergeid("predict", "a.sketch", "b.sketch", "--plot", "heat.png", cwd=work, columns=120)
    assert done.code == 0 and done.written == ["heat.png"], done.stderr
    assert "expected barrier" in done.stdout and "nats lost" in done.stdout
    done = mergeid("predict", "a.sketch", "b.sketch", "--json", cwd=work)
    assert json.loads(done.stdout)["format"] == "mergeid.predictions/1"


@pytest.mark.slow
def test_refused_in_the_terminal(work: Path) -> None:
    pair = ["predict", "a.safetensors", "b.safetensors"]
    all_refused(
        work,
        (["predict", "a.safetensors"], ["two models, got 1"]),
        (["predict", "a.safetensors", "x.sketch"], ["expected only sketches or only models"]),
        ([*pair, "--plot", "h.png"], ["--plot draws the matrix of sketches"]),
        ([*pair, "--tolerate", "-1"], ["--tolerate must be a loss"]),
        ([*pair, "-o", "a.safetensors"], ["a.safetensors"]),
        (
            ["predict", "x.sketch", "y.sketch"],
            ["no such file or folder: x.sketch; expected a file made by mergeid sketch"],
        ),
        (["predict", "x.sketch", "y.sketch", "--data", "data.npz"], ["leave out --data, --base and --try"]),
        (["sketch", "a.safetensors", "--data", "data.npz", "-o", "a.json"], ["ending .sketch"]),
    )


def test_points_have_one_decimal_and_sentences_no_more_than_thousandths() -> None:
    """2.650 points claimed digits that no prediction has; 0.00067 and 1.2e-05 nats are no losses to speak of."""
    from rich.console import Console

    from mergeid.prediction.model import Interval
    from mergeid.reporting.predictions import prediction_table
    from mergeid.results.prediction import Worth, in_nats

    said = {0.00067: "0.001", 1.2e-5: "0", -1e-9: "0", -0.004: "-0.004", 0.0342: "0.034", 0.61: "0.61", 12.4: "12"}
    assert {value: in_nats(value) for value in said} == said
    points = Interval(2.6499, 0.94, 32.51, 0.0, 0.5, 0.0)
    ways = [Outlook("direct", False, Interval(0.1, 0.0, 0.2, 0.0, 0.5, 0.0), points, [])]
    found = PredictResult("a", "b", "x", "inputs", 64, 0.01, ways, None, "1", worth=Worth(0.0, -1e-3, 6.7e-4, 0.0, 1.0))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(prediction_table(found, width=120))
    row = next(line for line in console.export_text().splitlines() if line.startswith("direct"))
    assert "0.100  0.000 to 0.200" in row and " 2.6 " in row and "0.9 to 32.5" in row
    assert "at most 0.001 nats" in found.said_of_worth


@pytest.mark.parametrize(("kind", "told"), [("BertModel", True), ("BertForSequenceClassification", False)])
def test_outputs_that_are_features_are_no_losses(kind: str, told: bool, tmp_path: Path) -> None:
    """Embeddings and noise of diffusion models were given nats and accuracy points without a word."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=3, **sizes)
        getattr(transformers, kind)(config).save_pretrained(tmp_path / name)
    found = m.predict(tmp_path / "a", tmp_path / "b")
    assert any("not known to be class scores" in note for note in found.notes) == told
