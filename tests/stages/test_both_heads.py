"""Classifiers with different classes in one head: `merge --heads both`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
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
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
)

import mergeid
from mergeid.errors import MergeidError
from mergeid.evaluate.nearness import Panel
from mergeid.models.both_heads import JoinedHead
from mergeid.models.examples import Examples
from mergeid.models.loaded import Loaded, ModuleAdapter
from mergeid.plugins import Architecture

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
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def timm_pair(folder: Path, name: str, head: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """a, and b: a's trunk with another head, its neurons in another order."""
    a = lively(timm.create_model(name, num_classes=5, **options), 0)
    b = with_head_of(a, lively(timm.create_model(name, num_classes=7, **options), 1), head).eval()
    for net, place, labels in ((a, "a", "vwxyz"), (b, "b0", "zabcdef")):
        told = {"label_names": list(labels), "model_args": options}
        save_for_hf(net, folder / place, safe_serialization=True, model_config=told)
    mergeid.scramble(folder / "b0", output=folder / "b", seed=1)
    moved = load_file(folder / "b" / "model.safetensors")
    assert not torch.equal(moved[f"{head}.weight"], b.state_dict()[f"{head}.weight"])
    np.savez(folder / "x.npz", x=images().numpy())
    return a, b


@pytest.mark.parametrize(("name", "head"), [("test_resnet", "fc"), ("test_vit", "head")])
def test_a_permuted_copy_with_another_head(tmp_path: Path, name: str, head: str) -> None:
    """Each block of columns is what its own model says, without data and with, as plain timm loads it."""
    a, b = timm_pair(tmp_path, name, head, **({"img_size": 32} if name == "test_vit" else {}))
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


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[nn.Module], dict[str, Tensor]]:
    """a, b, c of one trunk with heads for 3, 2 and 4 classes, b and c in other orders of neurons; a base."""
    folder = tmp_path_factory.mktemp("sentences")
    a = bert(folder / "a", BertForSequenceClassification, 0, num_labels=3)
    nets = [a]
    for seed, (name, classes) in enumerate({"b": 2, "c": 4}.items(), 1):
        nets.append(bert(folder / f"{name}0", BertForSequenceClassification, seed, a, num_labels=classes))
        mergeid.scramble(folder / f"{name}0", output=folder / name, seed=seed)
    bert(folder / "base", BertForSequenceClassification, 9, num_labels=6)
    return folder, nets, words(folder)


Sentences = tuple[Path, list[nn.Module], dict[str, Tensor]]


def test_more_than_two(sentences: Sentences, tmp_path: Path) -> None:
    folder, nets, batch = sentences
    with torch.no_grad():
        wanted = torch.cat([net(**batch).logits for net in nets], -1)
    x = folder / "x.npz"
    for how in ({}, {"data": f"a={x},b={x},c={x}"}, {"data": str(x), "weights": [1, 0, 0]}):
        done = mergeid.merge([folder / n for n in "abc"], heads="both", output=tmp_path / "m", force=True, **how)
        outputs = (done.comparison or {"outputs": {}})["outputs"].values()
        assert all(abs(far["distance"]) < 1e-9 for far in outputs)
        with torch.no_grad():
            found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")(**batch).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        {"weights": [0.2, 0.8]},
        {"method": "slerp"},
        {"method": "task_arithmetic", "parameters": {"lambda": 0.3}},
        {"dtype": "bfloat16"},
    ],
)
def test_heads_are_no_part_of_an_average(sentences: Sentences, tmp_path: Path, how: dict[str, Any]) -> None:
    """Their rows are copied whatever the weights and the method, and the trunk is what it is without them."""
    folder, _, _ = sentences
    given = {"base": folder / "base"} if how.get("method") == "task_arithmetic" else {}
    models = [folder / "a", folder / "b0"]
    mergeid.merge(models, heads="both", match="never", output=tmp_path / "m", **how, **given)
    mergeid.merge(models, skip=["classifier.*"], match="never", output=tmp_path / "trunk", **how, **given)
    found, trunk, a, b = (
        load_file(p / "model.safetensors") for p in (tmp_path / "m", tmp_path / "trunk", folder / "a", folder / "b0")
    )
    for name, value in found.items():
        if name.startswith("classifier."):
            torch.testing.assert_close(value, torch.cat([a[name], b[name]]).to(value), rtol=0, atol=0)
        else:
            torch.testing.assert_close(value, trunk[name], rtol=0, atol=0)


def test_fine_tunes_of_one_base_need_no_match(sentences: Sentences, tmp_path: Path) -> None:
    """Rows of heads that only one model has are not taken for rows that moved."""
    folder, _, _ = sentences
    done = mergeid.merge(folder / "a", folder / "b0", heads="both", output=tmp_path / "m")
    assert done.verdict == "direct"
    assert any("no model was built" in note for note in done.notes)


