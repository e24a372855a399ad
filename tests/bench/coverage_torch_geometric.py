"""torch_geometric for the coverage table: its models, convolutions, pooling and normalisation layers in small networks.

What needs compiled extensions (torch_cluster, torch_sparse, torch_spline_conv) is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coverage_live import Draw, bench_of
from torch import Tensor, nn

NODES = 10
"""Of one graph; every example adds one."""
Maker = Callable[[], tuple[nn.Module, Draw]]


def _ring(n: int) -> Tensor:
    """Edges [2, E] of n graphs side by side: a ring each, with some chords, both ways."""
    one = [(i, (i + 1) % NODES) for i in range(NODES)] + [(i, (i + 3) % NODES) for i in range(0, NODES, 2)]
    edges = [(a + k * NODES, b + k * NODES) for k in range(n) for a, b in one]
    both = sorted([*edges, *((b, a) for a, b in edges)], key=lambda e: (e[1], e[0]))  # by where they end
    return torch.tensor(both).T.contiguous()


def _features(g: torch.Generator, n: int, width: int = 6) -> Tensor:
    return torch.randn(n * NODES, width, generator=g)


def _graph(g: torch.Generator, n: int) -> dict[str, Tensor]:
    return {"x": _features(g, n), "edge_index": _ring(n)}


def _with_edges(name: str, width: int | None) -> Draw:
    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        batch = _graph(g, n)
        shape = (batch["edge_index"].shape[1], *(() if width is None else (width,)))
        return {**batch, name: torch.rand(shape, generator=g)}

    return draw


def _batched(draw: Draw) -> Draw:
    return lambda g, n: {**draw(g, n), "batch": torch.arange(n).repeat_interleave(NODES)}


def _ready(model: nn.Module, draw: Draw) -> None:
    """Lazy layers learn their widths."""
    with torch.no_grad():
        model(**draw(torch.Generator().manual_seed(0), 2))


class Two(nn.Module):
    """Two layers of one kind with an activation between them, and a linear head."""

    def __init__(self, layer: Callable[[int, int], nn.Module], hidden: int = 12, out: int | None = None) -> None:
        super().__init__()
        self.first, self.second = layer(6, 8), layer(out or 8, hidden)
        self.head = nn.LazyLinear(3)

    def forward(self, **inputs: Tensor) -> Tensor:
        x = self.first(**inputs).relu()
        return self.head(self.second(**{**inputs, "x": x}).relu())


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, takes: str) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.conv, self.norm, self.head, self.takes = GCNConv(6, 8), norm, nn.Linear(8, 3), takes

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.conv(x, edge_index)
        more = {"batch": (batch,), "edges": (edge_index,), "nothing": ()}[self.takes]
        return self.head(self.norm(x, *more).relu())


class Pooled(nn.Module):
    """A graph's neurons are read as one vector."""

    def __init__(self, pool: Callable[..., Any], takes: str, width: int = 8) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.conv, self.head, self.takes = GCNConv(6, 8), nn.Linear(width, 3), takes
        self.pool = pool

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.conv(x, edge_index).relu()
        if self.takes == "edges":
            out = self.pool(x, edge_index, batch=batch)
            from torch_geometric.nn import global_mean_pool

            return self.head(global_mean_pool(out[0], out[3], int(batch.max()) + 1))
        return self.head(self.pool(x, batch))


def _layer(name: str, draw: Draw = _graph, out: int | None = None, **options: Any) -> Maker:
    def make() -> tuple[nn.Module, Draw]:
        import torch_geometric.nn as pyg

        kind = getattr(pyg, name)
        model = Two(lambda i, o: kind(i, o, **options), out=out)
        _ready(model, draw)
        return model, draw

    return make


def _model(name: str, draw: Draw = _graph, *args: Any, **options: Any) -> Maker:
    def make() -> tuple[nn.Module, Draw]:
        import torch_geometric.nn as pyg

        return getattr(pyg, name)(*args, **options), draw

    return make


def _basic(name: str, **options: Any) -> Maker:
    return _model(name, _graph, in_channels=6, hidden_channels=8, num_layers=3, out_channels=4, **options)


