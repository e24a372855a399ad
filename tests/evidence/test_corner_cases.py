"""Rules of the evidence at their corners, by hand or beside brute force."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mergeid.evidence.activations import sample_rows
from mergeid.evidence.anchored import _Chain
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.inputs import _patches, supports
from mergeid.evidence.interaction import interactions
from mergeid.evidence.separation import gamma_in
from mergeid.evidence.support import InputMoments, TokenCounts
from mergeid.evidence.writers import Writer
from mergeid.neuron_graph.neuron_graph import AxisMap, TapMap


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1e3])
def test_what_the_next_layer_sees_does_not_depend_on_the_scale(scale: float) -> None:
    """Neurons 0 and 1 are read alike, and 3 with the opposite sign; a direction of 1e-9 is none."""
    readout = torch.tensor([[1.0, 1.0, 0.0, -1.0], [0.0, 0.0, 1.0, 0.0], [1e-9, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = interactions(scale * readout)
    assert (found.rank, found.hidden) == (2, 2)
    torch.testing.assert_close(found.freedom, torch.tensor([2 / 3, 2 / 3, 0, 2 / 3], dtype=torch.float64))
    assert found.together == [(0, 1, 1), (0, 3, -1), (1, 3, -1)]
    assert interactions(0 * readout).rank == 0 and bool((interactions(0 * readout).freedom == 1).all())


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_two_tokens_are_as_far_apart_as_their_columns(tokens: int) -> None:
    counts = TokenCounts(6)
    counts.add(torch.tensor([t for t in range(tokens) for _ in range(10)]))
    support = counts.support(0.999)
    fixed = torch.randn(5, 6, generator=generator(), dtype=torch.float64)
    columns = fixed.T[:tokens]
    apart = [2**0.5 * float((columns[i] - columns[j]).norm()) for i in range(tokens) for j in range(i)]
    assert support.k == tokens
    assert gamma_in(FunctionClasses(fixed, (support,))) == pytest.approx(min(apart, default=float("inf")), rel=1e-6)


@pytest.mark.parametrize("kind", ["none", "mask"])
def test_inputs_that_never_vary_cost_nothing(kind: str) -> None:
    moments = InputMoments(4)
    moments.add(torch.ones(50, 4, dtype=torch.float64))
    support = moments.support(0.9, centred=True)
    fixed, weights = (torch.randn(3, 4, generator=generator(k), dtype=torch.float64) for k in range(2))
    mask = (torch.rand(3, 4, generator=generator(2)) > 0.5).double()
    classes = FunctionClasses(fixed, (support,), mask) if kind == "mask" else FunctionClasses(fixed, (support,))
    assert support.k == 0
    assert not classes.costs(weights).any() and not classes.residuals(weights).any()


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv1d(2, 3, 3, padding="same"), (9,)),
        (nn.Conv1d(2, 3, 4, padding="same", dilation=2), (9,)),
        (nn.Conv2d(2, 3, (3, 5), padding="same", dilation=2), (9, 11)),
        (nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (6, 6)),
        (nn.Conv2d(2, 3, 3, padding="valid"), (6, 6)),
        (nn.Conv2d(2, 3, 3, padding=(1, 2), stride=2), (7, 6)),
    ],
)
def test_patches_times_the_kernel_are_the_convolution(conv: Any, size: tuple[int, ...]) -> None:
    x = torch.randn(2, 2, *size, generator=generator())
    with torch.no_grad():
        out = conv(x)
        found = _patches(conv, x, out)
        again = found.reshape(-1, conv.weight[0].numel()) @ conv.weight.reshape(3, -1).T + conv.bias
    wanted = out.movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-5)


def test_layers_with_a_bias_are_centred_unless_it_is_said_otherwise() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    x = 5 + torch.randn(200, 3, generator=generator())

    def found(**said: bool) -> list[bool]:
        made = supports(net, [x], lambda model, batch: model(batch), centred=said)
        return [made[name][0].centred for name in ("0", "1", "2")]

    assert found() == [True, False, True]
    assert found(**{"0": False, "1": True}) == [False, True, True]


@pytest.mark.parametrize("per_example", [2, 99])
def test_only_real_tokens_are_sampled(per_example: int) -> None:
    x = torch.randn(3, 5, 4, generator=generator())
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    tap = TapMap("m", "out", 0, 3, (2,), np.array([0, -1, 1, 2]))
    found = sample_rows(x, tap, torch.tensor([7, 8, 9]), mask, per_example, 0)
    kept = [min(per_example, int(row.sum())) for row in mask]
    assert found.example.tolist() == [7] * kept[0] + [8] * kept[1]
    real = {tuple(x[i, t, [0, 2, 3]].tolist()) for i in range(3) for t in range(5) if mask[i, t]}
    rows = [tuple(row) for row in found.values.tolist()]
    assert set(rows) <= real and len(set(rows)) == len(rows) == sum(kept)


def test_a_chain_breaks_at_what_is_not_reached() -> None:
    """c lies in the blocks of a, which is reached, and of b, which is not and reads the inputs."""
    axis = AxisMap("w", 0, np.arange(2))
    parents = {"a": (), "b": (), "c": ("a", "b")}
    spaces = {name: SimpleNamespace(id=name, parents=of) for name, of in parents.items()}
    writers = {name: [Writer(f"{name}.w", axis, frozenset(), None)] for name in "ab"}
    writers["c"] = [Writer("c.w", axis, frozenset("a"), None)]
    chain = SimpleNamespace(graph=SimpleNamespace(by_id=spaces), sources=lambda one: writers[one.id])
    assert _Chain.breaks(cast(Any, chain), cast(Any, spaces["c"]), {"a"}) == ("b",)
    assert _Chain.breaks(cast(Any, chain), cast(Any, spaces["c"]), {"a", "b"}) == ("c",)


def test_patches_of_grouped_inputs_are_unfold() -> None:
    conv = nn.Conv2d(2, 4, 3, stride=2, dilation=1, padding=1)
    x = torch.randn(1, 2, 7, 7, generator=generator())
    found = _patches(conv, x, conv(x))
    wanted = F.unfold(x, 3, padding=1, stride=2)[0].T
    torch.testing.assert_close(found.reshape(len(wanted), -1), wanted)
