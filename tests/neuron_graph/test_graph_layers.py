"""Graphs of plain torch layers: every group element leaves the function alone, and the expected spaces are there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graph_helpers import TwoLayers, on, only, sound
from torch import nn

torch.manual_seed(0)
IMAGE = (torch.randn(2, 3, 8, 8),)
ROWS = (torch.randn(5, 6),)


def test_mlp():
    graph = sound(
        lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 3)), ROWS
    )
    assert [(s.size, s.blocks, s.parents) for s in graph.spaces] == [(12, 1, ()), (9, 1, ())]
    first, second = graph.spaces
    assert {(a.tensor, a.axis) for a in first.axes} == {("0.weight", 0), ("0.bias", 0), ("2.weight", 1)}
    assert {(a.tensor, a.axis) for a in second.axes} == {("2.weight", 0), ("2.bias", 0), ("4.weight", 1)}
    assert {(t, a) for t, a, _ in graph.frozen} == {("0.weight", 1), ("4.weight", 0), ("4.bias", 0)}
    assert graph.share == 1 - 3 / sum(6 * 12 + 12 + 12 * 9 + 9 + 9 * 3 + 3 for _ in range(1))


def test_convnet_with_batch_norm():
    graph = sound(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 4),
        ),
        IMAGE,
    )  # fmt: skip
    assert [(s.size, s.blocks, s.parents) for s in graph.spaces] == [(8, 1, ()), (6, 1, ())]
    on_norm = {"1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert on_norm < {a.tensor for a in graph.spaces[0].axes}


def test_flattened_space_keeps_its_places():
    graph = sound(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)), IMAGE)
    space = only(graph, "3.weight", 1)
    assert (space.size, space.blocks) == (8, 1)
    (axis,) = (a for a in space.axes if a.tensor == "3.weight")
    assert axis.positions.tolist() == [list(range(36 * c, 36 * c + 36)) for c in range(8)]


class Grouped(nn.Module):
    def __init__(self, channels=8, groups=2):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 6, 3, groups=groups)
        self.c, self.d = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x)).relu()).relu()).mean((2, 3))


def test_grouped_and_depthwise_convolution():
    graph = sound(Grouped, IMAGE)
    # one axis of the grouped kernel serves every group, so the channels of all groups move alike
    within, channels = only(graph, "b.weight", 1), only(graph, "a.weight", 0)
    assert (within.size, within.blocks, within.parents) == (4, 1, ())
    (groups,) = (graph.by_id[p] for p in channels.parents if p != within.id)
    assert (groups.size, groups.blocks, groups.parents, groups.axes) == (2, 1, (), ())
    assert (channels.size, channels.blocks) == (8, 8) and within.id in channels.parents
    out = only(graph, "b.weight", 0)
    assert (out.size, out.blocks, out.parents) == (6, 2, (groups.id,))
    assert only(graph, "c.weight", 0) is out and only(graph, "d.weight", 1) is out


class Transposed(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=groups)
        self.c = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def test_transposed_convolution():
    graph = sound(Transposed, IMAGE)
    assert [(s.size, s.blocks) for s in graph.spaces] == [(8, 1), (6, 1)]
    assert only(graph, "b.weight", 0).size == 8 and only(graph, "b.weight", 1).size == 6


def test_grouped_transposed_convolution():
    graph = sound(lambda: Transposed(groups=2), IMAGE)
    channels = only(graph, "a.weight", 0)
    assert (channels.size, channels.blocks, len(channels.parents)) == (8, 2, 1)


class Shuffled(nn.Module):
    def __init__(self, by_module):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=3)
        self.c, self.d = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 4, 1)
        self.by_module = by_module

    def forward(self, x):
        x = self.b(self.a(x).relu())
        if self.by_module:
            x = nn.functional.channel_shuffle(x, 3)
        else:
            n, c, h, w = x.shape
            x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.d(self.c(x)).mean((2, 3))


def test_channel_shuffle():
    graphs = [sound(lambda by=by: Shuffled(by), IMAGE) for by in (False, True)]
    for graph in graphs:
        inner = only(graph, "b.weight", 0)
        assert (inner.size, inner.blocks) == (12, 3)
        assert only(graph, "c.weight", 0) is inner
        (axis,) = (a for a in inner.axes if (a.tensor, a.axis) == ("c.weight", 0))
        # position p of the shuffled tensor is channel p // 3 of group p % 3
        assert axis.index.tolist() == [(p % 3) * 4 + p // 3 for p in range(12)]


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.norm, self.c = nn.BatchNorm2d(9), nn.Conv2d(9, 6, 1)
        self.head = nn.Linear(15, 3)

    def forward(self, x):
        x = self.a(x)
        x = torch.cat([x, self.b(x.relu())], 1)
        x = torch.cat([x, self.c(self.norm(x).relu())], 1)
        return self.head(x.mean((2, 3)))


def test_concatenation():
    graph = sound(Dense, IMAGE)
    assert sorted(s.size for s in graph.spaces) == [4, 5, 6]
    assert [s.size for s in on(graph, "norm.weight", 0)] == [4, 5]
    assert [s.size for s in on(graph, "head.weight", 1)] == [4, 5, 6]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 8, 1))
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def test_residual_stream_is_one_space():
    graph = sound(Residual, IMAGE)
    assert [(s.size, s.blocks) for s in graph.spaces] == [(8, 1), (5, 1), (5, 1)]
    stream = only(graph, "stem.weight", 0)
    for tensor, axis in (("blocks.0.2.weight", 1), ("blocks.1.4.weight", 0), ("head.weight", 1)):
        assert only(graph, tensor, axis) is stream


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x).relu_()
        x = x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(x.flatten(2).mean(-1))


def test_squeeze_excite():
    graph = sound(SqueezeExcite, IMAGE)
    assert [(s.size, s.blocks) for s in graph.spaces] == [(8, 1), (4, 1)]
    assert only(graph, "up.weight", 0) is only(graph, "a.weight", 0)


class Gated(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 10), nn.Linear(5, 3), how

    def forward(self, x):
        x = self.a(x)
        if self.how == "glu":
            return self.b(F.glu(x, -1))
        if self.how == "chunk":
            u, v = x.chunk(2, -1)
        elif self.how == "interleaved":
            u, v = x[..., ::2], x[..., 1::2]
        else:
            u, v = x.view(-1, 2, 5).unbind(1)
        return self.b(F.silu(u) * v)


def test_gated_units():
    for how in ("glu", "chunk", "interleaved", "unbind"):
        graph = sound(lambda how=how: Gated(how), ROWS)
        (space,) = graph.spaces
        assert (space.size, space.blocks) == (5, 1), how
        (axis,) = (a for a in space.axes if (a.tensor, a.axis) == ("a.weight", 0))
        pairs = [[2 * i, 2 * i + 1] if how == "interleaved" else [i, i + 5] for i in range(5)]
        assert axis.positions.tolist() == pairs


class Norms(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), norm(), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).tanh())


def test_layer_and_rms_norm():
    for norm in (lambda: nn.LayerNorm(8), lambda: nn.RMSNorm(8), lambda: nn.BatchNorm1d(8)):
        (space,) = sound(lambda norm=norm: Norms(norm), ROWS).spaces
        assert (space.size, space.blocks, space.parents) == (8, 1, ())
        assert ("norm.weight", 0) in {(a.tensor, a.axis) for a in space.axes}


def test_layer_norm_over_channels_and_space():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 6, 1), nn.LayerNorm([6, 8, 8]), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.b(self.norm(self.a(x)).relu())

    (space,) = sound(Net, IMAGE).spaces
    assert only(space_graph := sound(Net, IMAGE), "norm.weight", 0).size == 6
    assert not on(space_graph, "norm.weight", 1)
    assert space.size == 6


def test_group_norm_has_groups():
    graph = sound(lambda: Norms(lambda: nn.GroupNorm(4, 8)), ROWS)
    inner = only(graph, "norm.weight", 0)
    assert (inner.size, inner.blocks) == (8, 4)
    (groups,) = (graph.by_id[p] for p in inner.parents)
    assert (groups.size, groups.blocks, groups.parents) == (4, 1, ())


def test_instance_norm_weight_norm_and_spectral_reparametrisation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
            self.norm, self.b = nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.b(self.norm(self.a(x)).relu())

    graph = sound(Net, IMAGE)
    assert only(graph, "norm.weight", 0).size == 6
    tensors = {a.tensor for s in graph.spaces for a in s.axes}
    assert {"a.parametrizations.weight.original0", "a.parametrizations.weight.original1"} <= tensors


class PixelShuffle(nn.Module):
    def __init__(self, down):
        super().__init__()
        self.a, self.shuffle = nn.Conv2d(3, 12, 1), nn.PixelUnshuffle(2) if down else nn.PixelShuffle(2)
        self.b = nn.Conv2d(48 if down else 3, 2, 1)

    def forward(self, x):
        return self.b(self.shuffle(self.a(x).relu()))


def test_pixel_shuffle():
    graph = sound(lambda: PixelShuffle(False), IMAGE)
    outer = only(graph, "b.weight", 1)
    assert (outer.size, outer.blocks) == (3, 1)
    assert only(graph, "a.weight", 0) is outer
    (axis,) = (a for a in outer.axes if (a.tensor, a.axis) == ("a.weight", 0))
    assert axis.positions.tolist() == [[4 * c + k for k in range(4)] for c in range(3)]
    graph = sound(lambda: PixelShuffle(True), IMAGE)
    assert only(graph, "a.weight", 0).size == 12 and only(graph, "b.weight", 1) is only(graph, "a.weight", 0)


def test_prelu_and_layer_scale():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Conv2d(3, 6, 1), nn.PReLU(6), nn.Conv2d(6, 2, 1)
            self.gamma = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return self.b((self.act(self.a(x)).permute(0, 2, 3, 1) * self.gamma).permute(0, 3, 1, 2))

    (space,) = sound(Net, IMAGE).spaces
    assert {"act.weight", "gamma"} < {a.tensor for a in space.axes}


def test_tied_embedding_and_head():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            x = self.embed(ids)
            return self.head(x + self.down(self.up(x).relu()))

    graph = sound(Net, (torch.randint(0, 11, (2, 7)),))
    stream = only(graph, "embed.weight", 1)
    assert only(graph, "head.weight", 1) is stream
    assert not on(graph, "embed.weight", 0) and not on(graph, "head.weight", 0)
    assert sorted(s.size for s in graph.spaces) == [8, 12]


def test_in_place_operations_and_writes_into_views():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(8, 8), nn.Linear(8, 3))

        def forward(self, x):
            y = self.a(x).clone()
            y[:, :4] += self.b(x)
            y.relu_().mul_(2)
            z = torch.zeros_like(y)
            z[:, 4:] = y[:, 4:]
            z[:, :4].copy_(y[:, :4].exp())
            z.add_(self.c(y))
            return self.d(z)

    graph = sound(Net, ROWS)
    first, second = on(graph, "a.weight", 0)
    assert (first.size, second.size) == (4, 4)
    assert only(graph, "b.weight", 0) is first
    assert on(graph, "d.weight", 1) == [first, second]


def test_a_write_along_a_dimension_that_was_constant():
    """The rows of an expanded tensor are alike until one of them is written."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.row, self.other = nn.Parameter(torch.randn(5)), nn.Linear(6, 5)
            self.mix, self.head = nn.Linear(4, 7), nn.Linear(7, 3)

        def forward(self, x):
            y = self.row.expand(4, 5).clone()
            y[0] = self.other(x).mean(0)
            return self.head(self.mix(y.t()).relu())

    graph = sound(Net, ROWS)
    assert all(
        not (a.index[:1] >= 0).any() for s in graph.spaces for a in s.axes if (a.tensor, a.axis) == ("mix.weight", 1)
    )