def _in_parts(build: Callable[[Callable[[int, int], nn.Module]], Callable[[int, int], nn.Module]]) -> Maker:
    """Layers that take a network."""

    def mlp(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Linear(i, 10), nn.ReLU(), nn.Linear(10, o))

    def make() -> tuple[nn.Module, Draw]:
        return Two(build(mlp), out=8), _graph

    def ready() -> tuple[nn.Module, Draw]:
        model, draw = make()
        _ready(model, draw)
        return model, draw

    return ready


def _norm(name: str, takes: str, *args: Any, **options: Any) -> Maker:
    def make() -> tuple[nn.Module, Draw]:
        import torch_geometric.nn as pyg

        return Normed(getattr(pyg, name)(*(args or (8,)), **options), takes), _batched(_graph)

    return make


def _pool(name: str, takes: str, *args: Any, width: int = 8, **options: Any) -> Maker:
    def make() -> tuple[nn.Module, Draw]:
        import torch_geometric.nn as pyg

        found = getattr(pyg, name)
        return Pooled(found(*args, **options) if isinstance(found, type) else found, takes, width), _batched(_graph)

    return make


def _gin() -> Maker:
    def build(mlp: Callable[[int, int], nn.Module]) -> Callable[[int, int], nn.Module]:
        from torch_geometric.nn import GINConv

        return lambda i, o: GINConv(mlp(i, o), train_eps=True)

    return _in_parts(build)


def _edge_conv() -> Maker:
    def build(mlp: Callable[[int, int], nn.Module]) -> Callable[[int, int], nn.Module]:
        from torch_geometric.nn import EdgeConv

        return lambda i, o: EdgeConv(mlp(2 * i, o), aggr="max")

    return _in_parts(build)


def _gine() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import GINEConv

    model = Two(lambda i, o: GINEConv(nn.Sequential(nn.Linear(i, 9), nn.ReLU(), nn.Linear(9, o)), edge_dim=5), out=8)
    draw = _with_edges("edge_attr", 5)
    _ready(model, draw)
    return model, draw


def _nn_conv() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import NNConv

    def layer(i: int, o: int) -> nn.Module:
        return NNConv(i, o, nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, i * o)))

    model, draw = Two(layer), _with_edges("edge_attr", 5)
    _ready(model, draw)
    return model, draw


def _pna(**options: Any) -> Maker:
    degrees = torch.tensor([0, 0, 4, 8, 6, 2])
    return _layer("PNAConv", _graph, aggregators=["mean", "min", "max", "std"], scalers=["identity", "amplification"],
                  deg=degrees, **options)  # fmt: skip


def _relational(name: str, **options: Any) -> Maker:
    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        batch = _graph(g, n)
        return {**batch, "edge_type": torch.arange(batch["edge_index"].shape[1]) % 3}

    return _layer(name, draw, num_relations=3, **options)


class Hetero(nn.Module):
    """Two kinds of nodes; the layer takes dictionaries."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import torch_geometric.nn as pyg

        edges = [("a", "to", "b"), ("b", "from", "a"), ("a", "near", "a")]
        if kind == "HeteroConv":
            self.layer: nn.Module = pyg.HeteroConv({e: pyg.SAGEConv((6, 6), 8) for e in edges}, aggr="sum")
        else:
            self.layer = getattr(pyg, kind)(6, 8, (["a", "b"], edges), heads=2)
        self.out = pyg.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor, edge_index: Tensor) -> Tensor:
        edges = {("a", "to", "b"): edge_index, ("b", "from", "a"): edge_index, ("a", "near", "a"): edge_index}
        found = self.layer({"a": a, "b": b}, edges)
        return self.out(found["a"].relu()) + self.out(found["b"].relu())


def _hetero(kind: str) -> Maker:
    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        return {"a": _features(g, n), "b": _features(g, n), "edge_index": _ring(n)}

    return lambda: (Hetero(kind), draw)


class Molecule(nn.Module):
    """A model of atoms: numbers and places."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, pos: Tensor, edge_index: Tensor, batch: Tensor) -> Any:
        return self.model(z, pos, batch)


class AllPairs(nn.Module):
    """Edges and distances between all atoms of a molecule."""

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        same = batch[:, None] == batch[None, :]
        edges = (same & ~torch.eye(len(batch), dtype=torch.bool)).nonzero().T
        return edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=-1)


