"""Trials, worth and labels: against naive computations and what must hold of any networks."""

from __future__ import annotations

import copy
import inspect
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_predict import DATA, X, labels, trained
from torch import Tensor, nn
from torch.nn import functional as F

import mergeid as m
from mergeid.commands.predict import _next
from mergeid.commands.terminal import Call
from mergeid.errors import MergeidError
from mergeid.prediction.labels import Measured, corrected
from mergeid.prediction.model import Interval, Model, Pool, Predictor, Term
from mergeid.prediction.trial import TogetherSums, TrialSums
from mergeid.prediction.worth import Shares, interference_of, worth_of
from mergeid.reporting.predictions import trials_table
from mergeid.results.prediction import Finding, PredictResult, TrialReader, advise_tried
from mergeid.results.trial import Trial
from mergeid.stages import trial

LABELLED = [{"arg0": x, "labels": y} for x, y in zip(X, labels(X), strict=True)]


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, nn.Module]:
    return trained(1), trained(3, 80)


@pytest.fixture(scope="module")
def found(nets: tuple[nn.Module, nn.Module]) -> PredictResult:
    return m.predict(*nets, data=LABELLED, example_inputs=X[:2], trial=True)


def averaged(a: nn.Module, b: nn.Module) -> nn.Module:
    net = copy.deepcopy(a)
    net.load_state_dict({k: (v + b.state_dict()[k]) / 2 for k, v in a.state_dict().items()})
    return net


def test_a_trial_is_what_the_merge_loses(nets: tuple[nn.Module, nn.Module], found: PredictResult) -> None:
    """The plain merge against a naive computation on the inputs that it is tried on, with pseudo-labels and labels."""
    a, b = nets
    x, y = X[1::2], labels(X[1::2])
    with torch.no_grad():
        la, lb, lm = (net(x).double().log_softmax(-1) for net in (a, b, averaged(a, b)))
    mixed = (la.exp() + lb.exp()) / 2
    hard, soft = mixed.argmax(-1), mixed
    plain = next(t for t in found.trials if t.label == "direct")
    gap = (la + lb) / 2 - lm
    assert plain.hard == pytest.approx(float(gap.gather(1, hard[:, None]).mean()), abs=1e-6)
    assert plain.soft == pytest.approx(float((soft * gap).sum(1).mean()), abs=1e-6)
    agreed = [(z.argmax(-1) == hard).double().mean() for z in (la, lb, lm)]
    assert plain.missed == pytest.approx(float((agreed[0] + agreed[1]) / 2 - agreed[2]), abs=1e-6)
    assert plain.labelled is not None and plain.labelled.examples == plain.examples == 100
    losses = [F.nll_loss(z, y, reduction="none") for z in (la, lb, lm)]
    excess = losses[2] - (losses[0] + losses[1]) / 2
    assert plain.labelled.nats == pytest.approx(float(excess.mean()), abs=1e-6)
    assert plain.labelled.low < plain.labelled.nats < plain.labelled.high
    right = [(z.argmax(-1) == y).double().mean() for z in (la, lb, lm)]
    assert plain.labelled.points == pytest.approx(100 * float((right[0] + right[1]) / 2 - right[2]), abs=1e-6)


def test_every_way_is_tried_and_said(found: PredictResult) -> None:
    ways = {t.label: t for t in found.trials}
    assert set(ways) - {"solved, leaning"} == {"direct", "matched", "matched, RegMean", "solved"}
    assert ways["solved"].soft < ways["direct"].soft
    for t in found.trials:
        assert t.labelled is not None
        assert t.labelled.corrected_low < t.labelled.corrected < t.labelled.corrected_high
    assert found.worth is not None and found.worth.kept is not None and 0 <= found.worth.kept <= 1
    assert found.said_of_worth.endswith(".") and "\n" not in found.said_of_worth
    told = json.loads(json.dumps(found.to_json()))
    assert [t["way"] for t in told["trials"]] == list(ways) and told["ensemble"]["agreed"] <= 1


