"""Classifiers with different classes in one head: `merge --heads both`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
)

import mergeid
from mergeid.errors import MergeidError

BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def edit(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **fields}))


def lively(net: nn.Module, seed: int) -> nn.Module:
    """Biases, norms and statistics that are not those of a fresh network, and logits of some size."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return net.eval()


def with_head_of(other: nn.Module, net: nn.Module, head: str) -> nn.Module:
    """`net` with the trunk of another."""
    trunk = {k: v for k, v in other.state_dict().items() if not k.startswith(head)}
    assert set(net.load_state_dict(trunk, strict=False).missing_keys) == {f"{head}.weight", f"{head}.bias"}
    return net


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 160, 160, generator=torch.Generator().manual_seed(5))


def timm_pair(folder: Path, name: str, head: str) -> tuple[nn.Module, nn.Module]:
    """a, and b: a's trunk with another head, its neurons in another order."""
    a = lively(timm.create_model(name, num_classes=5), 0)
    b = with_head_of(a, lively(timm.create_model(name, num_classes=7), 1), head).eval()
    save_for_hf(a, folder / "a", safe_serialization=True, model_config={"label_names": list("vwxyz")})
    save_for_hf(b, folder / "b0", safe_serialization=True, model_config={"label_names": list("zabcdef")})
    mergeid.scramble(folder / "b0", output=folder / "b", seed=1)
    moved = load_file(folder / "b" / "model.safetensors")
    assert not torch.equal(moved[f"{head}.weight"], b.state_dict()[f"{head}.weight"])
    np.savez(folder / "x.npz", x=images().numpy())
    return a, b


@pytest.mark.parametrize(("name", "head"), [("test_resnet", "fc"), ("test_vit", "head")])
def test_a_permuted_copy_with_another_head(tmp_path: Path, name: str, head: str) -> None:
    """Each block of columns is what its own model says, without data and with, as plain timm loads it."""
    a, b = timm_pair(tmp_path, name, head)
    x = images(4)
    with torch.no_grad():
        wanted = torch.cat([a(x), b(x)], 1)
    every = str(tmp_path / "x.npz")
    for how in ({}, {"data": every}, {"data": f"a={every},b={every}", "repair": "solve"}):
        done = mergeid.merge(tmp_path / "a", tmp_path / "b", heads="both", output=tmp_path / "m", force=True, **how)
        assert done.verdict == "match"
        with torch.no_grad():
            net = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
            torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-4)
    config = config_of(tmp_path / "m")
    assert config["num_classes"] == 12
    assert config["label_names"] == [*"vwxy", "z (a)", "z (b)", *"abcdef"]
    record = json.loads((tmp_path / "m" / "mergeid.json").read_text())
    assert record["heads"] == {"tensors": [f"{head}.weight", f"{head}.bias"], "classes": [5, 7]}


def bert(folder: Path, kind: Any, seed: int, like: nn.Module | None = None, **fields: Any) -> Any:
    torch.manual_seed(seed)
    net = lively(kind(BertConfig(**BERT, **fields)), seed)
    if like is not None:
        with_head_of(like, net, "classifier")
    net.save_pretrained(folder)
    return net.eval()


def words(folder: Path, count: int = 32) -> dict[str, Tensor]:
    """Sentences of different lengths, padded."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 99, (count, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(4, 13, (count, 1), generator=generator)).long()
    np.savez(folder / "x.npz", input_ids=ids.numpy(), attention_mask=mask.numpy())
    return {"input_ids": ids[:4], "attention_mask": mask[:4]}


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        (BertForSequenceClassification, AutoModelForSequenceClassification),
        (BertForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_a_permuted_classifier_of_sentences_or_words(tmp_path: Path, kind: Any, auto: Any) -> None:
    """B has no names for its classes; transformers loads the result, and knows the names."""
    a = bert(tmp_path / "a", kind, 0, id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    b = bert(tmp_path / "b0", kind, 1, a, num_labels=2)
    mergeid.scramble(tmp_path / "b0", output=tmp_path / "b", seed=1)
    batch = words(tmp_path)
    with torch.no_grad():
        wanted = torch.cat([a(**batch).logits, b(**batch).logits], -1)
    every = str(tmp_path / "x.npz")
    for how in ({}, {"data": every, "repair": "solve"}, {"data": f"a={every},b={every}"}):
        mergeid.merge(tmp_path / "a", tmp_path / "b", heads="both", output=tmp_path / "m", force=True, **how)
        net = auto.from_pretrained(tmp_path / "m")
        with torch.no_grad():
            torch.testing.assert_close(net(**batch).logits, wanted, rtol=0, atol=1e-4)
    assert net.config.id2label == {0: "x", 1: "y", 2: "z", 3: "LABEL_3", 4: "LABEL_4"}
    assert net.config.label2id == {v: k for k, v in net.config.id2label.items()}


HALVES = ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(found.data / 16, dtype=torch.float32)[order].reshape(-1, 1, 8, 8)
    return F.interpolate(x, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1) * 2 - 1, torch.tensor(found.target)[
        order
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks from different seeds: a knows the digits 0 to 5, b the others; and inputs of each task."""
    folder = tmp_path_factory.mktemp("trained")
    x, y = digits()
    for seed, (letter, half) in enumerate(zip("ab", HALVES, strict=True)):
        torch.manual_seed(seed)
        net = timm.create_model("test_resnet", num_classes=len(half))
        mine = torch.isin(y[:900], torch.tensor(half))
        inputs, targets = x[:900][mine], y[:900][mine] - half[0]
        optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
        for _ in range(50):
            some = torch.randint(len(inputs), (64,))
            optimiser.zero_grad()
            F.cross_entropy(net(inputs[some]), targets[some]).backward()
            optimiser.step()
        save_for_hf(net.eval(), folder / letter, safe_serialization=True)
        own = x[900:1300][torch.isin(y[900:1300], torch.tensor(half))]
        np.savez(folder / f"{letter}.npz", x=own[:150].numpy())
    return folder


def accuracy(net: nn.Module) -> tuple[float, ...]:
    """Of each task among its own classes, then of all among all."""
    x, y = (t[1300:] for t in digits())
    with torch.no_grad():
        said = net(x)
    own = []
    for half in HALVES:
        mine = torch.isin(y, torch.tensor(half))
        own.append(float((said[mine][:, half].argmax(1) + half[0] == y[mine]).float().mean()))
    return *own, float((said.argmax(1) == y).float().mean())


@pytest.mark.slow
def test_trained_apart_on_different_classes(trained: Path, tmp_path: Path) -> None:
    """Solved with each task's own inputs, the merge is better at both tasks than the matched one, and nearly as good as
    the networks; each example towards its own model also tells the tasks apart, where the mean does worse."""
    data = f"a={trained}/a.npz,b={trained}/b.npz"
    found = {}
    for way, how in {
        "matched": {"match": "always", "repair": "bn"},
        "own": {"repair": "solve"},
        "mean": {"repair": "solve", "target": "mean"},
        "auto": {},
    }.items():
        done = mergeid.merge(
            trained / "a", trained / "b", heads="both", data=data, output=tmp_path / way, force=True, **how
        )
        assert len(done.comparison["outputs"]) == (2 if way == "mean" else 1)
        found[way] = accuracy(timm.create_model(f"local-dir:{tmp_path / way}", pretrained=True).eval())
    for way in ("own", "mean", "auto"):
        assert min(found[way][:2]) > 0.95
        assert all(ours > theirs for ours, theirs in zip(found[way], found["matched"], strict=True))
    assert found["own"][2] > 0.93
    assert found["own"][2] > found["mean"][2]