def _atoms(g: torch.Generator, n: int) -> dict[str, Tensor]:
    return {
        "z": torch.randint(1, 9, (n * NODES,), generator=g),
        "pos": 2 * torch.randn(n * NODES, 3, generator=g),
        "batch": torch.arange(n).repeat_interleave(NODES),
    }


def _schnet() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import SchNet

    return SchNet(12, 10, 2, 7, cutoff=10.0, interaction_graph=AllPairs()), _atoms


class Linked(nn.Module):
    """Scores of pairs of nodes, from an encoder."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import torch_geometric.nn as pyg

        self.name = name
        encoder = pyg.GCN(6, 8, 2, 8 if name != "VGAE" else 10)
        self.model = pyg.GAE(encoder) if name == "GAE" else encoder
        self.head = pyg.MLP([8, 8, 1], norm="layer_norm")

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        z = self.model.encode(x, edge_index) if self.name == "GAE" else self.model(x, edge_index)
        pairs = (
            self.model.decode(z, edge_index) if self.name == "GAE" else (z[edge_index[0]] * z[edge_index[1]]).sum(-1)
        )
        return pairs, self.head(z)


def _attentive() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import AttentiveFP

    model = AttentiveFP(6, 8, 3, edge_dim=5, num_layers=2, num_timesteps=2)
    return model, _batched(_with_edges("edge_attr", 5))


def _deep_gcn() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import DeepGCNLayer, GENConv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.layers = nn.ModuleList(
                DeepGCNLayer(GENConv(8, 8, aggr="softmax", learn_t=True), nn.LayerNorm(8), nn.ReLU(), block=block)
                for block in ("res+", "res", "dense")
            )
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = layer(x, edge_index)
            return self.head(x)

    return Net(), _graph


def _jumping(mode: str, width: int) -> Maker:
    def make() -> tuple[nn.Module, Draw]:
        from torch_geometric.nn import GCNConv, JumpingKnowledge

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([GCNConv(6, 8), GCNConv(8, 8)])
                self.jump, self.head = JumpingKnowledge(mode, 8, 2), nn.Linear(width, 3)

            def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
                seen = []
                for layer in self.layers:
                    x = layer(x, edge_index).relu()
                    seen.append(x)
                return self.head(self.jump(seen))

        return Net(), _graph

    return make


def _linkx() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import LINKX

    return LINKX(30, 6, 8, 3, num_layers=2), lambda g, n: {"x": _features(g, 3), "edge_index": _ring(3)}


def _lightgcn() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import LightGCN

    return LightGCN(30, 8, 2), lambda g, n: {"edge_index": _ring(3)}


def _meta_layer() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import MetaLayer

    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6 + 6 + 5 + 4, 9), nn.ReLU(), nn.Linear(9, 7))

        def forward(self, src: Tensor, dst: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
            return self.net(torch.cat([src, dst, edge_attr, u[batch]], 1))

    class Node(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6 + 7 + 4, 9), nn.ReLU(), nn.Linear(9, 8))

        def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
            from torch_geometric.utils import scatter

            seen = scatter(edge_attr, edge_index[1], dim=0, dim_size=len(x), reduce="mean")
            return self.net(torch.cat([x, seen, u[batch]], 1))

    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        more = {"u": torch.randn(n, 4, generator=g)}
        return {**_batched(_with_edges("edge_attr", 5))(g, n), **more}

    return MetaLayer(Edge(), Node()), draw


def _graph_unet() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import GraphUNet

    return GraphUNet(6, 8, 3, depth=2, pool_ratios=0.5), _batched(_graph)


def _dense() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import DenseGCNConv, DenseSAGEConv, dense_diff_pool

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.assign, self.last = DenseSAGEConv(6, 8), DenseGCNConv(6, 4), DenseGCNConv(8, 3)

        def forward(self, x: Tensor, adj: Tensor) -> Any:
            x, adj, link, entropy = dense_diff_pool(self.embed(x, adj).relu(), adj, self.assign(x, adj))
            return self.last(x, adj), link, entropy

    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        adjacent = (torch.rand(n, NODES, NODES, generator=g) > 0.6).float()
        return {"x": torch.randn(n, NODES, 6, generator=g), "adj": ((adjacent + adjacent.mT) > 0).float()}

    return Net(), draw


def _sgformer(name: str, **options: Any) -> Maker:
    return _model(name, _batched(_graph), 6, 8, 3, **options)


def _temporal_gat() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import TransformerConv

    model = Two(lambda i, o: TransformerConv(i, o, heads=2, edge_dim=5, beta=True), out=16)
    draw = _with_edges("edge_attr", 5)
    _ready(model, draw)
    return model, draw


def _gps() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import GCNConv, GPSConv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.head = nn.Linear(6, 8), GPSConv(8, GCNConv(8, 8), heads=2), nn.Linear(8, 3)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            return self.head(self.layer(self.first(x), edge_index, batch))

    return Net(), _batched(_graph)


def _gated() -> tuple[nn.Module, Draw]:
    from torch_geometric.nn import GatedGraphConv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = GatedGraphConv(8, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.head(self.layer(x, edge_index))

    return Net(), _graph


_WEIGHTED = _with_edges("edge_weight", None)
MODELS: dict[str, Maker] = {
    "GCN": _basic("GCN"),
    "GCN/batch_norm+jk": _basic("GCN", norm="batch_norm", jk="cat"),
    "GCN/weighted": _model("GCN", _WEIGHTED, 6, 8, 2, 3),
    "GraphSAGE": _basic("GraphSAGE"),
    "GraphSAGE/lstm": _layer("SAGEConv", _graph, aggr="lstm"),
    "GraphSAGE/max+jk": _basic("GraphSAGE", aggr="max", jk="max"),
    "GIN": _basic("GIN"),
    "GAT": _basic("GAT", heads=2),
    "GAT/v2": _basic("GAT", heads=2, v2=True),
    "PNA": _basic("PNA", aggregators=["mean", "max", "std"], scalers=["identity", "attenuation"],
                  deg=torch.tensor([0, 0, 4, 8, 6, 2])),
    "EdgeCNN": _basic("EdgeCNN"),
    "MLP": lambda: (__import__("torch_geometric.nn").nn.MLP([6, 12, 12, 3]), lambda g, n: {"x": _features(g, n)}),
    "AttentiveFP": _attentive,
    "DeepGCNLayer": _deep_gcn,
    "GAE": lambda: (Linked("GAE"), _graph),
    "GraphUNet": _graph_unet,
    "JumpingKnowledge/cat": _jumping("cat", 16),
    "JumpingKnowledge/max": _jumping("max", 8),
    "JumpingKnowledge/lstm": _jumping("lstm", 8),
    "LINKX": _linkx,
    "LightGCN": _lightgcn,
    "LinkPredictor": lambda: (Linked("GCN"), _graph),
    "MetaLayer": _meta_layer,
    "NeuralFingerprint": _model("NeuralFingerprint", _batched(_graph), 6, 8, 3, 2),
    "PMLP": _model("PMLP", _graph, 6, 8, 3, 2),
    "Polynormer": _sgformer("Polynormer", in_dropout=0.0),
    "RECT_L": _model("RECT_L", _WEIGHTED, 6, 8),
    "SGFormer": _sgformer("SGFormer"),
    "SchNet": _schnet,
    "dense_diff_pool": _dense,
    "HeteroConv": _hetero("HeteroConv"),
    "HGTConv": _hetero("HGTConv"),
    "HANConv": _hetero("HANConv"),
    "APPNP": lambda: _appnp(),
    "ARMAConv": _layer("ARMAConv", _graph, num_stacks=2, num_layers=2),
    "AntiSymmetricConv": lambda: _same_width("AntiSymmetricConv"),
    "CGConv": lambda: _same_width("CGConv"),
    "ChebConv": _layer("ChebConv", _graph, K=3),
    "ClusterGCNConv": _layer("ClusterGCNConv"),
    "EGConv": _layer("EGConv", _graph, num_heads=2, num_bases=2),
    "EdgeConv": _edge_conv(),
    "FAConv": lambda: _fa_conv(),
    "FiLMConv": _layer("FiLMConv"),
    "GATConv/edge_attr": _layer("GATConv", _with_edges("edge_attr", 5), out=16, heads=2, edge_dim=5),
    "GATv2Conv": _layer("GATv2Conv", _with_edges("edge_attr", 5), out=16, heads=2, edge_dim=5),
    "GATv2Conv/shared": _layer("GATv2Conv", _graph, out=16, heads=2, share_weights=True),
    "GCN2Conv": lambda: _gcn2(),
    "GENConv": _layer("GENConv", _with_edges("edge_attr", 5), edge_dim=5, aggr="softmax", learn_t=True),
    "GENConv/power": _layer("GENConv", _graph, aggr="powermean", learn_p=True),
    "GINConv": _gin(),
    "GINEConv": _gine,
    "GMMConv": _layer("GMMConv", _with_edges("edge_attr", 2), dim=2, kernel_size=3),
    "GPSConv": _gps,
    "GatedGraphConv": _gated,
    "GeneralConv": _layer("GeneralConv", _with_edges("edge_attr", 5), in_edge_channels=5, attention=True, heads=2),
    "GraphConv": _layer("GraphConv", _WEIGHTED),
    "LEConv": _layer("LEConv", _WEIGHTED),
    "MFConv": _layer("MFConv", _graph, max_degree=4),
    "MixHopConv": lambda: _mix_hop(),
    "NNConv": _nn_conv,
    "PNAConv": _pna(),
    "PNAConv/towers": _pna(towers=2, pre_layers=2),
    "PDNConv": _layer("PDNConv", _with_edges("edge_attr", 5), edge_dim=5, hidden_channels=7),
    "RGATConv": _relational("RGATConv"),
    "RGCNConv": _relational("RGCNConv"),
    "RGCNConv/bases": _relational("RGCNConv", num_bases=2),
    "RGCNConv/blocks": _relational("RGCNConv", num_blocks=2),
    "FastRGCNConv": _relational("FastRGCNConv"),
    "ResGatedGraphConv": _layer("ResGatedGraphConv"),
    "SAGEConv/project": _layer("SAGEConv", _graph, project=True, normalize=True),
    "SAGEConv/softmax": _layer("SAGEConv", _graph, aggr="softmax"),
    "SAGEConv/multi": _layer("SAGEConv", _graph, aggr=["mean", "std", "max"]),
    "SAGEConv/median": _layer("SAGEConv", _graph, aggr="median"),
    "SGConv": _layer("SGConv", _WEIGHTED, K=2),
    "SSGConv": _layer("SSGConv", _graph, alpha=0.1, K=2),
    "SuperGATConv": _layer("SuperGATConv", _graph, out=16, heads=2),
    "TAGConv": _layer("TAGConv", _graph, K=2),
    "TransformerConv": _temporal_gat,
    "WLConvContinuous": lambda: _same_width("WLConvContinuous"),
    "BatchNorm": _norm("BatchNorm", "nothing"),
    "DiffGroupNorm": _norm("DiffGroupNorm", "nothing", 8, 3),
    "GraphNorm": _norm("GraphNorm", "batch"),
    "GraphSizeNorm": lambda: (Normed(_pyg("GraphSizeNorm")(), "batch"), _batched(_graph)),
    "InstanceNorm": _norm("InstanceNorm", "batch", 8, affine=True),
    "LayerNorm": _norm("LayerNorm", "batch"),
    "LayerNorm/node": _norm("LayerNorm", "batch", 8, mode="node"),
    "MeanSubtractionNorm": lambda: (Normed(_pyg("MeanSubtractionNorm")(), "batch"), _batched(_graph)),
    "MessageNorm": lambda: (_MessageNorm(), _batched(_graph)),
    "PairNorm": lambda: (Normed(_pyg("PairNorm")(), "batch"), _batched(_graph)),
    "global_add_pool": _pool("global_add_pool", "batch"),
    "global_max_pool": _pool("global_max_pool", "batch"),
    "global_mean_pool": _pool("global_mean_pool", "batch"),
    "SAGPooling": _pool("SAGPooling", "edges", 8, ratio=0.5),
    "TopKPooling": _pool("TopKPooling", "edges", 8, ratio=0.5),
    "ASAPooling": lambda: (_Asap(), _batched(_graph)),
    "AttentionalAggregation": lambda: (_attentional(), _batched(_graph)),
    "Set2Set": lambda: (_aggregated("Set2Set", 16, 8, 2), _batched(_graph)),
    "SortAggregation": lambda: (_aggregated("SortAggregation", 24, k=3), _batched(_graph)),
    "SoftmaxAggregation": lambda: (_aggregated("SoftmaxAggregation", 8, learn=True), _batched(_graph)),
    "LSTMAggregation": lambda: (_aggregated("LSTMAggregation", 8, 8, 8), _batched(_graph)),
    "GRUAggregation": lambda: (_aggregated("GRUAggregation", 8, 8, 8), _batched(_graph)),
    "SetTransformerAggregation": lambda: (
        _aggregated("SetTransformerAggregation", 8, 8, heads=2, layer_norm=True),
        _batched(_graph),
    ),
    "DeepSetsAggregation": lambda: (
        _aggregated("DeepSetsAggregation", 8, nn.Linear(8, 8), nn.Linear(8, 8)),
        _batched(_graph),
    ),
    "EquilibriumAggregation": lambda: (
        _aggregated("EquilibriumAggregation", 5, 8, 5, [6], grad_iter=2),
        _batched(_graph),
    ),
    "GraphMultisetTransformer": lambda: (
        _aggregated("GraphMultisetTransformer", 8, 8, k=3, heads=2),
        _batched(_graph),
    ),
    "MLPAggregation": lambda: (_aggregated("MLPAggregation", 8, 8, 8, NODES, num_layers=1), _batched(_graph)),
    "PowerMeanAggregation": lambda: (_aggregated("PowerMeanAggregation", 8, learn=True), _batched(_graph)),
    "QuantileAggregation": lambda: (_aggregated("QuantileAggregation", 16, [0.3, 0.7]), _batched(_graph)),
    "VariancePreservingAggregation": lambda: (_aggregated("VariancePreservingAggregation", 8), _batched(_graph)),
    "DegreeScalerAggregation": lambda: (
        _aggregated(
            *("DegreeScalerAggregation", 16, ["mean", "max"], ["identity"]), deg=torch.tensor([0, 0, 4, 8])
        ),
        _batched(_graph),
    ),
}  # fmt: skip
"""By the class that the network is about."""


def _pyg(name: str) -> Any:
    import torch_geometric.nn as pyg

    return getattr(pyg, name)


class _Wrapped(nn.Module):
    """A linear layer, layers of one width, a linear head."""

    def __init__(self, layers: list[nn.Module], again: bool = False) -> None:
        super().__init__()
        self.first, self.layers, self.head, self.again = nn.Linear(6, 8), nn.ModuleList(layers), nn.Linear(8, 3), again

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = start = self.first(x)
        for layer in self.layers:
            x = layer(x, start, edge_index) if self.again else layer(x, edge_index)
        return self.head(x)


def _same_width(name: str) -> tuple[nn.Module, Draw]:
    kind = _pyg(name)
    return _Wrapped([kind() if name.startswith("WL") else kind(8) for _ in range(2)]), _graph


def _appnp() -> tuple[nn.Module, Draw]:
    return _Wrapped([_pyg("APPNP")(K=3, alpha=0.1)]), _graph


def _fa_conv() -> tuple[nn.Module, Draw]:
    return _Wrapped([_pyg("FAConv")(8) for _ in range(2)], again=True), _graph


def _gcn2() -> tuple[nn.Module, Draw]:
    return _Wrapped([_pyg("GCN2Conv")(8, 0.1, 0.5, k) for k in (1, 2)], again=True), _graph


def _mix_hop() -> tuple[nn.Module, Draw]:
    model = Two(lambda i, o: _pyg("MixHopConv")(i, o, powers=[0, 1, 2]), out=24)
    _ready(model, _graph)
    return model, _graph


class _MessageNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = _pyg("GCNConv")(6, 8), nn.Linear(6, 8)
        self.norm, self.head = _pyg("MessageNorm")(learn_scale=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(self.norm(self.b(x), self.a(x, edge_index)))


class _Asap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = _pyg("GCNConv")(6, 8), _pyg("ASAPooling")(8, 0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x, _, _, batch, _ = self.pool(self.conv(x, edge_index).relu(), edge_index, batch=batch)
        return self.head(_pyg("global_mean_pool")(x, batch))


def _attentional() -> nn.Module:
    gate = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1))
    return Pooled(_pyg("AttentionalAggregation")(gate, nn.Linear(8, 8)), "batch")


def _aggregated(name: str, width: int, *args: Any, **options: Any) -> nn.Module:
    return Pooled(_pyg(name)(*args, **options), "batch", width)


names, families, make = bench_of(MODELS, "torch_geometric.nn")
