"""With data: models that are never whole in memory, their activations on disk, give what the models in memory give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_transformers import configs

import mergeid
from mergeid.basics import when_asked
from mergeid.evidence import evidence, spool
from mergeid.models import load
from mergeid.stages import repair

TEXTS = [f"the {i} quick foxes {i * 7 % 5} jump over {i * i % 11} lazy dogs" for i in range(24)]
KINDS = ("LlamaForCausalLM", "BertForMaskedLM")


def pair(name: str, folder: Path) -> tuple[Path, Path]:
    """A network, and another that has its neurons in another order and noise on all weights."""
    torch.manual_seed(0)
    config = {k: v for k, v in configs()[name].items() if k not in ("model_type", "architectures")}
    kind = getattr(transformers, name)
    net = kind(kind.config_class(**config))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    net.save_pretrained(folder / "a")
    mergeid.scramble(folder / "a", output=folder / "b", seed=1)
    file = folder / "b" / "model.safetensors"
    state = load_file(file)
    noisy = {k: v + 0.05 * v.std() * torch.randn_like(v) if v.dim() > 1 else v for k, v in state.items()}
    save_file(noisy, file, metadata={"format": "pt"})
    return folder / "a", folder / "b"


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for anything."""
    monkeypatch.setattr(load, "LARGEST_HELD", 0)
    monkeypatch.setattr(evidence, "SUMS", 0)
    monkeypatch.setattr(when_asked, "SMALL", 0)
    monkeypatch.setattr(when_asked, "ROOM", 0)


@pytest.mark.parametrize("name", KINDS)
def test_decisions_and_tensors_are_those_of_the_whole_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair(name, tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (24, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[::3, 9:] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "data.safetensors")
    how: dict[str, Any] = {"data": tmp_path / "data.safetensors", "batch_size": 7}
    found, states = [], []
    for where in ("whole", "pieces"):
        if where == "pieces":
            small(monkeypatch)
        found.append(json.loads(json.dumps(mergeid.plan(a, b, **how).to_json())))
        out = tmp_path / where
        mergeid.merge(a, b, output=out, repair="none", force=True, **how)
        states.append(load_file(out / "model.safetensors"))
    one, two = (f["spaces"] for f in found)
    assert [s["decision"] for s in one] == [s["decision"] for s in two] and any(s["decision"] == "match" for s in one)
    for x, y in zip(one, two, strict=True):
        for key, value in x.items():
            if isinstance(value, float):
                assert y[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (x["label"], key)
    assert states[0].keys() == states[1].keys()
    assert all(torch.allclose(v, states[1][k], atol=1e-6) for k, v in states[0].items())


CASES = [
    ("solve", "LlamaForCausalLM"), ("solve", "BertForMaskedLM"), ("solve", "GPT2LMHeadModel"),
    ("repair", "LlamaForCausalLM"), ("auto", "LlamaForCausalLM"),
    pytest.param("solve+polish", "LlamaForCausalLM", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "name"), CASES)
def test_models_on_demand_are_repaired_and_solved_as_models_in_memory_are(
    stage: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair(name, tmp_path)
    ids = torch.randint(3, 90, (72, 9), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "data.safetensors")
    how: dict[str, Any] = {"data": tmp_path / "data.safetensors", "refuse_above": float("inf"), "force": True}
    for where in ("whole", "pieces"):
        if where == "pieces":
            small(monkeypatch)
        if where == "pieces" and stage == "solve":  # one weight at a time is all that a solve holds
            monkeypatch.setattr(repair, "held", lambda net: pytest.fail("the whole network was held"))
        mergeid.merge(a, b, output=tmp_path / where, repair=stage, **how)
    one, two = (load_file(tmp_path / where / "model.safetensors") for where in ("whole", "pieces"))
    assert all(torch.allclose(v, two[k], rtol=1e-3, atol=1e-3 * float(v.abs().max())) for k, v in one.items())


def test_rows_come_back_as_they_went(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeid.evidence.activations import Rows

    for most, exact in ((1 << 30, True), (0, False)):
        monkeypatch.setattr(spool, "MOST", most)
        store = spool.Spool(1000)
        given = {}
        for i in range(6):
            key = (f"s{i % 2}", i % 3)
            rows = [Rows(torch.randn(5 + i, 7), torch.arange(5 + i)) for _ in range(2)]
            store.put(key, *rows)
            given.setdefault(key, []).append(rows)
        assert store.places == list(given)
        for key, wanted in given.items():
            for (a, b), (x, y) in zip(store.rows(key), wanted, strict=True):
                for one, two in ((a, x), (b, y)):
                    assert torch.equal(one.example, two.example)
                    assert torch.equal(one.values, two.values if exact else two.values.bfloat16().float())