def changed(folder: Path, to: Path, **fields: Any) -> Path:
    shutil.copytree(folder, to)
    edit(to, **fields)
    return to


def test_what_cannot_be_joined_is_said_in_a_sentence(sentences: Sentences, tmp_path: Path) -> None:
    folder, nets, _ = sentences
    a, b = folder / "a", folder / "b"
    names = {"id2label": {"0": "x", "1": "y", "2": "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    named, again = changed(a, tmp_path / "named", **names), changed(a, tmp_path / "again", **names)
    torch.manual_seed(0)
    one = bert(tmp_path / "one", BertForSequenceClassification, 0, num_labels=1)
    assert one.classifier.out_features == 1
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(tmp_path / "words")
    several = changed(a, tmp_path / "several", problem_type="multi_label_classification")
    sizes = {k: v for k, v in BERT.items() if k != "vocab_size"}
    DeiTForImageClassificationWithTeacher(
        DeiTConfig(**sizes, num_labels=3, image_size=16, patch_size=8)
    ).save_pretrained(tmp_path / "teacher")
    x = str(folder / "x.npz")
    output = tmp_path / "m"
    for models, how, message in (
        ((named, again), {}, "the same 3 classes.*leave out --heads"),
        ((a, a), {}, "the same 3 classes"),
        ((tmp_path / "one", b), {}, "one .* is not one"),
        ((several, b), {}, "several .* is not one"),
        ((tmp_path / "words", tmp_path / "words"), {}, "words .* is not one"),
        ((tmp_path / "teacher",) * 2, {}, "'cls_classifier' and 'distillation_classifier'; expected a single linear"),
        ((nets[0], nets[1]), {}, "works on files"),
        ((a, b), {"heads": "all"}, "--heads 'all' is not one of both"),
        ((a, b), {"skip": ["class*"]}, "--skip 'class\\*' takes A's head"),
        ((a, b), {"arch": str(a / "config.json")}, "leave out --arch"),
        ((a, b), {"data": x, "method": "fisher"}, "'fisher' weighs"),
        ((a, b), {"data": x, "repair": "solve+polish"}, "give --repair solve"),
        ((a, b), {"base": folder / "base", "method": "task_arithmetic", "as_adapter": 2}, "leave out --heads"),
        ((changed(a, tmp_path / "wrong", id2label={"0": "x", "1": "y"}), b), {}, "has 3 rows, and its config says 2"),
        ((a, b), {"heads": None}, "--heads both"),
    ):
        with pytest.raises(MergeidError, match=message):
            mergeid.merge(*models, output=output, **{"heads": "both", **how})
        assert not output.exists()


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


@pytest.mark.parametrize("owners", [None, (0, 1, 1, 0, 1, 0)])
def test_each_model_is_right_about_its_own_classes(owners: tuple[int, ...] | None) -> None:
    """How far a network is: the Kullback-Leibler divergence from the softmax over one model's own columns, of every
    example's own model, or of each model as an output of its own."""
    classes = (2, 3)
    torch.manual_seed(0)
    a, b, net = (nn.Linear(4, 5) for _ in range(3))
    x = torch.randn(6, 4)
    names = {"weight": "weight"}
    arch, adapter = Architecture("torch", "Linear"), ModuleAdapter()
    example = {"arg0": x[:2], "labels": torch.zeros(2, dtype=torch.long)}
    first = Loaded("a", a, adapter, arch, None, names, example, joined=JoinedHead(("weight",), classes))
    panel = Panel(
        first,
        [a, b],
        shares=[0.5, 0.5],
        examples=Examples([{"arg0": row} for row in x], None, owners),
        batch_size=4,
        device="cpu",
    )
    found = panel.far(net, 0)
    apart = torch.zeros(6, 2)
    with torch.no_grad():
        for i, row in enumerate(x):
            for k, (model, columns) in enumerate(zip((a, b), (slice(0, 2), slice(2, 5)), strict=True)):
                said, other = (m(row)[columns].softmax(-1) for m in (model, net))
                apart[i, k] = (said * (said / other).log()).sum()
    if owners is None:
        assert len(found) == 2
        for far, wanted in zip(found.values(), apart.T, strict=True):
            torch.testing.assert_close(far.rows[0].float(), wanted, rtol=1e-4, atol=1e-6)
    else:
        (far,) = found.values()
        torch.testing.assert_close(
            far.rows[0].float(), apart[torch.arange(6), torch.tensor(owners)], rtol=1e-4, atol=1e-6
        )
    assert all(far.unit == "nats" for far in found.values())