def test_a_leaning_merge_is_tried_where_the_solved_one_stays_far(
    nets: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    for left, leans in ((-1.0, True), (1e3, False)):
        monkeypatch.setattr(trial, "LEFT", left)
        tried = {t.label: t for t in m.predict(*nets, data=LABELLED, example_inputs=X[:2], trial=True).trials}
        assert ("solved, leaning" in tried) == leans
    assert tried["solved"].options == ("--repair", "solve")


def test_trials_of_a_model_with_itself_lose_nothing(nets: tuple[nn.Module, nn.Module]) -> None:
    same = m.predict(nets[0], copy.deepcopy(nets[0]), data=DATA, example_inputs=X[:2], trial=True)
    for t in same.trials:
        assert abs(t.hard) < 1e-3 and abs(t.soft) < 1e-3 and t.labelled is None
    assert same.worth is not None and same.worth.gain == pytest.approx(0, abs=1e-9) and same.worth.agreed == 1


def test_a_trial_needs_data(nets: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(MergeidError, match="--try runs the merges on inputs"):
        m.predict(*nets, example_inputs=X[:2], trial=True)


# -- what is expected after a trial -------------------------------------------------------------------------


def reader(nets: tuple[nn.Module, nn.Module]) -> tuple[TrialReader, PredictResult]:
    """Of a predictor that takes the hard loss for what is lost, with an interval from half of it to twice as much."""
    term = Term("hard", 0.02, weight=1.0)
    pool = Pool((-0.5, 0.0, 0.5), (0.0, 1.0, 0.0))
    own = Model("nats", 0.02, 0.0, (term,), 1.0, 0.0, (), {"all": pool})
    predictor = Predictor("0", {}, {("trial", "nats", w): own for w in ("direct", "matched", "solved", "leaning")})
    found = m.predict(*nets, data=DATA, example_inputs=X[:2], trial=True)
    features = {"uniform": math.log(3), "own_entropy": 0.5, "divergence": 0.3, "excess": 0.1, "told": 1.0}
    findings = [Finding(k, features, None, []) for k in ("direct", "matched")]
    return TrialReader(predictor, findings, found.outlooks, 0.01), found


def test_what_is_expected_rests_on_the_trial(nets: tuple[nn.Module, nn.Module]) -> None:
    read, found = reader(nets)
    for t in found.trials:
        nats = read.nats(t)
        if t.repair == "regmean":
            assert nats is None, "nothing was fitted on it"
        else:
            assert nats is not None
            assert nats.expected == pytest.approx(min(max(t.hard, 0.0), math.log(3)), abs=1e-9)
    # labels correct what was predicted of merges that are not solved, and what is expected of solved ones
    priors = {t.label: read.before_labels(replace(t, nats=read.nats(t))) for t in found.trials}
    predicted = {o.label: o.nats for o in found.outlooks}
    assert all(priors[way] is predicted[way] for way in ("direct", "matched"))
    assert priors["solved"] is not None and priors["solved"] is not predicted["solved"]
    worse = replace(found.trials[0], hard=found.trials[0].hard + 0.1)
    one, two = (read.nats(t) for t in (found.trials[0], worse))
    assert one is not None and two is not None and one.expected < two.expected


def test_the_table_of_trials_has_no_empty_columns(nets: tuple[nn.Module, nn.Module], found: PredictResult) -> None:
    def shown(result: PredictResult) -> str:
        console = Console(width=140, record=True, file=io.StringIO())
        console.print(trials_table(result, width=140))
        return console.export_text()

    def told(expected: float) -> PredictResult:
        nats = Interval(expected, 0.0, 0.3, 0.0, 0.25, 0.0)
        return replace(found, trials=[replace(t, labelled=None, nats=nats, hard=-1e-5) for t in found.trials])

    assert "by labels" in shown(found) and "≤ 0.01" not in shown(found)
    assert "0.125" in shown(told(0.125)) and "0.000 to 0.300" in shown(told(0.125)) and "0.25" in shown(told(0.125))
    assert "-0.000" not in shown(told(0.125))
    bare = shown(replace(found, trials=[replace(t, labelled=None, nats=None) for t in found.trials]))
    assert "interval" not in bare and "expected" not in bare
    # left out: B is run with A's tensors before the trial, and with its own in it
    skipped = m.predict(*nets, data=DATA, example_inputs=X[:2], trial=True, skip=["2.*"])
    assert all(t.nats is None for t in skipped.trials)


def test_the_advice_after_a_trial_says_what_is_expected(found: PredictResult) -> None:
    best = replace(found.trials[0], labelled=None, nats=None, soft=0.0)

    def said(expected: float, low: float, high: float, within: float | None) -> str:
        nats = Interval(expected, low, high, 0.0, within, 0.0)
        return advise_tried(replace(best, nats=nats), 0.01)

    assert "with probability 0.95" in said(0.001, 0.0, 0.02, 0.95)
    even = said(0.2, 0.1, 0.3, 0.0)
    assert "with care" in even and "0.2 nats (90 % interval 0.1 to 0.3), more than the 0.01 tolerated" in even
    between = said(0.02, 0.0, 0.05, 0.4)
    assert "with care" in between and "tolerated" not in between
    inside = said(0.006, 0.0, 0.008, 0.83)
    assert inside.startswith("Merge them: ") and "0.006 nats (90 % interval 0 to 0.008)." in inside
    gains = said(-0.12, -0.2, 0.03, 0.7)
    assert "is expected to gain 0.12 nats (90 % interval -0.03 to 0.2)." in gains
    sure = said(-0.12, -0.2, -0.03, 0.99)
    assert "gain 0.12 nats over the models' mean, and to lose at most 0.01 nats with probability 0.99." in sure
    hardly = said(-0.0003, -0.0006, -0.0001, 0.99)
    assert "gain" not in hardly and "lose at most 0.01 nats" in hardly
    collapsed = replace(best, nats=replace(Interval(-2.0, -2.3, 0.0, 0.0, 0.99, 0.0), collapsed=True), soft=-24.0)
    assert advise_tried(collapsed, 0.01).startswith("Cannot tell: one of the models makes the same prediction")
    for none in (best, replace(best, soft=-1e-17)):
        assert advise_tried(none, 0.01) == "Merge them: the best way (direct) loses 0 nats in a trial."


def test_no_merge_follows_a_trial_that_cannot_tell(found: PredictResult) -> None:
    """Labels tell."""
    call = Call(m.predict, inspect.signature(m.predict).bind_partial(data="d", trial=True))
    dead = replace(Interval(-2.0, -2.3, 0.0, 0.0, 0.99, 0.0), collapsed=True)
    trials = [replace(t, nats=dead, labelled=None, soft=-24.0) for t in found.trials]
    told = replace(found, trials=trials)
    assert told.advice.startswith("Cannot tell") and _next(told, call, "a", "b") is None
    known = replace(found, trials=[replace(t, nats=dead) for t in found.trials])
    following = _next(known, call, "a", "b")
    assert following is not None and "mergeid merge a b" in following


def test_the_best_trial_is_the_one_that_is_expected_to_lose_least(found: PredictResult) -> None:
    """By labels, or else by what a trial says of other inputs; what nothing tells of comes last."""

    def told(expected: float | None, lost: float) -> Trial:
        nats = None if expected is None else Interval(expected, expected - 1, expected + 1, 0.0, 0.5, 0.0)
        return replace(found.trials[0], labelled=None, nats=nats, soft=lost)

    a, b, c = told(0.2, -0.5), told(-0.1, 0.3), told(None, -2.0)
    assert replace(found, trials=[a, b, c]).best_trial is b
    assert replace(found, trials=[told(None, 0.1), c]).best_trial is c
    by_labels = min(found.trials, key=lambda t: math.inf if t.labelled is None else t.labelled.corrected)
    assert found.best_trial is by_labels


# -- sums ---------------------------------------------------------------------------------------------------

logits = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))


