"""A plan that was saved gives what planning again gives, on the models that it was made for and on no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_transformers import configs

import mergeid
from mergeid.errors import MergeidError
from mergeid.models import load
from mergeid.stages import plan as planning
from mergeid.stages.saved_plan import fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, a scrambled copy with noise, examples, and plans of both kinds."""
    at = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = {k: v for k, v in configs()["LlamaForCausalLM"].items() if k not in ("model_type", "architectures")}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    net.save_pretrained(at / "a")
    mergeid.scramble(at / "a", output=at / "b", seed=1)
    file = at / "b" / "model.safetensors"
    noisy = {k: v + 0.05 * v.std() * torch.randn_like(v) if v.dim() > 1 else v for k, v in load_file(file).items()}
    save_file(noisy, file, metadata={"format": "pt"})
    ids = torch.randint(3, 90, (24, 13), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, at / "data.safetensors")
    for name, given in (("plan.json", {}), ("seen.json", {"data": at / "data.safetensors"})):
        (at / name).write_text(json.dumps(mergeid.plan(at / "a", at / "b", **given).to_json()))
    return at


def tensors(where: Path) -> dict[str, torch.Tensor]:
    return load_file(where / "model.safetensors")


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("neurons were compared")


@pytest.fixture
def no_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "decide_from_weights", never)
    monkeypatch.setattr(planning, "decide_from_activations", never)


@pytest.mark.parametrize(("plan", "data"), [("plan.json", False), ("seen.json", False), ("seen.json", True)])
def test_a_saved_plan_is_what_planning_again_finds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str, data: bool
) -> None:
    seen = {"data": folder / "data.safetensors"} if plan == "seen.json" else {}
    again = mergeid.merge(folder / "a", folder / "b", output=tmp_path / "again", repair=False, **seen)
    monkeypatch.setattr(planning, "decide_from_weights", never)
    monkeypatch.setattr(planning, "decide_from_activations", never)
    given = seen if data else {}
    saved = mergeid.merge(
        folder / "a", folder / "b", output=tmp_path / "saved", plan=folder / plan, repair=False, **given
    )
    assert saved.verdict == again.verdict == "match"
    one, two = tensors(tmp_path / "again"), tensors(tmp_path / "saved")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert saved.plan is not None and again.plan is not None
    assert [(s.decision, s.moved, s.why) for s in saved.plan.spaces] == [
        (s.decision, s.moved, s.why) for s in again.plan.spaces
    ]
    record = json.loads((tmp_path / "saved" / "mergeid.json").read_text())
    assert record["plan"]["permutations"] == json.loads((folder / plan).read_text())["permutations"]


def test_align_takes_it_too(folder: Path, tmp_path: Path, no_comparing: None) -> None:
    mergeid.align(folder / "b", folder / "a", output=tmp_path / "out", plan=folder / "plan.json")
    a, out = tensors(folder / "a"), tensors(tmp_path / "out")
    assert all(torch.nn.functional.cosine_similarity(a[k].flatten(), out[k].flatten(), dim=0) > 0.99 for k in a)


def test_models_that_are_read_on_demand_have_the_same_fingerprint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_comparing: None
) -> None:
    monkeypatch.setattr(load, "LARGEST_HELD", 0)
    mergeid.merge(folder / "a", folder / "b", output=tmp_path / "out", plan=folder / "plan.json")


def test_live_modules(folder: Path, no_comparing: None) -> None:
    a, b = (transformers.LlamaForCausalLM.from_pretrained(folder / k) for k in "ab")
    assert mergeid.merge(a, b, plan=folder / "plan.json").verdict == "match"


def _other_weights(plan: dict[str, Any], b: dict[str, torch.Tensor]) -> None:
    b["model.norm.weight"][0] += 1


def _no_group_element(plan: dict[str, Any], b: dict[str, torch.Tensor]) -> None:
    perm = next(iter(plan["permutations"].values()))
    perm[0] = perm[1]


def _too_short(plan: dict[str, Any], b: dict[str, torch.Tensor]) -> None:
    next(iter(plan["permutations"].values())).pop()


def _unknown_space(plan: dict[str, Any], b: dict[str, torch.Tensor]) -> None:
    plan["permutations"]["nowhere"] = [1, 0]


def _other_spaces(plan: dict[str, Any], b: dict[str, torch.Tensor]) -> None:
    plan["spaces"].pop()


def _no_prints(plan: dict[str, Any], b: dict[str, torch.Tensor]) -> None:
    del plan["fingerprints"]


def _misspelt(plan: dict[str, Any], b: dict[str, torch.Tensor]) -> None:
    plan["permutation"] = plan.pop("permutations")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_other_weights, "was made for other weights than those of"),
        (_no_group_element, "holds permutations that would change what the model computes"),
        (_too_short, "holds permutations that would change what the model computes"),
        (_unknown_space, "permutes nowhere, which these models do not have"),
        (_other_spaces, "was made for other spaces of neurons"),
        (_no_prints, "does not say which weights it was made for"),
        (_misspelt, "has an unknown key 'permutation'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, spoil: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], said: str
) -> None:
    plan, b = json.loads((folder / "plan.json").read_text()), tensors(folder / "b")
    spoil(plan, b)
    shutil.copytree(folder / "b", tmp_path / "b")
    save_file(b, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(MergeidError) as caught:
        mergeid.merge(folder / "a", tmp_path / "b", output=tmp_path / "out", plan=tmp_path / "plan.json")
    assert said in str(caught.value) and str(tmp_path / "plan.json") in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"match": "always"}, "leave out --match and --matcher, or --plan"),
        ({"matcher": "weight"}, "leave out --match and --matcher, or --plan"),
        ({"transport": True}, "--plan cannot be combined with --transport"),
        ({"base": "a"}, "--plan is for two models, got 2 and a base"),
    ],
)
def test_what_does_not_go_with_a_plan(folder: Path, given: dict[str, Any], said: str) -> None:
    if "base" in given:
        given = {"base": folder / "a", "method": "ties"}
    with pytest.raises(MergeidError) as caught:
        mergeid.merge(folder / "a", folder / "b", output=folder / "out", plan=folder / "plan.json", **given)
    assert said in str(caught.value) and not (folder / "out").exists()


def test_a_plan_is_never_overwritten(folder: Path) -> None:
    with pytest.raises(MergeidError):
        mergeid.merge(folder / "a", folder / "b", output=folder / "plan.json", plan=folder / "plan.json", force=True)
    assert json.loads((folder / "plan.json").read_text())["format"] == "mergeid.plan/1"


def test_every_kind_of_tensor_has_a_fingerprint() -> None:
    state = {
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "half": torch.randn(5, 3, dtype=torch.bfloat16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "flags": torch.tensor([True, False]),
    }
    first = fingerprint(state)
    assert first == fingerprint(dict(reversed(state.items())))
    for name, value in state.items():
        if value.numel():
            changed = ~value if value.dtype == torch.bool else value + 1
            assert fingerprint({**state, name: changed}) != first
