"""From activations to decisions, on networks of a few neurons, against NumPy on all rows at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.evidence.activations import PairStream, TapReader
from mergeid.evidence.chord import ROWS, Consumer
from mergeid.evidence.decide import (
    DIRECT,
    MATCH,
    WILL_NOT,
    Decisions,
    _first_guess,
    decide_from_activations,
)
from mergeid.evidence.decide_weights import decide_from_weights
from mergeid.evidence.evidence import ActivationEvidence, Request
from mergeid.evidence.taps import choose_taps
from mergeid.matchers.activation import combined_matching
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.neuron_graph.group import same_element
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

EXAMPLES = 40


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


@dataclass
class Case:
    a: Any
    b: Any
    graph: NeuronGraph
    evidence: ActivationEvidence
    x: Tensor

    def activations(self, net: nn.Sequential, layer: int, half: int) -> np.ndarray:
        """Of the examples of one half, [examples, neurons], in float64: what a tap of that space reads."""
        with torch.no_grad():
            found: np.ndarray = net[:layer](self.x[half::2]).double().numpy()
        return found


def case(a: nn.Module, b: nn.Module, size: int = 16) -> Case:
    x = torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(2))
    graph = mergeid.graph(a, x[:2])
    taps = choose_taps(graph, a)
    flat = [t for found in taps.values() for t in found]
    readers = [TapReader(net, lambda model, batch: model(batch["x"]), flat) for net in (a, b)]
    stream = PairStream(*readers, lambda: iter([{"x": part} for part in x.split(size)]))
    evidence = ActivationEvidence(graph, stream, taps)
    evidence.collect()
    return Case(a, b, graph, evidence, x)


def moved(net: nn.Sequential, graph: NeuronGraph, element: Element) -> nn.Sequential:
    other = network(0)
    other.load_state_dict(graph.apply_state(element, net.state_dict()))
    return other.eval()


def inverse(element: Element) -> Element:
    """Of spaces that lie in no other."""
    return {k: np.argsort(p) for k, p in element.items()}


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    za, zb = ((v - v.mean(0)) / v.std(0) for v in (a, b))
    answer: np.ndarray = za.T @ zb / len(za)
    return answer


@pytest.fixture
def far() -> Case:
    """Two networks that have nothing in common."""
    return case(network(0), network(1))


def layers_of(found: Case) -> dict[str, list[int]]:
    """Space -> how many modules run before what each of its taps reads."""
    return {s: [int(t.module) + (t.kind == "out") for t in taps] for s, taps in found.evidence.taps.items()}


def test_correlations_are_those_of_the_fitting_half(far: Case) -> None:
    found = far.evidence.correlations()
    for s, layers in layers_of(far).items():
        each = [correlation(far.activations(far.a, n, 0), far.activations(far.b, n, 0)) for n in layers]
        np.testing.assert_allclose(found[s], np.mean(each, 0), atol=1e-5)


def test_judgements_are_those_of_the_other_half(far: Case) -> None:
    generator = np.random.default_rng(0)
    for s, layers in layers_of(far).items():
        size = far.graph.by_id[s].size
        now, then = (generator.permutation(size) for _ in range(2))
        (found,) = far.evidence.judge([Request(s, now, then)], z=2.0, seed=0)
        each = [correlation(far.activations(far.a, n, 1), far.activations(far.b, n, 1)) for n in layers]
        mean, rows = np.mean(each, 0), np.arange(size)
        assert found is not None and found.examples == EXAMPLES // 2
        assert found.j_identity == pytest.approx(np.trace(mean) / size, abs=1e-5)
        assert found.j_current == pytest.approx(mean[rows, now].mean(), abs=1e-5)
        assert found.j_match == pytest.approx(mean[rows, then].mean(), abs=1e-5)
        assert found.j_random == pytest.approx(mean.mean(), abs=1e-5)
        assert far.evidence.judge([Request(s, now, then)], z=2.0, seed=0)[0] is found  # and not run again


class TwoHeads(nn.Module):
    """Neurons that two layers read, one of them after a nonlinearity of its own: two taps."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return torch.cat([self.one(h.tanh()), self.two(h.square())], 1)


