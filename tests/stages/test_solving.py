"""When a merge is solved that nobody asked to solve."""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from evaluate_helpers import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mergeid
from mergeid.basics.spread import Spread
from mergeid.errors import MergeidError
from mergeid.evaluate.nearness import Far, Panel
from mergeid.models.examples import Examples
from mergeid.results.comparison import label
from mergeid.stages.solving import LARGE, LEAST, can_be_solved, nearer, solved_if_nearer


class Says(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value + 0 * x


def panel(models: list[nn.Module], data: Tensor, classes: bool) -> Panel:
    first = runs(models[0], data, classes, lambda model, batch: {"out": model(batch["x"])})
    return Panel(
        cast(Any, first), models, shares=[1 / len(models)] * len(models), examples=Examples([{"x": x} for x in data]),
        device="cpu", batch_size=5,
    )  # fmt: skip


def test_models_that_are_sure_of_different_classes_disagree_by_log_2() -> None:
    sure = [Says(torch.tensor([50.0, 0.0])), Says(torch.tensor([0.0, 50.0]))]
    data = torch.randn(12, 2)
    assert panel([*sure], data, True).disagreement == pytest.approx(log(2), abs=1e-6)
    assert panel([sure[0], sure[0]], data, True).disagreement == pytest.approx(0, abs=1e-6)


def test_disagreement_of_values_is_a_share_of_their_variance() -> None:
    class Times(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.tensor(by))

        def forward(self, x: Tensor) -> Tensor:
            return self.by * x

    data = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    # mean 2x; both are off it by x
    assert panel([Times(1.0), Times(3.0)], data, False).disagreement == pytest.approx(1 / 4, rel=0.01)


@pytest.mark.parametrize("tokens", [False, True])
def test_the_spread_of_values_leaves_padding_out_where_there_are_tokens(tokens: bool) -> None:
    """A mask of as many tokens as an output has values says nothing of these."""
    out = torch.randn(6, 4, 3 if tokens else 1, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]] * 3)
    spread = Spread()
    spread.add(out, {"attention_mask": mask})
    rows = out[mask.bool()] if tokens else out
    expected = (rows.double() - rows.double().mean(0)).square().mean()
    assert spread.variance(torch.float32) == pytest.approx(float(expected), rel=1e-6)


def look(rows: dict[tuple[str, str], float], spread: float = 0.0) -> Any:
    def tried(merge: Any, kinds: Any) -> Iterator[tuple[str, list[dict[str, Far]]]]:
        for kind in kinds:
            value = rows[merge, kind]
            if value < 0:
                raise MergeidError("cannot be solved")
            noise = spread * torch.randn(
                1, 100, generator=torch.Generator().manual_seed(len(kind)), dtype=torch.float64
            )
            yield kind, [{"out": Far("nats", value + noise - noise.mean())}] * 2

    return tried


@pytest.mark.parametrize(
    ("rows", "apart", "spread", "merge"),
    [
        ({("plain", "bn"): 0.20, ("plain", "solve"): 0.05}, 0.1, 0.0, "plain"),
        ({("plain", "bn"): 0.20, ("plain", "solve"): 0.05}, 2.0, 0.0, None),  # the models contradict each other
        ({("plain", "bn"): 0.20, ("plain", "solve"): 0.19}, 0.0, 1.0, None),  # chance
        ({("plain", "bn"): 0.20, ("plain", "solve"): -1.0}, 0.0, 0.0, None),  # cannot be solved
        ({("plain", "bn"): 0.2, ("plain", "solve"): 0.1, ("matched", "solve"): 0.05}, 0.0, 0.0, "matched"),
        ({("plain", "bn"): 0.2, ("plain", "solve"): -1.0, ("matched", "solve"): 0.05}, 0.0, 0.0, "matched"),
    ],
)
def test_a_solved_merge_must_be_clearly_nearer(
    rows: dict[tuple[str, str], float], apart: float, spread: float, merge: str | None
) -> None:
    merges = cast(Any, {name: name for name, _ in rows})
    found = solved_if_nearer(merges, ("plain", "bn"), look(rows, spread), disagreement=apart, tie=1e-3)
    assert (None if found is None else found.merge) == merge


