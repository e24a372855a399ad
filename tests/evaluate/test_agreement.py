"""How far models agree, how sure they are, and when the one bears out the other."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from evaluate_helpers import runs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mergeid.evaluate.agreement import Tally, agreement_of
from mergeid.evaluate.nearness import Panel
from mergeid.models.examples import Examples
from mergeid.results.agreement import BORNE_OUT, DOUBT, Agreement

FIRST = cast(Any, SimpleNamespace(loss=lambda *_: None))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tallied(outs: list[Tensor], shares: list[float], batch: dict[str, Tensor], size: int) -> Agreement:
    tally = Tally(FIRST, shares)
    for k in range(0, len(outs[0]), size):
        part = {name: value[k : k + size] for name, value in batch.items()}
        tally.add([o[k : k + size] for o in outs], part, len(outs[0][k : k + size]))
    return tally.agreement()


def oracle(outs: list[Tensor], shares: list[float], mask: Tensor) -> tuple[float, float, float]:
    """(sure, alike, chance), example by example and token by token."""
    count, classes = len(mask), outs[0].shape[-1]
    asked = [k for k, share in enumerate(shares) if share > 0]
    pairs = [(i, j, shares[i] * shares[j]) for i in asked for j in asked if i < j]
    sure = alike = 0.0
    often = torch.zeros(len(shares), classes, dtype=torch.float64)
    for e in range(count):
        tokens = [t for t in range(mask.shape[1]) if mask[e, t]]
        for t in tokens:
            said = [torch.softmax(o[e, t].double(), 0).tolist() for o in outs]
            names = [max(range(classes), key=p.__getitem__) for p in said]
            part = 1 / len(tokens) / count
            sure += part * sum(shares[k] * max(said[k]) for k in asked) / sum(shares[k] for k in asked)
            alike += part * sum(w for i, j, w in pairs if names[i] == names[j]) / sum(w for *_, w in pairs)
            for k in asked:
                often[k, names[k]] += part
    chance = sum(w * float(often[i] @ often[j]) for i, j, w in pairs) / sum(w for *_, w in pairs)
    return sure, alike, chance


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 9), masked=st.booleans(), last=st.sampled_from([0.3, 0.0, -0.5]))
def test_as_a_plain_loop_says(seed: int, size: int, masked: bool, last: float) -> None:
    """In batches of any size, with and without padding; a model that is subtracted is not asked."""
    generator = seeded(seed)
    outs = [2 * torch.randn(8, 4, 5, generator=generator) for _ in range(3)]
    outs[1] = torch.where(torch.rand(8, 4, 1, generator=generator) < 0.5, outs[0], outs[1])
    mask = torch.rand(8, 4, generator=generator) < 0.6 if masked else torch.ones(8, 4).bool()
    mask[:, 0] = True
    shares = [0.5, 0.7, last]
    found = tallied(outs, shares, {"attention_mask": mask.long()} if masked else {}, size)
    assert (found.sure, found.alike, found.chance) == pytest.approx(oracle(outs, shares, mask), abs=1e-9)
    assert found.examples == 8


@settings(max_examples=40, deadline=None)
@example(seed=3945, sharp=4.0, classes=4, skew=2.75)
@given(seed=st.integers(0, 10**6), sharp=st.floats(0.3, 8), classes=st.integers(2, 12), skew=st.floats(0, 3))
def test_networks_that_learned_the_same_are_borne_out(seed: int, sharp: float, classes: int, skew: float) -> None:
    """However sure they are, and however unequal the classes."""
    generator = seeded(seed)
    known = torch.randn(256, classes, generator=generator) + skew * torch.arange(classes)
    outs = [sharp * (known + 0.3 * torch.randn(256, classes, generator=generator)) for _ in range(2)]
    assert tallied(outs, [0.5, 0.5], {}, 64).borne_out


@pytest.mark.parametrize("seed", range(5))
def test_networks_that_are_sure_of_unrelated_classes_are_not(seed: int) -> None:
    outs = [9 * torch.randn(64, 7, generator=seeded(10 * seed + k)) for k in range(2)]
    assert not tallied(outs, [0.5, 0.5], {}, 64).borne_out


def test_networks_that_have_collapsed_say_nothing_of_the_inputs() -> None:
    """Whether they name the same class or not is nothing that inputs decide."""
    same = [torch.tensor([4.0, 0.0, 0.0]).expand(64, 3) for _ in range(2)]
    assert tallied(same, [0.5, 0.5], {}, 64).borne_out
    unsure = [torch.randn(64, 3, generator=seeded(k)) * 1e-3 for k in range(2)]
    assert tallied(unsure, [0.5, 0.5], {}, 64).borne_out


@pytest.mark.parametrize(("other", "told"), [(0, False), (1, False), (4, True)])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_one_name_for_nearly_all_inputs_tells_nothing(other: int, told: bool, classes: int) -> None:
    """But of two classes one may be rare, and agreement is no less true for it."""
    outs = torch.zeros(64, classes)
    outs[:, 0], outs[:other, 1] = 5.0, 9.0
    found = tallied([outs, outs], [0.5, 0.5], {}, 16)
    assert found.borne_out and found.told is (told or classes == 2)
    if not found.told:
        assert "one and the same class" in found.note(True) and "several classes" in found.note(True)


@pytest.mark.parametrize(
    ("sure", "alike", "chance", "error", "expected"),
    [
        (0.9, 0.1 + BORNE_OUT * 0.8 + 1e-9, 0.1, 0.0, True),
        (0.9, 0.1 + BORNE_OUT * 0.8 - 1e-9, 0.1, 0.0, False),
        (0.9, 0.3, 0.1, 0.6 / DOUBT + 1e-9, True),  # of too few inputs to say
        (0.9, 0.3, 0.1, 0.6 / DOUBT - 1e-9, False),
        (0.9, 0.95, 0.99, 0.0, True),  # nearly all of one class
        (0.973, 0.949, 0.950, 0.0104, True),  # likewise, and no room to tell
        (0.9, 0.1, 0.1, 0.8 / DOUBT + 1e-9, True),
        (float("nan"), 0.1, 0.1, 0.0, True),
    ],
)
def test_the_boundary(sure: float, alike: float, chance: float, error: float, expected: bool) -> None:
    assert Agreement(sure, alike, chance, error, 100).borne_out is expected


def panel(models: list[nn.Module], data: Tensor, classes: bool = True, **more: Any) -> Panel:
    first = cast(Any, runs(models[0], data, classes, lambda model, batch: {"out": model(batch["x"])}))
    given = Examples([{"x": x} for x in data], **more)
    shares = [1 / len(models)] * len(models)
    return Panel(first, models, shares=shares, examples=given, device="cpu", batch_size=5)


def test_a_panel_asks_about_classes_that_all_models_speak_of() -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [nn.Linear(4, 6), nn.Linear(4, 6)]
    data = torch.randn(23, 4)
    (found,) = panel(models, data).agreement().values()
    with torch.no_grad():
        expected = tallied([m(data) for m in models], [0.5, 0.5], {}, 23)
    assert found.to_json() == pytest.approx(expected.to_json(), rel=1e-6) and found.examples == 23
    assert not panel(models, data, classes=False).agreement()
    assert not panel(models[:1], data).agreement()
    assert not panel(models, data, owners=tuple(k % 2 for k in range(23))).agreement()


def test_rows_of_logits_say_what_batches_of_them_do() -> None:
    """Sketches hold rows; models are asked batch by batch."""
    one, other = torch.randn(2, 40, 5, generator=seeded(0))
    expected = tallied([one, other], [0.5, 0.5], {"arg0": torch.zeros(40, 5)}, 25)
    assert asdict(agreement_of(one, other)) == pytest.approx(asdict(expected))
