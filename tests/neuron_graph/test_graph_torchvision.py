"""Operations of detectors: regions read at boxes that data choose, and what was kept of these boxes."""

from __future__ import annotations

import torch
from graph_helpers import only, sound, traced
from torch import nn
from torchvision.ops import nms, roi_align, roi_pool

PICTURE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[0, 1.0, 2.0, 9.0, 8.0], [1, 0.0, 0.0, 12.0, 15.0], [1, 3.0, 3.0, 7.0, 9.0]])


class Regions(nn.Module):
    """The best boxes after non-maximum suppression, classified by what lies inside them."""

    def __init__(self, read=roi_align):
        super().__init__()
        self.read, self.body, self.score = read, nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 1)
        self.inner, self.out = nn.Linear(6 * 4, 5), nn.Linear(5, 2)

    def forward(self, x, boxes):
        seen = self.body(x).relu()
        scores = self.score(seen).mean((0, 2, 3))
        kept = boxes[nms(boxes[:, 1:], scores, 0.9)]
        parts = self.read(seen, kept, (2, 2), 0.5)
        large = torch.nonzero(kept[:, 3] > 1.0).squeeze(1)
        return self.out(self.inner(parts.flatten(1)).relu())[large], scores


def test_channels_pass_through_regions():
    for read in (roi_align, roi_pool):
        graph = sound(lambda read=read: Regions(read), (PICTURE, BOXES))
        assert graph.unknown_ops == {}
        channels, hidden = only(graph, "body.weight", 0), only(graph, "inner.weight", 0)
        assert (channels.size, hidden.size) == (6, 5)
        # every channel lies on the four places that the kernel reads
        assert only(graph, "inner.weight", 1) is channels
        assert not any(a.tensor == "score.weight" and a.axis == 0 for s in graph.spaces for a in s.axes)


class Choice(nn.Module):
    """Takes its hidden neurons in the order in which they fire: their numbers are the output."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8)

    def forward(self, x):
        return torch.nonzero(self.inner(x).relu())[:, 1].to(x.dtype)


def test_numbers_of_neurons_fix_the_neurons():
    graph = traced(Choice().eval(), (torch.randn(3, 6, generator=torch.Generator().manual_seed(0)),))
    assert graph.unknown_ops == {} and graph.spaces == []
    assert [why for t, a, why in graph.frozen if (t, a) == ("inner.weight", 0)] == ["aten.nonzero"]
