"""Graphs of attention: heads are a space, and what lies in them are spaces of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_helpers import on, only, sound
from torch import nn

torch.manual_seed(0)
TOKENS = (torch.randn(2, 5, 12),)


class Attention(nn.Module):
    """q, k, v in one matrix or in three; `kv` key heads are shared by the query heads."""

    def __init__(self, *, fused=False, kernel="eager", heads=3, kv=None, dim=12, size=4, bias=None, rope=False):
        super().__init__()
        self.heads, self.kv, self.size, self.kernel = heads, kv or heads, size, kernel
        if fused:
            self.qkv = nn.Linear(dim, 3 * heads * size)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, h * size) for h in (heads, self.kv, self.kv))
        self.fused, self.rope = fused, rope
        self.proj, self.head = nn.Linear(heads * size, dim), nn.Linear(dim, 2)
        if bias is not None:
            self.register_buffer("place", bias)
            self.table = nn.Parameter(torch.randn(int(bias.max()) + 1, heads))
        else:
            self.place = None

    def forward(self, x):
        b, t, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(b, t, self.heads, self.size).transpose(1, 2)
            k, v = (y(x).view(b, t, self.kv, self.size).transpose(1, 2) for y in (self.k, self.v))
        if self.rope:
            angle = torch.arange(t)[:, None] / 10.0 ** torch.arange(self.size // 2)
            cos, sin = (f(angle).repeat(1, 2).to(x) for f in (torch.cos, torch.sin))
            q, k = (
                y * cos + torch.cat([-y[..., self.size // 2 :], y[..., : self.size // 2]], -1) * sin for y in (q, k)
            )
        mask = None
        if self.place is not None:
            mask = self.table[self.place.reshape(-1)].view(t, t, self.heads).permute(2, 0, 1)[None]
        if self.kernel == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            if self.kv != self.heads:
                k, v = (y.repeat_interleave(self.heads // self.kv, 1) for y in (k, v))
            if self.kernel == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            else:
                score = q @ k.transpose(-1, -2) * self.size**-0.5
                y = (score if mask is None else score + mask).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, -1))
        return self.head(x)


def heads_of(graph, query="q.weight", value="v.weight", count=3, size=4):
    inner, outer = only(graph, query, 0), only(graph, value, 0)
    assert inner is not outer
    (heads,) = (graph.by_id[p] for p in inner.parents)
    assert (heads.size, heads.blocks, heads.parents) == (count, 1, ())
    for s in (inner, outer):
        assert (s.size, s.blocks, s.parents) == (count * size, count, (heads.id,))
    assert only(graph, "proj.weight", 1) is outer
    return heads


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention(kernel):
    graph = sound(lambda: Attention(kernel=kernel), TOKENS)
    heads_of(graph)
    assert only(graph, "k.weight", 0) is only(graph, "q.weight", 0)
    # the input is fixed, and the residual connection adds the projection to it
    assert len(graph.spaces) == 3 and not on(graph, "proj.weight", 0)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_fused_projection(kernel):
    graph = sound(lambda: Attention(fused=True, kernel=kernel), TOKENS)
    qk, v = on(graph, "qkv.weight", 0)
    assert (qk.size, qk.blocks, v.size, v.blocks) == (12, 3, 12, 3)
    assert qk.parents == v.parents and len(qk.parents) == 1
    (axis,) = (a for a in qk.axes if a.tensor == "qkv.weight")
    assert axis.positions.tolist() == [[i, i + 12] for i in range(12)]


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "gqa"])
def test_query_heads_follow_their_key_heads(kernel):
    graph = sound(lambda: Attention(kernel=kernel, heads=6, kv=2), TOKENS)
    keys, values = only(graph, "k.weight", 0), only(graph, "v.weight", 0)
    assert (keys.size, keys.blocks, values.size, values.blocks) == (8, 2, 8, 2)
    (groups,) = (graph.by_id[p] for p in keys.parents)
    assert (groups.size, groups.blocks) == (2, 1) and values.parents == (groups.id,)
    queries = only(graph, "q.weight", 0)
    assert queries.size == 24
    inside = [s for s in graph.spaces if s.size == 6 and s.blocks == 2 and s.parents == (groups.id,)]
    assert len(inside) == 1, "query heads trade places inside their group"
    assert set(queries.parents) == {inside[0].id, keys.id}


def test_rotary_positions_keep_their_pairs():
    graph = sound(lambda: Attention(rope=True), TOKENS)
    (heads,) = on(graph, "q.weight", 0)
    # every frequency is another one: only the head moves
    assert (heads.size, heads.blocks, heads.parents) == (3, 1, ())
    (axis,) = (a for a in heads.axes if (a.tensor, a.axis) == ("q.weight", 0))
    assert axis.positions.tolist() == [[4 * h + d for d in range(4)] for h in range(3)]
    value = only(graph, "v.weight", 0)
    assert (value.size, value.blocks, value.parents) == (12, 3, (heads.id,))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_relative_position_bias(kernel):
    at = torch.arange(5)
    place = at[:, None] - at[None, :] + 4
    graph = sound(lambda: Attention(kernel=kernel, bias=place), TOKENS)
    heads = heads_of(graph)
    assert only(graph, "table", 1) is heads and not on(graph, "table", 0)


def test_multihead_attention_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
            self.up, self.down, self.head = nn.Linear(12, 7), nn.Linear(7, 12), nn.Linear(12, 2)
            self.embed, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)

        def forward(self, x):
            x = self.embed(x)
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return self.head(x + self.down(self.up(x).relu()))

    graph = sound(Net, TOKENS)
    stream = only(graph, "embed.weight", 0)
    assert (stream.size, stream.blocks) == (12, 1)
    assert only(graph, "attention.in_proj_weight", 1) is stream
    assert [(s.size, s.blocks) for s in on(graph, "attention.in_proj_weight", 0)] == [(12, 3), (12, 3)]
    assert only(graph, "attention.out_proj.weight", 0) is stream
    assert {s.size for s in graph.spaces} == {12, 3, 7}


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_layer(batch_first):
    def make():
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=batch_first, norm_first=True)
        return nn.Sequential(
            nn.Linear(12, 12), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 2)
        )

    graph = sound(make, TOKENS)
    assert sorted((s.size, s.blocks) for s in graph.spaces) == sorted(
        [(12, 1), *[(3, 1), (12, 3), (12, 3), (20, 1)] * 2]
    )


def test_learned_tokens_beside_the_input():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.place = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 6, 12))
            self.embed, self.inner = nn.Linear(12, 12), Attention()

        def forward(self, x):
            x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.place
            return self.inner(x)[:, 0]

    graph = sound(Net, TOKENS)
    stream = only(graph, "token", 2)
    assert (stream.size, stream.blocks) == (12, 1) and only(graph, "place", 2) is stream
    assert not on(graph, "place", 1)


def test_linear_attention_and_talking_heads():
    class Net(nn.Module):
        def __init__(self, talking):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
            self.mix, self.proj, self.talking = nn.Linear(3, 3), nn.Linear(12, 2), talking

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (m(x).view(b, t, 3, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
            if self.talking:
                score = self.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                y = score.softmax(-1) @ v
            else:
                y = q.softmax(-1) @ (k.softmax(-2).mT @ v)
            return self.proj(y.transpose(1, 2).reshape(b, t, 12))

    heads_of(sound(lambda: Net(False), TOKENS))
    graph = sound(lambda: Net(True), TOKENS)
    before, after = only(graph, "mix.weight", 1), only(graph, "mix.weight", 0)
    assert before is not after
    assert only(graph, "q.weight", 0).parents == (before.id,) and only(graph, "v.weight", 0).parents == (after.id,)


def test_halo_attention():
    """timm's relative logits: padding, flattening and slicing, in windows."""
    from timm.layers.halo_attn import HaloAttn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.attention = nn.Conv2d(3, 8, 1), HaloAttn(8, num_heads=2, block_size=4, halo_size=1)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.attention(self.stem(x)).mean((2, 3)))

    graph = sound(Net, (torch.randn(1, 3, 8, 8),))
    query, value = only(graph, "attention.q.weight", 0), only(graph, "head.weight", 1)
    assert query.size == 8 and value.size == 8
    assert (value.blocks, len(value.parents)) == (2, 1)
    inner = only(graph, "attention.pos_embed.height_rel", 1)
    assert (inner.size, inner.blocks) == (4, 1)
    # four queries see six keys: of eleven relative places nine are read, in order
    (unread,) = on(graph, "attention.pos_embed.height_rel", 0)
    assert unread.size == 2