@pytest.mark.parametrize(
    ("gap", "apart", "tie", "solved"),
    [
        (0.15 * 0.5, 0.5, 1e-3, False),  # the share of the disagreement itself is not enough
        (0.15 * 0.5 + 1e-9, 0.5, 1e-3, True),
        (1e-3, 0.0, 1e-3, False),  # nor is what counts as no difference
        (1e-3 + 1e-9, 0.0, 1e-3, True),
    ],
)
def test_how_much_nearer_at_the_boundary(gap: float, apart: float, tie: float, solved: bool) -> None:
    rows = {("plain", "bn"): gap, ("plain", "solve"): 0.0}
    merges = cast(Any, {"plain": "plain"})
    found = solved_if_nearer(merges, ("plain", "bn"), look(rows, 0.0), disagreement=apart, tie=tie)
    assert (found is not None) is solved
    if found is not None:
        assert found.distances == {("plain", "solve"): 0.0} and found.far["out"].distance == 0.0


@pytest.mark.parametrize(
    ("solved", "lean", "apart", "expected"),
    [
        (0.3, 0.1, 0.2, True),
        (0.3, 0.28, 0.2, False),  # less than their disagreement leaves in doubt
        (0.1, 0.3, 0.0, False),
    ],
)
def test_a_merge_leans_where_that_is_clearly_nearer(solved: float, lean: float, apart: float, expected: bool) -> None:
    one, other = ({"out": Far("nats", torch.full((1, 9), v, dtype=torch.float64))} for v in (solved, lean))
    assert nearer(one, other, disagreement=apart, tie=1e-3) is expected


def test_chance_is_one_standard_error() -> None:
    """Of the paired differences: 100 of them with a spread of 1 have one of 0.1."""
    wave = torch.tensor([[1.0, -1.0] * 50], dtype=torch.float64)
    error = float(wave.std()) / 10

    def look_at(gap: float) -> bool:
        rows = {"bn": gap + wave, "solve": 0 * wave}
        tried = cast(Any, lambda merge, kinds: ((k, [{"out": Far("nats", rows[k])}] * 2) for k in kinds))
        merges = cast(Any, {"plain": "plain"})
        return solved_if_nearer(merges, ("plain", "bn"), tried, disagreement=0.0, tie=1e-3) is not None

    assert look_at(error * (1 + 1e-6)) and not look_at(error * (1 - 1e-6))