def test_a_space_that_is_read_twice_is_the_mean_of_both() -> None:
    a, b = TwoHeads(0).eval(), TwoHeads(1).eval()
    found = case(a, b)
    (s,) = found.graph.spaces
    taps = found.evidence.taps[s.id]
    with torch.no_grad():
        hidden = [net.body(found.x).double().numpy() for net in (a, b)]
    reads = {"one": np.tanh, "two": np.square}
    assert {t.module for t in taps} >= set(reads)

    def mean(half: int) -> np.ndarray:
        each = [correlation(*(reads.get(t.module, np.asarray)(h[half::2]) for h in hidden)) for t in taps]
        answer: np.ndarray = np.mean(each, 0)
        return answer

    perm = np.roll(np.arange(7), 2)
    (judged,) = found.evidence.judge([Request(s.id, np.arange(7), perm)], z=1.0, seed=0)
    assert judged is not None and judged.j_match == pytest.approx(mean(1)[np.arange(7), perm].mean(), abs=1e-5)
    assert judged.j_current == pytest.approx(np.trace(mean(1)) / 7, abs=1e-5)
    np.testing.assert_allclose(found.evidence.correlations()[s.id], mean(0), atol=1e-5)


def test_batches_do_not_matter(far: Case) -> None:
    other = case(far.a, far.b, size=7)
    request = [Request(s.id, np.arange(s.size), np.arange(s.size)[::-1].copy()) for s in far.graph.spaces]
    for one, two in zip(
        far.evidence.judge(request, z=1.0, seed=3), other.evidence.judge(request, z=1.0, seed=3), strict=True
    ):
        assert one is not None and two is not None
        assert (one.j_match, one.gain_low, one.above_chance) == pytest.approx(
            (two.j_match, two.gain_low, two.above_chance), abs=1e-6
        )


def test_fewer_than_four_judges_decide_nothing() -> None:
    few = case(network(0), network(1))
    few.evidence.stream.batches = lambda: iter([{"x": few.x[:7]}])  # three of the other half
    s = few.graph.spaces[0]
    assert few.evidence.judge([Request(s.id, np.arange(s.size), np.arange(s.size))], z=1.0, seed=0) == [None]
    few.evidence.stream.batches = lambda: iter([{"x": few.x[:8]}])
    again = Request(s.id, np.arange(s.size), np.arange(s.size)[::-1].copy())
    assert few.evidence.judge([again], z=1.0, seed=0) != [None]


def test_chord_deviation_is_that_of_the_layer_that_reads_the_space(far: Case) -> None:
    """RMS of (h_b − h_a)(W_a − W_b)ᵀ / 4 over that of the chord about its mean."""
    element = far.graph.random_element(torch.Generator().manual_seed(4))
    for n, s in ((2, far.graph.spaces[0].id), (4, far.graph.spaces[1].id)):
        found = far.evidence.chord(s, element, far.a.state_dict(), far.b.state_dict())
        ha, hb = (far.activations(net, n, 1) for net in (far.a, far.b))
        state = far.graph.apply_state(element, far.b.state_dict())
        wa, wb = (w[f"{n}.weight"].double().numpy() for w in (far.a.state_dict(), state))
        hb = hb[:, element[s]]
        xi = (hb - ha) @ (wa - wb).T / 4
        chord = (ha @ wa.T + hb @ wb.T) / 2
        assert found == pytest.approx(np.sqrt((xi**2).mean() / ((chord - chord.mean(0)) ** 2).mean()), rel=1e-4)


@pytest.mark.parametrize("sizes", [(1, 2, 1), (40, 500, 40), (300,) * 12])
def test_rows_that_are_kept_of_the_layer_that_reads_a_space(sizes: tuple[int, ...]) -> None:
    """A few of every batch, evenly spaced, `ROWS` at most; the same rows of both models."""
    consumer = Consumer(cast(Any, None), cast(Any, None))
    for n in sizes:
        rows = torch.arange(n, dtype=torch.float32)[:, None]
        consumer.add(rows, rows + 0.5)
    wanted = [min(n, 32) for n in sizes]
    kept = [min(w, max(ROWS - sum(wanted[:i]), 0)) for i, w in enumerate(wanted)]
    assert [len(a) for a in consumer.a] == [k for k in kept if k] and consumer.rows == sum(kept) <= ROWS
    for n, part, other in zip(sizes, consumer.a, consumer.b, strict=False):
        assert part[0] == 0 and (len(part) == 1 or part[-1] == n - 1) and torch.equal(other, part + 0.5)