@settings(max_examples=60, deadline=None)
@given(logits, st.floats(0.01, 30))
def test_an_ensemble_gains_at_most_what_two_can(rng: np.random.Generator, size: float) -> None:
    """The gain lies between what one half of an ensemble can cost and the better model's own loss; the ensemble's own
    class is no less likely to it than theirs."""
    a, b = (torch.from_numpy(size * rng.standard_normal((12, 5))) for _ in range(2))
    sums = TogetherSums()
    sums.add(a[:5], b[:5], None)
    sums.add(a[5:], b[5:], None)
    f = sums.features()
    p, q = (t.softmax(-1) for t in (a, b))
    mean = (p + q) / 2
    for name, each in (("apart_a", p), ("apart_b", q)):
        assert f[name] == pytest.approx(float(F.kl_div(each.log(), mean, reduction="sum")) / 12, abs=1e-9)
        assert f[name] >= -1e-12
    assert f["right_both"] >= max(f["right_a"], f["right_b"]) - 1e-12
    worth = worth_of(f, Shares(0.5, -1.0, 1.5), [0.1, -0.001])
    assert -math.log(2) <= worth.low <= worth.gain <= worth.high and worth.points >= 0
    # no loss falls by more than it is: the better model's own, if the truth is as both say
    own = min(float((mean * -each.log()).sum()) / 12 for each in (p, q))
    assert worth.high <= own + 1e-9
    assert worth.kept is not None and 0 <= worth.kept <= 1