def test_ties_among_solved_merges_stay_with_the_nearest() -> None:
    rows = {("plain", "none"): 0.3, ("plain", "solve"): 0.1, ("matched", "solve"): 0.1}
    for order in (("plain", "matched"), ("matched", "plain")):
        merges = cast(Any, {name: name for name in order})
        found = solved_if_nearer(merges, ("plain", "none"), look(rows, 0.0), disagreement=0.0, tie=1e-3)
        assert found is not None and found.merge == "plain" and set(found.distances) == set(rows) - {("plain", "none")}


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({}, True),
        ({"examples": LEAST - 1}, False),
        ({"size": LARGE + 1}, False),
        ({"weights": "free"}, False),
        ({"base": object()}, False),
        ({"whole": True}, False),
    ],
)
def test_what_is_solved_without_being_asked_for(changes: dict[str, Any], possible: bool) -> None:
    told = {"examples": LEAST, "size": LARGE, "weights": "shares", "base": None, "whole": False, **changes}

    class Given:
        whole = told["whole"]

        def __len__(self) -> int:
            return int(told["examples"])

    half = SimpleNamespace(numel=lambda: told["size"] - told["size"] // 2)
    rest = SimpleNamespace(numel=lambda: told["size"] // 2)
    members = SimpleNamespace(
        first=SimpleNamespace(model=SimpleNamespace(parameters=lambda: [half, rest])),
        settings=SimpleNamespace(method=SimpleNamespace(weights=told["weights"])),
        base=told["base"],
        given=Given(),
    )
    assert can_be_solved(cast(Any, members)) is possible


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.floats(0, 0.7), st.floats(0, 0.05))
def test_what_is_taken_is_as_near_as_any_refit(far: list[float], apart: float, tie: float) -> None:
    """Nothing is left aside that is nearer by more than the judge's own margin."""
    keys = [("plain", "regmean"), ("plain", "solve"), ("matched", "regmean"), ("matched", "solve")]
    rows = dict(zip([("plain", "bn"), *keys], far, strict=True))
    merges = cast(Any, {name: name for name, _ in rows})
    refits = ("regmean", "solve")
    found = solved_if_nearer(merges, ("plain", "bn"), look(rows), disagreement=apart, tie=tie, refits=refits)
    taken = rows["plain", "bn"] if found is None else rows[found.merge, found.repair]
    margin = max(tie, 0.15 * apart) + 1e-9
    for key in keys:
        assert taken <= rows[key] + (tie + 1e-9 if found is not None else tie + margin)
        if found is not None:
            assert found.distances[key] == pytest.approx(rows[key])
    if found is not None and found.repair == "regmean":
        assert taken < min(rows["plain", "solve"], rows["matched", "solve"]) - tie + 1e-9


def test_regmean_is_left_where_nothing_can_be_solved() -> None:
    rows = {("plain", "bn"): 0.2, ("plain", "regmean"): 0.05, ("plain", "solve"): -1.0}
    found = solved_if_nearer(
        cast(Any, {"plain": "plain"}), ("plain", "bn"), look(rows), disagreement=0.0, tie=1e-3,
        refits=("regmean", "solve"),
    )  # fmt: skip
    assert found is not None and (found.merge, found.repair) == ("plain", "regmean")


def sine(seed: int, steps: int) -> nn.Module:
    """A small network that has learned a sine of its first input."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        x = torch.randn(64, 3)
        optimiser.zero_grad()
        (net(x) - torch.stack([(3 * x[:, 0]).sin(), x[:, 1] * x[:, 2]], 1)).square().mean().backward()
        optimiser.step()
    return net.eval()


@pytest.mark.parametrize("steps", [40, 400])
def test_what_is_written_is_as_near_as_regmean(steps: int) -> None:
    a, b = sine(0, steps), sine(1, steps)
    x = torch.randn(256, 3, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        said = torch.stack([a(x), b(x)])
    mean = said.mean(0)
    apart = float((said - mean).square().mean() / (mean - mean.mean(0)).square().mean())
    made = mergeid.merge(a, b, data=[{"input": row} for row in x], example_inputs={"input": x[:2]}, force=True)
    assert made.comparison is not None
    found = made.comparison["distances"]
    regmean = [value for name, value in found.items() if name.endswith("+regmean")]
    chosen = found[label(made.comparison["chosen"], made.comparison["repair"])]
    assert regmean and chosen <= min(regmean) + max(1e-3, 0.15 * apart) + 0.02


def test_a_merge_that_is_solved_on_trial_says_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []
    a, b = sine(0, 5), sine(1, 5)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(9))
    mergeid.merge(
        a, b, data=[{"input": row} for row in x], example_inputs={"input": x[:2]}, match="never", repair="solve",
        force=True, progress=lambda *step: told.append(step),
    )  # fmt: skip
    stage = "solving layer by layer"
    layers = [(k, 3) for k in range(3)]
    assert [step[1:] for step in told if step[0] == stage] == layers
    on_trial = [step[1:] for step in told if step[0] == f"on trial: {stage}"]
    assert on_trial and on_trial == layers * (len(on_trial) // len(layers))
