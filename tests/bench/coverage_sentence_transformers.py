"""sentence-transformers for the coverage table: its modules behind an encoder, and whole pipelines, from tiny local
configurations. Token embeddings are returned beside the sentence's, and count."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from coverage_live import Draw, Live, built, by_prefix
from torch import Tensor, nn

WORDS = 40
WIDTH = 24
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
SMALL |= {"max_position_embeddings": 16}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "xlm-roberta": SMALL,
    "mpnet": SMALL,
    "electra": {**SMALL, "embedding_size": 16},
    "albert": {**SMALL, "embedding_size": 16},
    "camembert": SMALL,
    "distilbert": {"max_position_embeddings": 16, "dim": WIDTH, "n_layers": 2, "n_heads": 3, "hidden_dim": 40},
    "modernbert": {
        **SMALL,
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "qwen3": {**SMALL, "num_key_value_heads": 3, "head_dim": 8},
    "t5": {"d_model": WIDTH, "num_layers": 2, "num_heads": 3, "d_kv": 8, "d_ff": 40},
}


@cache
def _folder(kind: str) -> str:
    """A checkpoint with random weights and a tokenizer of a few words."""
    from transformers import AutoConfig, AutoModel, BertTokenizerFast, T5EncoderModel

    folder = Path(tempfile.mkdtemp(prefix="coverage"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS - 5))]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = AutoConfig.for_model(kind, vocab_size=WORDS, pad_token_id=0, **ENCODERS[kind])
    torch.manual_seed(0)
    model = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)
    model.save_pretrained(folder)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def _transformer(kind: str, **options: Any) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Transformer

    return Transformer(_folder(kind), **options)


def _tokens(g: torch.Generator, n: int) -> dict[str, Tensor]:
    """Sentences of different lengths."""
    mask = torch.ones(n, 9, dtype=torch.long)
    for i in range(n):
        mask[i, 9 - i % 3 :] = 0
    ids = torch.randint(5, WORDS, (n, 9), generator=g) * mask
    return {"input_ids": ids, "attention_mask": mask, "sentence_lengths": mask.sum(1)}


def _whole(modules: Sequence[nn.Module], lengths: bool = False) -> tuple[nn.Module, Draw]:
    from sentence_transformers import SentenceTransformer

    def draw(g: torch.Generator, n: int) -> dict[str, Any]:
        batch = _tokens(g, n)
        return {"input": batch if lengths else {k: v for k, v in batch.items() if k != "sentence_lengths"}}

    return SentenceTransformer(modules=list(modules), device="cpu"), draw


def _parts(name: str) -> Any:
    from sentence_transformers.sentence_transformer import modules

    return getattr(modules, name)


def _pooled(kind: str, *more: Callable[[], nn.Module], mode: Any = "mean", **options: Any) -> tuple[nn.Module, Draw]:
    encoder = _transformer(kind, **options)
    return _whole([encoder, _parts("Pooling")(WIDTH, pooling_mode=mode), *(make() for make in more)])


def _words() -> nn.Module:
    """Embeddings of words with a tokenizer of its own."""
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    table = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0))
    tokenizer = WhitespaceTokenizer([f"w{i}" for i in range(WORDS)])
    return _parts("WordEmbeddings")(tokenizer, table.numpy(), update_embeddings=True)


def _static(sparse: bool) -> tuple[nn.Module, Draw]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(_folder("bert")) / "tokenizer.json"))
    if sparse:
        from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
        from transformers import AutoTokenizer

        model = SparseStaticEmbedding(AutoTokenizer.from_pretrained(_folder("bert")), weight=torch.rand(WORDS))
        return model, lambda g, n: {"features": _tokens(g, n)}
    table = torch.randn(WORDS, WIDTH)
    model = nn.Sequential(_parts("StaticEmbedding")(tokenizer, embedding_weights=table), _parts("Dense")(WIDTH, 8))

    def draw(g: torch.Generator, n: int) -> dict[str, Any]:
        ids = torch.randint(0, WORDS, (5 * n,), generator=g)
        return {"input": {"input_ids": ids, "offsets": torch.arange(n) * 5}}

    return model, draw


def _bow() -> tuple[nn.Module, Draw]:
    vocabulary = [f"w{i}" for i in range(WORDS)]
    model = nn.Sequential(_parts("BoW")(vocabulary, {}), _parts("Dense")(WORDS, 12), _parts("Dense")(12, 8))

    def draw(g: torch.Generator, n: int) -> dict[str, Any]:
        return {"input": {"sentence_embedding": torch.rand(n, WORDS, generator=g)}}

    return model[1:], draw


class _Router(nn.Module):
    """Queries go one way, documents another."""

    def __init__(self) -> None:
        super().__init__()
        dense, router = _parts("Dense"), _parts("Router")
        self.encoder, self.pool = _transformer("bert"), _parts("Pooling")(WIDTH)
        self.router = router.for_query_document([dense(WIDTH, 12), dense(12, 8)], [dense(WIDTH, 8)])

    def forward(self, features: dict[str, Tensor]) -> Any:
        pooled = self.pool(self.encoder(features))["sentence_embedding"]
        return [
            self.router({"sentence_embedding": pooled}, task=t)["sentence_embedding"] for t in ("query", "document")
        ]


def _cross(kind: str) -> tuple[nn.Module, Draw]:
    from sentence_transformers import CrossEncoder
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(kind, vocab_size=WORDS, pad_token_id=0, num_labels=2, **ENCODERS[kind])
    folder = tempfile.mkdtemp(prefix="coverage")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (Path(folder) / file).write_bytes((Path(_folder("bert")) / file).read_bytes())
    model = CrossEncoder(folder, device="cpu")
    return model, lambda g, n: {"input": {k: v for k, v in _tokens(g, n).items() if k != "sentence_lengths"}}


def _splade() -> tuple[nn.Module, Draw]:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
    from transformers import AutoConfig, AutoModelForMaskedLM

    folder = tempfile.mkdtemp(prefix="coverage")
    config = AutoConfig.for_model("bert", vocab_size=WORDS, pad_token_id=0, **SMALL)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (Path(folder) / file).write_bytes((Path(_folder("bert")) / file).read_bytes())
    model = SparseEncoder(modules=[MLMTransformer(folder), SpladePooling("max")], device="cpu")
    return model, lambda g, n: {"input": {k: v for k, v in _tokens(g, n).items() if k != "sentence_lengths"}}


def _sparse_auto_encoder() -> tuple[nn.Module, Draw]:
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    model = nn.Sequential(_transformer("bert"), _parts("Pooling")(WIDTH), SparseAutoEncoder(WIDTH, 32, k=6, k_aux=8))
    return model, lambda g, n: {"input": {k: v for k, v in _tokens(g, n).items() if k != "sentence_lengths"}}


def _dense(width: int, *, act: nn.Module | None = None, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: _parts("Dense")(WIDTH, width, bias=bias, activation_function=act or nn.Tanh())


def _weighted() -> tuple[nn.Module, Draw]:
    encoder = _transformer("bert", config_kwargs={"output_hidden_states": True})
    layers = _parts("WeightedLayerPooling")(WIDTH, num_hidden_layers=2, layer_start=1)
    return _whole([encoder, layers, _parts("Pooling")(WIDTH)])


MODELS: dict[str, Callable[[], tuple[nn.Module, Draw]]] = {
    **{f"Transformer/{kind}": (lambda kind=kind: _pooled(kind)) for kind in ENCODERS},
    **{
        f"Pooling/{mode}": (lambda mode=mode: _pooled("bert", mode=mode))
        for mode in ("cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    },
    "Pooling/several": lambda: _whole(
        [_transformer("bert"), _parts("Pooling")(WIDTH, ("mean", "max")), _parts("Dense")(2 * WIDTH, 8)]
    ),
    "Dense": lambda: _pooled("bert", _dense(16), lambda: _parts("Dense")(16, 8)),
    "Dense/no_bias": lambda: _pooled("mpnet", _dense(16, bias=False, act=nn.Identity())),
    "LayerNorm": lambda: _pooled("bert", _dense(16), lambda: _parts("LayerNorm")(16)),
    "Normalize": lambda: _pooled("bert", _dense(16), lambda: _parts("Normalize")()),
    "Dropout": lambda: _pooled("bert", lambda: _parts("Dropout")(0.1), _dense(8)),
    "WeightedLayerPooling": _weighted,
    "CNN": lambda: _whole(
        [_words(), _parts("CNN")(WIDTH, out_channels=6, kernel_sizes=[1, 3, 5]), _parts("Pooling")(18)], lengths=True
    ),
    "LSTM": lambda: _whole([_words(), _parts("LSTM")(WIDTH, 10, num_layers=2), _parts("Pooling")(20)], lengths=True),
    "LSTM/one_way": lambda: _whole(
        [_words(), _parts("LSTM")(WIDTH, 10, bidirectional=False), _parts("Pooling")(10)], lengths=True
    ),
    "WordEmbeddings": lambda: _whole(
        [_words(), _parts("Pooling")(WIDTH), _dense(12)(), _parts("Dense")(12, 8)], lengths=True
    ),
    "WordWeights": lambda: _whole(
        [
            _words(),
            _parts("WordWeights")([f"w{i}" for i in range(WORDS)], {f"w{i}": 0.1 * i for i in range(WORDS)}),
            _parts("Pooling")(WIDTH),
            _dense(12)(),
            _parts("Dense")(12, 8),
        ],
        lengths=True,
    ),
    "BoW": _bow,
    "StaticEmbedding": lambda: _static(False),
    "SparseStaticEmbedding": lambda: _static(True),
    "Router": lambda: (_Router(), lambda g, n: {"features": {**_tokens(g, n)}}),
    "CrossEncoder": lambda: _cross("bert"),
    "CrossEncoder/electra": lambda: _cross("electra"),
    "CrossEncoder/modernbert": lambda: _cross("modernbert"),
    "SpladePooling": _splade,
    "SparseAutoEncoder": _sparse_auto_encoder,
}
"""By the module that the pipeline is about."""


def names() -> list[str]:
    import sentence_transformers  # noqa: F401  # before the bench forks

    return list(MODELS)


def families() -> dict[str, str]:
    return by_prefix(MODELS)


def make(name: str) -> Live:
    frozen = "one number for every word of the vocabulary" if name == "SparseStaticEmbedding" else ""
    return built(MODELS, name, frozen)
