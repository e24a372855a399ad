"""Classifiers with different classes in the verbs beside `merge`: plans, saved plans, barriers, predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import mergeid
from mergeid.errors import MergeidError

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
CLASSES = {"a": 3, "b": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences with labels of all classes, and two classifiers, of which one knows the first three."""
    folder = tmp_path_factory.mktemp("heads")
    for seed, (name, classes) in enumerate(CLASSES.items()):
        torch.manual_seed(seed)
        net = BertForSequenceClassification(BertConfig(**SMALL, num_labels=classes))
        for parameter in net.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        net.save_pretrained(folder / name)
    generator = np.random.default_rng(0)
    ids = generator.integers(1, 40, (32, 6))
    np.savez(folder / "inputs.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    np.savez(folder / "x.npz", input_ids=ids, attention_mask=np.ones_like(ids), labels=generator.integers(0, 5, 32))
    return folder


def test_a_barrier_of_both_heads_has_the_plain_merge_in_its_middle(work: Path) -> None:
    """Which transformers runs and scores."""
    found = mergeid.barrier(work / "a", work / "b", data=str(work / "x.npz"), heads="both", points=3, batch_size=32)
    mergeid.merge(work / "a", work / "b", heads="both", match="never", output=work / "plain", force=True)
    net = BertForSequenceClassification.from_pretrained(work / "plain").eval()
    with np.load(work / "x.npz") as data, torch.no_grad():
        inputs = {k: torch.from_numpy(data[k]) for k in ("input_ids", "attention_mask")}
        wanted = F.cross_entropy(net(**inputs).logits, torch.from_numpy(data["labels"]))
    assert found.losses[1] == pytest.approx(float(wanted), rel=1e-4)
    with pytest.raises(MergeidError, match="--solve imitates both ends"):
        mergeid.barrier(work / "a", work / "b", data=str(work / "x.npz"), heads="both", solve=True)


def test_a_plan_takes_its_heads_along(work: Path) -> None:
    plan = mergeid.plan(work / "a", work / "b", heads="both", match="always")
    assert plan.settings["heads"] == "both"
    (work / "plan.json").write_text(json.dumps(plan.to_json()))
    mergeid.merge(work / "a", work / "b", plan=work / "plan.json", output=work / "by_plan", force=True)
    mergeid.merge(work / "a", work / "b", heads="both", match="always", output=work / "by_name", force=True)
    ours, theirs = (load_file(work / name / "model.safetensors") for name in ("by_plan", "by_name"))
    assert len(ours["classifier.weight"]) == 5
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(MergeidError, match=r"plan.json was made with --heads both, which is not asked for here"):
        mergeid.align(work / "b", to=work / "a", plan=work / "plan.json", skip=["classifier.*"], output=work / "no")


def test_a_plan_without_both_heads_is_no_plan_for_them(work: Path) -> None:
    plan = mergeid.plan(work / "a", work / "b", skip=["classifier.*"], match="never")
    (work / "skipped.json").write_text(json.dumps(plan.to_json()))
    with pytest.raises(
        MergeidError, match=r"skipped.json was made without --heads both; make one with .* --heads both"
    ):
        mergeid.merge(work / "a", work / "b", heads="both", plan=work / "skipped.json", output=work / "no")


def test_heads_that_are_left_out_may_differ_in_a_prediction(work: Path) -> None:
    found = mergeid.predict(work / "a", work / "b", data=str(work / "inputs.npz"), skip=["classifier.*"])
    assert found.outlooks
    with pytest.raises(MergeidError, match=r"--try compares .* has 3 classes and .* 2; leave it out"):
        mergeid.predict(work / "a", work / "b", data=str(work / "inputs.npz"), skip=["classifier.*"], trial=True)
