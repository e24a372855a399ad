"""Merges of live modules refuse and round as merges of files do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.methods.registry import get_method, method_names


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_refused_by_its_name(bad: float, which: int) -> None:
    nets = [_net(0), _net(1)]
    with torch.no_grad():
        nets[which][0].weight[3, 1] = bad
    what = "NaN" if bad != bad else "an infinite number"
    with pytest.raises(MergeidError, match=rf"tensor '0.weight' of Sequential holds {what}"):
        mergeid.merge(*nets, match="never")
    skipped = mergeid.merge(*nets, match="never", skip=["0.weight"]).state
    assert torch.equal(skipped["0.weight"].isfinite(), nets[0][0].weight.isfinite())
    assert all(v.isfinite().all() for k, v in skipped.items() if k != "0.weight")


def test_an_overflow_is_refused() -> None:
    a, b = _net(0).half(), _net(1).half()
    with torch.no_grad():
        a[0].weight.fill_(6e4)
        b[0].weight.fill_(-6e4)
    with pytest.raises(MergeidError, match=r"tensor '0.weight' overflows F16 when merged with weights 3, -2"):
        mergeid.merge(a, b, match="never", weights=[3, -2], normalize=False)


def test_the_second_model_is_not_rounded_before_it_is_merged() -> None:
    a, b = _net(0).to(torch.bfloat16), _net(1)
    merged = mergeid.merge(a, b, match="never").state
    for key, value in merged.items():
        exact = (a.state_dict()[key].double() + b.state_dict()[key].double()) / 2
        assert torch.equal(value, exact.to(torch.bfloat16))


@pytest.mark.parametrize("method", [n for n in method_names() if not get_method(n).statistics and n != "passthrough"])
def test_models_of_different_number_formats(method: str) -> None:
    """The result is that of wide models, up to what the formats round, in the first one's format."""
    base = _net(2) if get_method(method).base else None
    found = mergeid.merge(_net(0).to(torch.bfloat16), _net(1), base=base, method=method, match="never").state
    wide = mergeid.merge(_net(0), _net(1), base=base, method=method, match="never").state
    for key, value in found.items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), wide[key], rtol=0, atol=0.02)
