"""Singular values and pseudoinverses of matrices whose rows or columns are neurons; imaginary parts of conjugates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_helpers import TwoLayers, only, sound
from torch import Tensor


@pytest.mark.parametrize(
    "run",
    [
        lambda h: h / torch.linalg.matrix_norm(h, 2, keepdim=True),
        lambda h: h * torch.linalg.matrix_norm(h, "nuc", keepdim=True),
        lambda h: (lambda u, s, v: (u * s[:, None].log1p()) @ v)(*torch.linalg.svd(h, full_matrices=False)),
        lambda h: torch.linalg.pinv(h).mT,
        lambda h: torch.complex(h, h.tanh()).conj().imag,
    ],
    ids=["spectral norm", "nuclear norm", "vectors", "pseudoinverse", "imaginary"],
)
def test_channels_are_free(run: Callable[[Tensor], Tensor]) -> None:
    """The operations had no rule."""

    class Net(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(run(self.a(x)))

    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    graph = sound(lambda: Net(6, 4), (x,))
    assert only(graph, "a.weight", 0).size == 4
    assert not graph.unknown_ops
