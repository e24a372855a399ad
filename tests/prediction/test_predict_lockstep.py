"""Corrected runs against midpoints that the tests run themselves, and that the prediction never runs one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mergeid as m
from mergeid.evaluate.interpolate import load_between
from mergeid.models.examples import Examples
from mergeid.prediction.features import EndSums, ShiftSums
from mergeid.prediction.lockstep import PathsDiffer, lockstep, watch
from mergeid.prediction.probe import hears, probe


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["arg0"])


def mlp(seed: int, width: int = 24, depth: int = 2, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(8 if i == 0 else width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 5)).eval()


class Small(nn.Module):
    """A bit of everything: convolution, BatchNorm, a residual, in-place operations, a bare parameter, attention."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm.running_mean = torch.randn(8) / 5
        self.norm.running_var = torch.rand(8) + 0.5
        self.norm.weight.data = 1 + torch.randn(8) / 4
        self.inner = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.position = nn.Parameter(torch.randn(1, 16, 8) / 3)
        self.layer_norm, self.attend = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu_()
        x += self.inner(x).mul_(self.gain[:, None, None])
        x = x.flatten(2).transpose(1, 2) + self.position
        y = self.layer_norm(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        return self.head(x.mean(1))


def between(a: nn.Module, b: nn.Module, x: float) -> nn.Module:
    net = copy.deepcopy(a)
    load_between(net, a.state_dict(), b.state_dict(), x)
    return net.eval()


def disturbed(a: nn.Module, size: float, seed: int = 9) -> nn.Module:
    b, generator = copy.deepcopy(a), torch.Generator().manual_seed(seed)
    for p in b.parameters():
        p.data += size * torch.randn(p.shape, generator=generator).to(p)
    return b


def middle_error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    found = lockstep(a, b, forward, {"arg0": x})
    with torch.no_grad():
        truth = between(a, b, 0.5)(x)
    return float(((found.middle[0] + found.middle[1]) / 2 - truth).norm() / truth.norm())


def test_two_layers_without_activation_are_exact() -> None:
    """Only what lies behind a deviating activation is an estimate; averaged inputs of a linear layer are its inputs."""
    a, b = (mlp(s, depth=1, activation=nn.Identity).double() for s in (0, 1))
    assert middle_error(a, b, torch.randn(20, 8, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("make", [lambda: mlp(0, depth=3).double(), lambda: Small(0).eval().double()])
def test_exact_to_second_order(make: Callable[[], nn.Module]) -> None:
    """Halving the difference of the weights divides the error by 8 or more, and that of the mean output by 4."""
    a = make()
    shape = (16, 8) if isinstance(a, nn.Sequential) else (16, 1, 4, 4)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    errors = [middle_error(a, disturbed(a, size), x) for size in (0.04, 0.02, 0.01)]
    assert errors[0] / errors[1] > 6 and errors[1] / errors[2] > 6
    with torch.no_grad():
        b = disturbed(a, 0.01)
        mean = float(((a(x) + b(x)) / 2 - between(a, b, 0.5)(x)).norm() / a(x).norm())
    assert errors[2] < mean / 5


def test_a_model_with_itself_deviates_nowhere() -> None:
    a, x = Small(3).eval(), torch.randn(12, 1, 4, 4)
    found = probe(a, {"direct": copy.deepcopy(a)}, forward, Examples([{"arg0": i} for i in x]))["direct"]
    assert found.plain["excess"] == pytest.approx(0, abs=1e-6)
    assert found.plain["deviation"] < 1e-9 and found.plain["divergence"] < 1e-9
    assert found.repaired is not None


def test_fresh_statistics_are_those_of_a_repaired_merge() -> None:
    """Where A and B are one, the repaired run is the network with its statistics estimated on these inputs."""
    a, x = Small(3).eval(), torch.randn(64, 1, 4, 4)
    found = lockstep(a, copy.deepcopy(a), forward, {"arg0": x})
    repaired = copy.deepcopy(a)
    repaired.norm.train()
    with torch.no_grad():
        truth = repaired(x)
    assert found.fresh is not None
    torch.testing.assert_close(found.fresh[0], truth, rtol=1e-4, atol=1e-5)


def test_every_weight_is_seen() -> None:
    a = Small(0).eval()
    _, seen = watch(a, forward, {"arg0": torch.randn(2, 1, 4, 4)})
    found = {name for op in seen for name in op.weights}
    assert found == {k for k, v in a.state_dict().items() if v.is_floating_point()}


def drawn(*shape: int, count: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_averaged_logits_lose_the_same_under_any_labels(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergeid.basics.memory.NUMBERS", 30)
    a, b = drawn(40, 5, seed=seed)
    sums = EndSums()
    for part in (slice(15), slice(15, None)):
        sums.add(a[part], b[part], None)
    found = sums.features()
    labels = torch.randint(5, (40,), generator=torch.Generator().manual_seed(seed))
    own = (F.cross_entropy(a, labels) + F.cross_entropy(b, labels)) / 2
    assert found["excess_averaged"] == pytest.approx(float(F.cross_entropy((a + b) / 2, labels) - own))
    p, q = a.softmax(-1).numpy(), b.softmax(-1).numpy()
    assert found["divergence"] == pytest.approx(np.mean([jensenshannon(x, y) ** 2 for x, y in zip(p, q, strict=True)]))
    assert found["own_entropy"] == pytest.approx((entropy(p, axis=1).mean() + entropy(q, axis=1).mean()) / 2)


def test_what_b_loses_beyond_a() -> None:
    """Cross-entropies against A's predictions to the power 1.5; nothing of a model that differs by a constant."""
    a, b = drawn(12, 3, 5)
    mask = torch.ones(12, 3, dtype=torch.bool)
    mask[4, 2:] = False
    sums = EndSums()
    for part in (slice(7), slice(7, None)):
        sums.add(a[part], b[part], mask[part])
    q = a.softmax(-1) ** 1.5
    q = q / q.sum(-1, keepdim=True)
    each = [F.cross_entropy(x.flatten(0, 1), q.flatten(0, 1), reduction="none").view(12, 3) for x in (a, b)]
    gap = ((each[1] - each[0]) * mask).sum(1) / mask.sum(1)
    assert sums.features()["behind"] == pytest.approx(float(gap.mean()))
    same = EndSums()
    same.add(a, a + 2, None)
    assert same.features()["behind"] == pytest.approx(0, abs=1e-12)


def test_shifts_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergeid.basics.memory.NUMBERS", 20)
    a, b, m1, m2 = drawn(7, 3, 4, count=4)
    mask = torch.ones(7, 3, dtype=torch.bool)
    mask[2, 1:] = False
    sums = ShiftSums()
    for part in (slice(3), slice(3, None)):
        sums.add(a[part], b[part], (m1[part], m2[part]), mask[part])
    found, shift, sharp = sums.features(), 0.0, 0.0
    for e in range(7):
        for t in range(int(mask[e].sum())):
            average = (a[e, t] + b[e, t]) / 2
            mixed = ((a[e, t].softmax(0) + b[e, t].softmax(0)) / 2) ** 1.5

            def rise(labels: Tensor, e: int = e, t: int = t, average: Tensor = average) -> float:
                losses = [-(labels * x.log_softmax(0)).sum() for x in (m1[e, t], m2[e, t], average)]
                return float((losses[0] + losses[1]) / 2 - losses[2]) / int(mask[e].sum()) / 7

            shift += rise(average.softmax(0))
            sharp += rise(mixed / mixed.sum())
    assert found["shift"] == pytest.approx(shift)
    assert found["shift_sharp"] == pytest.approx(sharp)


def test_what_averages_shifts_nothing() -> None:
    a, b = drawn(9, 6)
    sums = ShiftSums()
    sums.add(a, b, ((a + b) / 2 + 3, (a + b) / 2 - 1), None)  # a constant changes no prediction
    found = sums.features()
    assert found["shift"] == pytest.approx(0, abs=1e-12) and found["shift_sharp"] == pytest.approx(0, abs=1e-12)


def ruled_out(t: Tensor) -> Tensor:
    """With one more class, at -inf."""
    return F.pad(t, (0, 1), value=-torch.inf)


def test_a_class_that_is_ruled_out_changes_nothing() -> None:
    a, b, m1, m2 = drawn(9, 6, count=4)
    found = []
    for change in (lambda t: t, ruled_out):
        ends, shifts = EndSums(), ShiftSums()
        ends.add(change(a), change(b), None)
        shifts.add(change(a), change(b), (change(m1), change(m2)), None)
        found.append({**ends.features(), **shifts.features()})
    assert all(math.isfinite(v) for v in found[0].values())
    assert found[1] == pytest.approx(found[0], abs=1e-12)


def test_what_padding_holds_does_not_count() -> None:
    outs = drawn(7, 3, 4, count=4)
    mask = torch.ones(7, 3, dtype=torch.bool)
    mask[2, 1:] = mask[5] = False
    found = []
    for value in (0.0, torch.nan):
        a, b, m1, m2 = (t.masked_fill(~mask[..., None], value) for t in outs)
        ends, shifts = EndSums(), ShiftSums()
        ends.add(a, b, mask)
        shifts.add(a, b, (m1, m2), mask)
        found.append({**ends.features(), **shifts.features()})
    assert found[1] == pytest.approx(found[0], abs=1e-12)


class Masked(nn.Module):
    """A mask in the state that is added: to the logits, where it has one row, or to attention."""

    def __init__(self, seed: int, low: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Linear(8, 6), nn.Linear(6, 4)
        self.register_buffer("causal", torch.full((5, 5), low).triu(1))
        self.register_buffer("classes", torch.tensor([0, 0, 0, low]))
        self.causal: Tensor
        self.classes: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = (x @ x.transpose(1, 2) + self.causal).softmax(-1) @ x
        return self.head(x.mean(1)) + self.classes


def test_masks_in_the_state_may_be_infinite() -> None:
    """As masks that are only low."""
    data = [{"arg0": x} for x in torch.randn(32, 5, 8, generator=torch.Generator().manual_seed(0))]
    plain = [
        probe(Masked(0, low).eval(), {"direct": Masked(1, low).eval()}, forward, Examples(data))["direct"].plain
        for low in (-1e4, -torch.inf)
    ]
    about = {"uniform", "told", "distance", "distance_worst", "cosine", "deviation"}  # to which low masks belong
    kept = [{k: v for k, v in each.items() if k not in about} for each in plain]
    assert kept[1] == pytest.approx(kept[0], abs=1e-5) and all(math.isfinite(v) for v in plain[1].values())


def test_outputs_known_of_more_examples_count() -> None:
    a, b = Small(0).eval(), Small(1).eval()
    data = [{"arg0": x} for x in torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))]
    ends = EndSums()
    hear = hears(ends)
    whole = torch.stack([d["arg0"] for d in data])
    with torch.no_grad():
        hear(a(whole), b(whole), {"arg0": whole})
        hear(torch.zeros(3), torch.zeros(3), {})  # no logits
    found = probe(a, {"direct": b}, forward, Examples(data), limit=32, ends=ends)["direct"]
    for key, value in ends.features().items():
        assert found.plain[key] == value
    few = probe(a, {"direct": b}, forward, Examples(data), limit=32)["direct"]
    assert few.plain["shift"] == found.plain["shift"] and few.plain["divergence"] != found.plain["divergence"]


def test_other_paths_are_told() -> None:
    class Routed(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.layer, self.twice = nn.Linear(4, 4), twice

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x)) if self.twice else self.layer(x)

    with pytest.raises(PathsDiffer, match="same operations"):
        lockstep(Routed(False), Routed(True), forward, {"arg0": torch.randn(3, 4)})


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Small(0).eval(), Small(1).eval()
    data = [{"arg0": x} for x in torch.randn(32, 1, 4, 4)]
    whole = probe(a, {"direct": b}, forward, Examples(data))["direct"]
    monkeypatch.setattr("mergeid.prediction.probe.BUDGET", 100_000)
    parts = probe(a, {"direct": b}, forward, Examples(data))["direct"]
    for key in ("excess", "shift", "shift_sharp", "divergence", "own_entropy", "distance"):
        assert parts.plain[key] == pytest.approx(whole.plain[key], rel=1e-4, abs=1e-6)


class Spy(TorchDispatchMode):
    """Looks at every operand of every operation for a tensor on the line between two weights."""

    def __init__(self, lines: list[tuple[str, Tensor, Tensor]]) -> None:
        super().__init__()
        self.lines = [(n, a.double(), b.double()) for n, a, b in lines]
        self.between: list[str] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" not in str(func):  # reading and loading weights computes nothing
            for x in tree_leaves((args, kwargs or {})):
                if isinstance(x, Tensor) and x.is_floating_point() and x.numel() >= 5:
                    self._look(str(func), x.detach().double())
        return func(*args, **(kwargs or {}))

    def _look(self, func: str, x: Tensor) -> None:
        for name, a, b in self.lines:
            for value in (x, x.T) if x.dim() == 2 else (x,):
                if value.shape != a.shape:
                    continue
                step = b - a
                share = float(((value - a) * step).sum() / step.square().sum())
                off = float((value - a - share * step).norm() / step.norm())
                if off < 1e-3:
                    self.seen.add(name)
                    if 0.02 < share < 0.98:
                        self.between.append(f"{func}: {name} at {share:.2f}")


def spied(a: nn.Module, others: list[dict[str, Tensor]]) -> Spy:
    own = {k: v.detach().clone() for k, v in a.state_dict().items()}
    lines = [
        (k, v, o[k].detach().clone())
        for o in others
        for k, v in own.items()
        if v.is_floating_point() and v.numel() >= 5 and not torch.equal(v, o[k])
    ]
    return Spy(lines)


def test_no_network_between_the_two_is_run() -> None:
    """Every tensor that any operation of the whole prediction takes is looked at: none lies between A's weight and B's,
    as it lies or permuted. The spy sees one where a network between the two is run."""
    a, b = Small(0).eval(), Small(1).eval()
    x = torch.randn(32, 1, 4, 4)
    data, example = [{"arg0": i} for i in x], x[:2]
    plan = m.plan(a, b, data=data, example_inputs=example, match="always")
    assert plan.moves
    partners = [dict(b.state_dict()), plan.graph.apply_state(plan.element, b.state_dict())]
    with spied(a, partners) as spy:
        m.predict(a, b, data=data, example_inputs=example)
        m.predict(a, b, example_inputs=example)
    assert spy.seen >= {"conv.weight", "attend.in_proj_weight", "head.weight"}
    assert spy.between == []
    for partner in partners:
        net = between(a, copy_with(b, partner), 0.5)
        with spied(a, partners) as spy, torch.no_grad():
            net(x)
        assert any("conv.weight at 0.50" in found for found in spy.between)


def copy_with(net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(net)
    other.load_state_dict(state)
    return other