def test_what_a_merge_loses_beyond_a_and_by_surer_predictions() -> None:
    rng = np.random.default_rng(3)
    a, b, merged = (torch.from_numpy(rng.standard_normal((20, 4))) for _ in range(3))
    sums = TrialSums()
    sums.add(a, b, merged, None)
    q = a.softmax(-1) ** 1.5
    q = q / q.sum(-1, keepdim=True)
    expected = F.cross_entropy(merged, q) - F.cross_entropy(a, q)
    assert sums.features()["beyond"] == pytest.approx(float(expected))
    both = (a.softmax(-1) + b.softmax(-1)) ** 1.5
    both = both / both.sum(-1, keepdim=True)
    lost = F.cross_entropy(merged, both) - (F.cross_entropy(a, both) + F.cross_entropy(b, both)) / 2
    assert sums.features()["sharp"] == pytest.approx(float(lost))


def test_a_class_that_is_ruled_out_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    outs = [torch.from_numpy(rng.standard_normal((20, 4))) for _ in range(3)]
    found = []
    for each in (outs, [F.pad(t, (0, 1), value=-math.inf) for t in outs]):
        trials, both = TrialSums(), TogetherSums()
        trials.add(each[0], each[1], each[2], None)
        both.add(each[0], each[1], None)
        found.append({**trials.features(), **both.features()})
    assert found[1] == pytest.approx(found[0], abs=1e-12)


def test_masked_positions_do_not_count() -> None:
    rng = np.random.default_rng(0)
    outs = [torch.from_numpy(rng.standard_normal((4, 6, 3))) for _ in range(3)]
    mask = torch.arange(6)[None] < torch.tensor([6, 4, 3, 2])[:, None]
    other = [t.clone() for t in outs]
    for t in other:
        t[~mask] += 5 * torch.from_numpy(rng.standard_normal((int((~mask).sum()), 3)))
    one, two = TrialSums(), TrialSums()
    one.add(*outs, mask)
    two.add(*other, mask)
    assert one.features() == pytest.approx(two.features(), abs=1e-12)