def test_transposing_in_place():
    class Net(TwoLayers):
        def forward(self, x):
            y = self.a(x)
            y = y.view(5, 2, 4).transpose_(1, 2).unsqueeze_(0).squeeze_(0)
            return self.b(y.reshape(5, 8))

    graph = sound(Net, ROWS)
    assert only(graph, "b.weight", 1) is only(graph, "a.weight", 0)
    assert only(graph, "b.weight", 1).size == 8


def test_a_module_used_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.shared, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.shared(self.shared(self.a(x)).tanh()).tanh())

    (space,) = sound(Net, ROWS).spaces
    assert space.size == 8 and only(sound(Net, ROWS), "shared.weight", 1).size == 8


def test_a_fixed_index_freezes_its_neuron_only():
    class Net(TwoLayers):
        def forward(self, x):
            y = self.a(x)
            return self.b(y.relu() * y[:, :1].sigmoid())

    graph = sound(Net, ROWS)
    (space,) = graph.spaces
    assert space.size == 7
    assert all(a.index[0] == -1 and (a.index[1:] >= 0).all() for a in space.axes)


def test_pooling_resizing_padding_and_unfolding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(9, 5, 1)
            self.unfold, self.c = nn.Unfold(2), nn.Linear(20, 2)

        def forward(self, x):
            x = F.interpolate(F.avg_pool2d(F.pad(self.a(x), (1, 2, 0, 1), mode="reflect"), 2), size=(5, 5))
            x = F.interpolate(x, size=(4, 4), mode="bilinear")
            x = self.b(F.pad(x, (0, 0, 0, 0, 1, 2)))
            return self.c(self.unfold(x).transpose(1, 2))

    graph = sound(Net, IMAGE)
    assert only(graph, "a.weight", 0).size == 6
    assert [s.size for s in on(graph, "b.weight", 1)] == [6] or {s.size for s in on(graph, "b.weight", 1)} >= {6}
    space = only(graph, "c.weight", 1)
    assert space.size == 5 and only(graph, "b.weight", 0) is space


