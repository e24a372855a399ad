"""Complex weights: merged as pairs of real numbers, by every method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.methods.registry import get_method, method_names

METHODS = [n for n in method_names() if not get_method(n).statistics and n != "passthrough"]


class Spectral(nn.Module):
    """A filter of complex weights, or of the same numbers as pairs."""

    def __init__(self, seed: int, paired: bool) -> None:
        super().__init__()
        found = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(seed))
        self.filter = nn.Parameter(found if paired else torch.view_as_complex(found))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.filter if self.filter.is_complex() else torch.view_as_complex(self.filter)
        return (x.to(weight.dtype) @ weight).abs()


@pytest.mark.parametrize("method", METHODS)
def test_complex_weights_merge_as_their_real_and_imaginary_parts(method: str) -> None:
    base = get_method(method).base
    found = []
    for paired in (False, True):
        a, b, origin = (Spectral(seed, paired) for seed in range(3))
        found.append(mergeid.merge(a, b, method=method, base=origin if base else None, match="never").state["filter"])
    assert found[0].is_complex()
    torch.testing.assert_close(torch.view_as_real(found[0]), found[1])


def test_the_average_is_that_of_complex_numbers() -> None:
    a, b = (Spectral(seed, False) for seed in range(2))
    found = mergeid.merge(a, b, match="never", weights=[0.25, 0.75]).state["filter"]
    torch.testing.assert_close(found, 0.25 * a.filter.detach() + 0.75 * b.filter.detach())