# -- labels -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.floats(-0.5, 2), st.floats(1e-3, 0.5), st.floats(0, 2), st.floats(1e-2, 1))
def test_a_correction_is_the_posterior(mean: float, error: float, expected: float, reach: float) -> None:
    """Many examples: prior times likelihood, on a grid."""
    low, high = expected - reach, expected + reach
    if low <= 0:
        expected, low, high = expected + reach, expected + 1e-9, expected + 2 * reach  # above 0 the prior has two sides
    both = corrected(Measured(mean, error, 100_000), expected, low, high)
    sd = reach / 1.6448536
    grid = np.linspace(min(mean - 9 * error, expected - 9 * sd), max(mean + 9 * error, expected + 9 * sd), 200_001)
    log = -((grid - mean) ** 2) / (2 * error**2) - (grid - expected) ** 2 / (2 * sd**2)
    weight = np.exp(log - log.max())
    step = grid[1] - grid[0]
    assert both.expected == pytest.approx(float((grid * weight).sum() / weight.sum()), abs=2 * step + 1e-6)
    total = np.cumsum(weight) / weight.sum()
    assert both.low == pytest.approx(float(grid[np.searchsorted(total, 0.05)]), abs=3 * step + 1e-3 * error)
    assert both.high - both.low <= min(high - low, 3.3 * error) + 1e-9


def test_a_predicted_loss_of_nothing_says_nothing_of_a_gain() -> None:
    """Measured far below 0: the measurement stands; far above it, the prediction holds it back."""
    gain, loss = (corrected(Measured(x, 0.05, 1000), 0.0, 0.0, 0.02) for x in (-0.4, 0.4))
    assert gain.expected == pytest.approx(-0.4, abs=2e-3) and gain.high < -0.3
    assert 0 < loss.expected < 0.1
    assert loss.low < loss.expected < loss.high
    # one that tells of gains holds back what is measured on either side
    held = [corrected(Measured(x, 0.05, 1000), -0.1, -0.12, -0.08).expected for x in (-0.5, 0.3)]
    assert -0.3 < held[0] < -0.1 < held[1] < 0.1
    # and one that ends at a uniform guess nothing of what lies beyond it
    far = corrected(Measured(3.8, 0.05, 1000), 2.0, 1.0, 2.3, most=2.3)
    assert far.expected == pytest.approx(3.8, abs=2e-2)


def test_a_correction_without_a_prediction_is_what_was_measured() -> None:
    seen = Measured(0.3, 0.05, 64)
    alone = corrected(seen, 0.0, -math.inf, math.inf)
    assert (alone.expected, alone.low, alone.high) == (seen.mean, *seen.interval())


@pytest.mark.parametrize("count", [8, 64])
def test_intervals_of_few_examples_hold(count: int) -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(2000):
        x = rng.normal(0.2, 1, count)
        low, high = Measured(float(x.mean()), float(x.std(ddof=1)) / count**0.5, count).interval()
        inside += low <= 0.2 <= high
    assert 0.88 < inside / 2000 < 0.92


# -- interference -------------------------------------------------------------------------------------------


def test_interference_by_a_naive_loop() -> None:
    rng = np.random.default_rng(2)

    def state() -> dict[str, Tensor]:
        return {"w": torch.from_numpy(rng.standard_normal((4, 3))), "v": torch.from_numpy(rng.standard_normal(5))}

    base, a = state(), state()
    b = {"w": 2 * base["w"] - a["w"], "v": base["v"].clone()}  # opposite in w, unchanged in v
    b["v"][0] += 1
    found = {i.layer: i for i in interference_of(a, b, base)}
    assert found["w"].cosine == pytest.approx(-1) and found["w"].against == pytest.approx(1)
    apart = whole = 0.0
    for one, two in zip((a["v"] - base["v"]).tolist(), (b["v"] - base["v"]).tolist(), strict=True):
        whole += min(abs(one), abs(two))
        apart += min(abs(one), abs(two)) if one * two < 0 else 0.0
    assert found["v"].against == pytest.approx(apart / whole)
    assert sum(i.share for i in found.values()) == pytest.approx(1)
    assert next(iter(found)) == "w"
    assert interference_of(a, base, base) == []
