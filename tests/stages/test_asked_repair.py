"""A repair that is asked for by name is done, and the user is told where the merge is nearer without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_last_look import Normed, data
from torch import nn

import mergeid
from mergeid.errors import WillNotMerge
from mergeid.results.comparison import Comparison, Distance


def told(result: mergeid.MergeResult) -> list[str]:
    return [note for note in result.notes if "the repair does harm" in note]


def deep(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    widths = zip((6, 24, 24, 24), (24, 24, 24, 3), strict=True)
    return nn.Sequential(*(layer for n, m in widths for layer in (nn.Linear(n, m), nn.ReLU())))[:-1].eval()


CASES = [("repair", Normed, 0.02, 1), ("repair", Normed, 0.02, 5), ("solve", deep, 1.0, 3), ("solve", deep, 1.0, 5)]


@pytest.mark.parametrize(("repair", "make", "apart", "power"), CASES)
def test_a_repair_that_does_harm_is_done_and_said(
    repair: str, make: Callable[[int], nn.Module], apart: float, power: float
) -> None:
    """On few inputs, with long tails or with nothing to repair."""
    a, b = make(0), make(1)
    b.load_state_dict({k: v.lerp(b.state_dict()[k], apart) if v.dim() else v for k, v in a.state_dict().items()})
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))
    rows = [{"arg0": row} for row in x.sign() * x.abs() ** power]
    how = {"example_inputs": x[:2], "match": "never", "data": rows, "force": True}
    asked = mergeid.merge(a, b, **how, repair=repair)
    distances, made = asked.comparison["distances"], f"plain+{repair}"
    assert asked.repair["kind"].startswith(repair) and asked.comparison["unasked"] == "plain"
    assert distances["plain"] < distances[made] == pytest.approx(asked.comparison["distance"])
    assert len(told(asked)) == 1 and f"{made} is farther from the models than plain" in told(asked)[0]
    low = distances["plain"] / 2
    with pytest.raises(WillNotMerge, match=rf"with the repair asked for \(plain\+{repair}\) .* without it \(plain\)"):
        mergeid.merge(a, b, **{**how, "force": False}, repair=repair, refuse_above=low)
    usual = mergeid.merge(a, b, **how)
    assert usual.comparison["repair"] != repair and not told(usual)


@pytest.mark.parametrize("repair", ["bn", "solve", "none"])
def test_nothing_is_said_where_the_repair_does_good(repair: str) -> None:
    """The average of a network and itself with its inner scale turned up."""
    a, b = Normed(0), Normed(0)
    with torch.no_grad():
        for net, factor in ((a, 1), (b, 5)):
            x = torch.stack([d["arg0"] for d in data(2000, 9)])
            net.body[0].weight.mul_(factor), net.body[0].bias.mul_(factor)
            h = net.body[0](x)
            net.body[1].running_mean.copy_(h.mean(0)), net.body[1].running_var.copy_(h.var(0))
    how = {"example_inputs": torch.randn(2, 6), "match": "never", "data": data(256)}
    found = mergeid.merge(a, b, **how, repair=repair, force=True)
    assert not told(found) and found.comparison["unasked"] is None


def test_the_nearest_is_what_it_is_called() -> None:
    far = {"": Distance(1.8, "nats")}
    asked = Comparison({"plain+solve": 1.8, "plain": 0.7}, "plain", "plain", "solve", far, 64, unasked="plain")
    assert "nearest merge" not in (asked.refused(0.5) or "") and "0.700 without it (plain)" in (
        asked.refused(0.5) or ""
    )
    assert "(1.800 to 0.700)" in (asked.about_repair or "")
    assert Comparison({"plain": 0.7}, "plain", "plain", "none", far, 64).about_repair is None