def test_ordered_operations_fix_their_dimension():
    class Net(nn.Module):
        def __init__(self, op):
            super().__init__()
            self.a, self.b, self.op = nn.Linear(6, 8), nn.Linear(8, 3), op

        def forward(self, x):
            return self.b(self.op(self.a(x)))

    for op in (
        lambda x: x.cumsum(-1),
        lambda x: x.cummax(-1).values,
        lambda x: x.flip(-1) + x,
        lambda x: x * torch.arange(8),
    ):
        graph = sound(lambda op=op: Net(op), ROWS)
        # positions that mirror each other may still trade places, single neurons may not
        assert all(s.members < 8 for s in graph.spaces)
    for op in (
        lambda x: x.softmax(-1),
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: x - x.amax(-1, keepdim=True),
        lambda x: x * x.std(-1, keepdim=True) + x.median(),
        lambda x: x.where(x > x.mean(), x.new_zeros(())),
        lambda x: x.clamp(min=-1) * torch.ones(8),
    ):
        graph = sound(lambda op=op: Net(op), ROWS)
        assert [(s.size, s.blocks) for s in graph.spaces] == [(8, 1)]


def test_rows_that_data_choose():
    class Net(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.a, self.b, self.c, self.how = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3), how

        def forward(self, x):
            y, z, chosen = self.a(x), self.b(x).tanh(), x[:, 0] > 0
            places = chosen.nonzero()[:, 0]
            if self.how == "mask":
                y[chosen] += z[chosen]
            elif self.how == "index":
                y[places] = z[places]
            elif self.how == "index_add":
                y.index_add_(0, places, z[places])
            elif self.how == "scatter":
                y = y.scatter(0, x.argsort(0)[:2, :1].expand(2, 8), z[:2])
            elif self.how == "masked_scatter":
                y = y.masked_scatter(chosen[:, None].expand_as(y), z[chosen])
            elif self.how == "gather":
                y = y + z.gather(0, x.argsort(0)[:, :1].expand(len(x), 8))
            return self.c(y)

    for how in ("mask", "index", "index_add", "scatter", "masked_scatter", "gather"):
        graph = sound(lambda how=how: Net(how), ROWS)
        assert graph.unknown_ops == {}, how
        (space,) = graph.spaces
        assert space.size == 8 and only(graph, "a.weight", 0) is only(graph, "b.weight", 0), how


def test_a_layer_without_rows_still_belongs_to_its_neurons():
    """An expert that no token of the example chose must not be permuted on its own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.expert, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = self.a(x)
            none = x[:, 0] > 1e9
            y[none] += self.expert(y[none]).relu()
            return self.c(y + torch.cat([y[none], y[:0], y]))

    graph = sound(Net, ROWS)
    (space,) = graph.spaces
    assert only(graph, "expert.weight", 0) is space and only(graph, "expert.weight", 1) is space
