"""Detection: which boxes to look at is chosen by data, their channels pass through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeid.neuron_graph.layout import FROZEN, Fine, Layout, uniform
from mergeid.neuron_graph.rules import rule

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


@rule("nonzero", "torchvision.nms")
def chosen(call: Call) -> Layout:
    """Places as values: positions in every dimension of what chooses them are fixed."""
    layouts = [call.layout_of(t) for t in call.tensors()]
    for layout in layouts:
        call.freeze_dims(layout, range(len(layout.dims)))
    return uniform(call.out.shape, FROZEN, any(x.data for x in layouts))


@rule("torchvision.roi_align", "torchvision.roi_pool")
def regions(call: Call) -> list[Layout | None]:
    """[N, C, H, W] read at the boxes [K, 5] -> [K, C, h, w]."""
    layout = call.freeze_dims(call.layout("input"), [0, 2, 3])
    rois = call.layout("rois")
    call.freeze_dims(rois, range(len(rois.dims)))
    k, _, *place = call.outputs()[0].shape
    boxes, *places = ((Fine(n, FROZEN),) if n > 1 else () for n in (k, *place))
    read = Layout((boxes, layout.dims[1], *places), layout.groups, data=True)
    return [read, None][: len(call.outputs())]