def test_window_attention():
    """Windows rolled and cut out of the picture, with timm's layers."""
    from timm.models.swin_transformer import SwinTransformerBlock

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
            self.block = SwinTransformerBlock(8, (8, 8), num_heads=2, window_size=4, shift_size=2)

        def forward(self, x):
            return self.head(self.block(self.embed(x)))

    graph = sound(Net, (torch.randn(1, 8, 8, 5),))
    heads = only(graph, "block.attn.relative_position_bias_table", 1)
    assert (heads.size, heads.blocks) == (2, 1)
    assert [s.parents for s in on(graph, "block.attn.qkv.weight", 0)] == [(heads.id,)] * 2
    assert only(graph, "embed.weight", 0) is only(graph, "head.weight", 1)


def test_mixture_of_experts():
    class Net(nn.Module):
        def __init__(self, stacked):
            super().__init__()
            self.gate, self.stacked = nn.Linear(12, 4), stacked
            if stacked:
                self.up, self.down = nn.Parameter(torch.randn(4, 12, 7)), nn.Parameter(torch.randn(4, 7, 3))
            else:
                self.experts = nn.ModuleList(
                    nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3)) for _ in range(4)
                )

        def forward(self, x):
            x = x.flatten(0, 1)
            weight = self.gate(x).softmax(-1)
            if self.stacked:
                y = torch.einsum("nd,edh->neh", x, self.up).relu()
                return torch.einsum("neh,eho,ne->no", y, self.down, weight)
            out = torch.zeros(len(x), 3, dtype=x.dtype)
            for i, expert in enumerate(self.experts):
                chosen = weight[:, i] > 0.2
                out[chosen] += expert(x[chosen]) * weight[chosen, i : i + 1]
            return out

    graph = sound(lambda: Net(True), TOKENS)
    experts = only(graph, "gate.weight", 0)
    assert (experts.size, experts.blocks) == (4, 1)
    graph = sound(lambda: Net(False), TOKENS)
    assert sum(s.size == 7 for s in graph.spaces) == 4