# -- decisions -----------------------------------------------------------------------------------------------


def decided(found: Case, matched: Element) -> Decisions:
    similarity = WeightSimilarity(found.graph, found.a.state_dict(), found.b.state_dict())
    cosines = {s.id: np.float32(0.1 * similarity.cosines(s, matched)) for s in found.graph.spaces}
    correlations = found.evidence.correlations()
    scores = {k: c + correlations[k] for k, c in cosines.items()}
    return decide_from_activations(found.evidence, scores, cosines, matched, seed=0)


def test_a_scrambled_copy_is_brought_back() -> None:
    a = network(0)
    graph = mergeid.graph(a, torch.zeros(2, 5))
    element = graph.random_element(torch.Generator().manual_seed(3))
    found = case(a, moved(a, graph, element))
    planted = inverse(element)
    result = decided(found, planted)
    assert same_element(result.element, planted)
    for s, record in zip(graph.spaces, result.spaces, strict=True):
        assert record.decision == MATCH and record.j_match == pytest.approx(1, abs=1e-4)
        assert record.moved == int((planted[s.id] != np.arange(s.size)).sum())
        assert record.gain is not None and record.gain_low is not None and 0 < record.gain_low < record.gain


def test_a_copy_and_a_fine_tune_stay_as_they_lie() -> None:
    a = network(0)
    for noise in (0.0, 0.05):
        b = network(0)
        with torch.no_grad():
            for p in b.parameters():
                p += noise * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * p.std()
        found = case(a, b)
        result = decided(found, found.graph.identity())
        assert all(r.decision == DIRECT and r.moved == 0 for r in result.spaces)
        assert same_element(result.element, found.graph.identity())
        assert all(r.iota is not None and r.iota > 0.9 for r in result.spaces)


def test_neurons_without_counterpart_will_not_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    import mergeid.evidence.decide as rules

    monkeypatch.setattr(rules, "LEAST_CORRELATION", 0.95)  # what two random networks of this size do not reach
    found = case(network(0), network(1))
    result = decided(found, found.graph.identity())
    assert {r.decision for r in result.spaces} == {WILL_NOT}


def test_only_what_moved_is_matched() -> None:
    """One space of a copy is scrambled: that space is matched, the other is direct."""
    a = network(0)
    graph = mergeid.graph(a, torch.zeros(2, 5))
    for at in (0, 1):
        s = graph.spaces[at]
        element = {**graph.identity(), s.id: np.roll(np.arange(s.size), 1)}
        found = case(a, moved(a, graph, element))
        result = decided(found, inverse(element))
        assert [r.decision for r in result.spaces] == [MATCH if i == at else DIRECT for i in range(2)]
        assert same_element(result.element, inverse(element))


def test_the_first_guess_is_the_match_where_it_gains_and_the_order_where_not() -> None:
    graph = mergeid.graph(network(0), torch.zeros(2, 5))
    one, two = graph.spaces
    matched = {s.id: np.roll(np.arange(s.size), 1) for s in graph.spaces}
    better, worse = np.eye(one.size)[matched[one.id]], np.eye(two.size)
    guess = _first_guess(graph, {one.id: better, two.id: worse}, matched)
    assert np.array_equal(guess[one.id], matched[one.id]) and np.array_equal(guess[two.id], np.arange(two.size))
    even = _first_guess(graph, {one.id: better + np.eye(one.size), two.id: np.zeros((two.size, two.size))}, matched)
    assert np.array_equal(even[one.id], np.arange(one.size))  # a tie
    assert np.array_equal(even[two.id], matched[two.id])  # nothing to judge by
    assert np.array_equal(_first_guess(graph, {}, matched)[one.id], matched[one.id])


