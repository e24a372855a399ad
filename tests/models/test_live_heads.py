"""Live modules whose outputs are class logits: they are compared in nats, and measured on labels."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import mergeid
from mergeid.evaluate.nearness import classifying
from mergeid.models.loaded import ModuleAdapter
from mergeid.verbs.load import load

IDS = {"input_ids": torch.arange(12).reshape(2, 6)}
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


@pytest.mark.parametrize("shape", [(5, 3), (4, 6, 3)])
def test_the_loss_is_cross_entropy(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(shape, generator=generator)
    labels = torch.randint(3, shape[:-1], generator=generator)
    labels.view(-1)[1] = -100
    parts = ModuleAdapter().loss(None, out, {"labels": labels})  # type: ignore[arg-type]
    assert parts is not None and parts.loss.shape == (shape[0],)
    for k in range(shape[0]):
        rows, wanted = out[k].reshape(-1, 3), labels[k].reshape(-1)
        kept = wanted != -100
        assert float(parts.loss[k]) == pytest.approx(float(F.cross_entropy(rows[kept], wanted[kept], reduction="sum")))
        assert int(parts.correct[k]) == int((rows.argmax(-1) == wanted)[kept].sum())
        assert int(parts.count[k]) == int(kept.sum())


@pytest.mark.parametrize(
    "labels", [torch.zeros(5), torch.zeros(5, 3).long(), torch.zeros(4).long(), torch.full((5,), 3), None]
)
def test_other_targets_have_no_loss(labels: Tensor | None) -> None:
    assert ModuleAdapter().loss(None, torch.zeros(5, 3), {"labels": labels}) is None  # type: ignore[arg-type]


def test_libraries_know_which_output_holds_logits() -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    bert = transformers.BertConfig(**TINY, max_position_embeddings=16)
    regression = transformers.BertForSequenceClassification(
        transformers.BertConfig(**TINY, max_position_embeddings=16, num_labels=1)
    )
    image = torch.randn(2, 3, 32, 32)
    cases: list[tuple[nn.Module, object, set[str]]] = [
        (llama, IDS, {"logits"}),
        (transformers.BertForSequenceClassification(bert), IDS, {"logits"}),
        (regression, IDS, set()),
        (transformers.BertModel(bert), IDS, set()),
        (timm.create_model("test_byobnet", num_classes=4), image, {""}),
        (timm.create_model("test_byobnet", num_classes=0), image, set()),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), image, set()),  # nobody says so
    ]
    for model, inputs, wanted in cases:
        assert classifying(load(model.eval(), example_inputs=inputs)) == wanted


def pair() -> list[nn.Module]:
    out = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        out.append(timm.create_model("test_byobnet", num_classes=4).eval())
    return out


def test_classifiers_are_compared_in_nats() -> None:
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = mergeid.merge(*pair(), data=list(x), example_inputs=x[:2], repair="none", force=True)
    assert result.comparison is not None and result.comparison["unit"] == "nats"


def test_a_barrier_of_live_modules_is_measured_on_labels() -> None:
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(16) % 4
    a, b = pair()
    data = [{"arg0": image, "labels": label} for image, label in zip(x, y, strict=True)]
    found = mergeid.barrier(a, b, data=data, example_inputs=x[:2], points=3, device="cpu")
    with torch.no_grad():
        ends = [float(F.cross_entropy(m(x), y)) for m in (a, b)]
        right = [float((m(x).argmax(1) == y).double().mean()) for m in (a, b)]
    assert np.allclose([found.losses[0], found.losses[-1]], ends, atol=1e-5)
    assert found.accuracies is not None and [found.accuracies[0], found.accuracies[-1]] == right
