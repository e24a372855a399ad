"""What stands for labels where there are none, and what candidates lose by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mergeid.prediction.opinions import CLASSES, POSITIONS, Opinions, behind, labels


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heard(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Opinions:
    found = Opinions()
    for part in (slice(5), slice(5, None)):
        found.add(a[part], b[part], None if mask is None else mask[part])
    return found


def test_a_candidate_alone_is_judged_by_the_model() -> None:
    """Cross-entropies against the model's predictions to the power 1.5, positions that do not count left out."""
    a, b = logits(12, 3, 5), logits(12, 3, 5, seed=1)
    mask = torch.ones(12, 3, dtype=torch.bool)
    mask[7, 1:] = False
    found = behind([heard(a, b, mask)])
    q = a.softmax(-1) ** 1.5
    q = q / q.sum(-1, keepdim=True)
    each = [F.cross_entropy(x.flatten(0, 1), q.flatten(0, 1), reduction="none").view(12, 3) for x in (a, b)]
    gap = ((each[1] - each[0]) * mask).sum(1) / mask.sum(1)
    assert found == [pytest.approx(float(gap.mean()), abs=1e-5)]


def test_many_know_better_than_the_model() -> None:
    """Of networks that err independently the one with fewer errors is found, and its loss comes nearer to the true one
    than by the model's own predictions."""
    truth = torch.randint(6, (3000,), generator=torch.Generator().manual_seed(3))
    right = 1.5 * F.one_hot(truth, 6).double()

    def net(noise: float, seed: int) -> Tensor:
        return right + noise * logits(3000, 6, seed=seed) / 2

    a, better = net(0.3, 1), net(0.1, 2)
    others = [net(0.3, seed) for seed in range(10, 19)]
    loss = [float(F.cross_entropy(x, truth)) for x in (a, better, *others)]
    assert loss[1] == min(loss)
    found = behind([heard(a, x) for x in (better, *others)])
    alone = behind([heard(a, better)])
    assert found is not None and alone is not None
    assert min(found) == found[0] and loss[1] - loss[0] < 0 < found[0] < 0.8 * alone[0]


def test_a_crowd_elsewhere_is_not_asked() -> None:
    """Candidates far from the model do not change what stands for labels, however many they are."""
    a = logits(40, 4).log_softmax(-1)
    near = [(a + 0.1 * logits(40, 4, seed=s)).log_softmax(-1) for s in (1, 2, 3)]
    weights = torch.ones(40, dtype=torch.float64)
    far = [
        [logits(40, 4, seed=s).log_softmax(-1) for s in seeds]
        for seeds in ((11, 12, 13, 14, 15, 16), (21, 22, 23, 24, 25, 26))
    ]
    one, two = (labels(a, [*near, *each], weights) for each in far)
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, labels(a, [], weights), atol=1e-3)


def test_a_class_that_is_ruled_out_changes_nothing() -> None:
    a = logits(40, 4)
    others = [a + 0.2 * logits(40, 4, seed=s) for s in (1, 2, 3)]
    wide = [F.pad(t, (0, 1), value=-torch.inf) for t in (a, *others)]
    found = behind([heard(a, b) for b in others])
    assert found is not None and behind([heard(wide[0], b) for b in wide[1:]]) == pytest.approx(found, abs=1e-9)


def test_few_numbers_are_kept_of_many() -> None:
    """Of long texts and large vocabularies: distributions still, whose rest is one class."""
    a, b = logits(6, 100, 500), logits(6, 100, 500, seed=1)
    one, two = heard(a, b).logs()
    assert one.shape == two.shape == (6 * POSITIONS, CLASSES + 1)
    for logs in (one, two):
        torch.testing.assert_close(
            logs.exp().sum(-1), torch.ones(6 * POSITIONS, dtype=torch.float64), atol=1e-5, rtol=0
        )
    first = a[0, 0].log_softmax(-1)
    torch.testing.assert_close(one[0, :CLASSES], first.sort(descending=True).values[:CLASSES], atol=1e-5, rtol=0)


def test_what_does_not_compare_is_not_compared() -> None:
    a, b = logits(8, 4), logits(8, 4, seed=1)
    assert behind([]) is None and behind([Opinions()]) is None
    assert behind([heard(a, b), heard(b, a)]) is None  # another model
    assert behind([heard(a, b), heard(a[:6], b[:6])]) is None  # fewer inputs