def llama() -> nn.Module:
    """Its heads have activations of their own: rotations are alike within a head."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def vit() -> nn.Module:
    """Its heads have none: they are judged by the neurons inside, which follow them."""
    timm = pytest.importorskip("timm")
    kinds = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 4, "num_classes": 3}
    model: nn.Module = timm.models.vision_transformer.VisionTransformer(**kinds)
    return model


IDS = torch.randint(20, (EXAMPLES, 6), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(EXAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("made", "inputs", "with_taps"), [(llama, IDS, True), (vit, IMAGES, False)])
def test_heads_and_what_lies_in_them_are_brought_back(
    made: Callable[[], nn.Module], inputs: Tensor, with_taps: bool
) -> None:
    def net() -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return made().eval()

    a, b = net(), net()
    graph = mergeid.graph(a, inputs[:2])
    element = graph.random_element(torch.Generator().manual_seed(6))
    b.load_state_dict(graph.apply_state(element, a.state_dict()))
    taps = choose_taps(graph, a)
    heads = {p for s in graph.spaces for p in s.parents}
    assert heads and all((h in taps) is with_taps for h in heads)
    flat = [t for found in taps.values() for t in found]
    readers = [TapReader(m, lambda model, batch: model(batch["x"]), flat) for m in (a, b)]
    evidence = ActivationEvidence(graph, PairStream(*readers, lambda: iter([{"x": inputs}])), taps)
    evidence.collect()
    similarity = WeightSimilarity(graph, a.state_dict(), b.state_dict())
    correlations = evidence.correlations()
    matched = combined_matching(similarity, dict(correlations), generator=torch.Generator().manual_seed(0))
    cosines = {s.id: np.float32(0.1 * similarity.cosines(s, matched)) for s in graph.spaces}
    scores = {k: c + correlations.get(k, np.float32(0)) for k, c in cosines.items()}
    result = decide_from_activations(evidence, scores, cosines, matched, seed=0)
    assert graph.contains(result.element)
    back = graph.apply_state(result.element, b.state_dict())
    for name, value in a.state_dict().items():
        torch.testing.assert_close(back[name], value)
    assert all(r.decision == (MATCH if r.moved else DIRECT) for r in result.spaces) and any(
        r.moved for r in result.spaces
    )


# -- weights alone --------------------------------------------------------------------------------------------


def by_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor], graph: NeuronGraph) -> Decisions:
    return decide_from_weights(WeightSimilarity(graph, a, b), generator=torch.Generator().manual_seed(0))


def test_weights_bring_a_scrambled_copy_back_and_leave_a_copy() -> None:
    a = network(0)
    graph = mergeid.graph(a, torch.zeros(2, 5))
    same = by_weights(a.state_dict(), a.state_dict(), graph)
    assert [r.decision for r in same.spaces] == [DIRECT, DIRECT] and all(r.moved == 0 for r in same.spaces)
    assert same_element(same.element, graph.identity())
    element = graph.random_element(torch.Generator().manual_seed(3))
    other = graph.apply_state(element, a.state_dict())
    for b in (other, {k: v * (1 + 1e-3 * torch.randn_like(v)) for k, v in other.items()}):
        back = by_weights(a.state_dict(), b, graph)
        assert same_element(back.element, inverse(element))
        for s, r in zip(graph.spaces, back.spaces, strict=True):
            assert r.decision == MATCH and r.moved == int((inverse(element)[s.id] != np.arange(s.size)).sum())
            assert r.gain is not None and 0 < r.gain <= 1.5
            told = re.search(r"\((\d+) standard deviations\)", r.why)
            assert "copies" in r.why if b is other else told is not None and int(told[1]) >= 3


def test_a_gain_within_rounding_is_a_tie() -> None:
    """Two neurons that are alike up to less than `TIE` stay in their order."""
    a = network(0)
    with torch.no_grad():
        a[0].weight[1], a[0].bias[1] = a[0].weight[0] * (1 + 1e-5), a[0].bias[0]
        a[2].weight[:, 1] = a[2].weight[:, 0]
    graph = mergeid.graph(a, torch.zeros(2, 5))
    s = graph.spaces[0]
    swapped = np.array([1, 0, *range(2, s.size)])
    b = graph.apply_state({**graph.identity(), s.id: swapped}, a.state_dict())
    b["2.weight"] = b["2.weight"] * (1 + 1e-6)  # no copy, number for number
    found = by_weights(a.state_dict(), b, graph)
    assert [r.decision for r in found.spaces] == [DIRECT, DIRECT]
