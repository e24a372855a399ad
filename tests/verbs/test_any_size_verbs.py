"""Verbs on models that are never whole in memory say what they say of the models in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_transformers import configs

import mergeid
from mergeid.basics import on_demand, shelf
from mergeid.evaluate import interpolate
from mergeid.models import load

Pair = tuple[Path, Path, Path]


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "BertForMaskedLM"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A network in 16 bits, its scrambled copy with noise, and texts with labels."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    kind = getattr(transformers, request.param)
    config = {k: v for k, v in configs()[request.param].items() if k not in ("model_type", "architectures")}
    net = kind(kind.config_class(**config))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    net.bfloat16().save_pretrained(folder / "a")
    mergeid.scramble(folder / "a", output=folder / "b", seed=1)
    file = folder / "b" / "model.safetensors"
    noisy = {k: v + 0.05 * v.std() * torch.randn_like(v) if v.dim() > 1 else v for k, v in load_file(file).items()}
    save_file(noisy, file, metadata={"format": "pt"})
    ids = torch.randint(3, 90, (64, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::3, 9:] = 0
    save_file({"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}, folder / "data.safetensors")
    return folder / "a", folder / "b", folder / "data.safetensors"


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for k, v in value.items():
            yield from leaves(v, f"{at}.{k}")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from leaves(v, f"{at}.{i}")
    else:
        yield at, value


def sketched(a: Path, b: Path, data: Path) -> Any:
    found = mergeid.sketch(a, data=data)
    parts = {"logits": found.logits, "hashes": found.hashes, "response": found.response, **found.activations}
    return {k: v.flatten().tolist() for k, v in parts.items()}


VERBS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "predict": lambda a, b, d: mergeid.predict(a, b, data=d).to_json(),
    "predict without data": lambda a, b, d: mergeid.predict(a, b).to_json(),
    "predict with a base": lambda a, b, d: mergeid.predict(a, b, data=d, base=a).to_json(),
    "predict and try": lambda a, b, d: mergeid.predict(a, b, data=d, trial=True).to_json(),
    "sketch": sketched,
    "similarity": lambda a, b, d: mergeid.similarity(a, b, data=d).to_json(),
    "barrier": lambda a, b, d: mergeid.barrier(a, b, data=d, match="auto", points=3).to_json(),
    "barrier of solved merges": lambda a, b, d: mergeid.barrier(a, b, data=d, points=3, solve=True).to_json(),
    "rank": lambda a, b, d: mergeid.rank([a, b], data=d).to_json(),
}


LONG = ("predict without data", "predict with a base", "predict and try", "barrier of solved merges", "rank")


@pytest.mark.parametrize("verb", [pytest.param(v, marks=[pytest.mark.slow] * (v in LONG)) for v in VERBS])
def test_the_figures_are_those_of_the_whole_models(verb: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(leaves(VERBS[verb](*pair)))
    monkeypatch.setattr(load, "LARGEST_HELD", 0)
    monkeypatch.setattr(on_demand, "PIECE", 256)
    monkeypatch.setattr(shelf, "ROOM", 0)
    monkeypatch.setattr(shelf, "SMALL", 0)
    monkeypatch.setattr(interpolate, "load_between", formed_not_held(interpolate.load_between, "solve" in verb))
    pieces = dict(leaves(VERBS[verb](*pair)))
    assert pieces.keys() == whole.keys()
    for place, value in whole.items():
        if isinstance(value, float):
            assert pieces[place] == pytest.approx(value, rel=2e-3, abs=1e-4, nan_ok=True), place
        else:
            assert pieces[place] == value, place


def formed_not_held(load_between: Callable[..., None], solves: bool) -> Callable[..., None]:
    """A network on the line forms its weights of both models', unless it is solved."""

    def checked(model: torch.nn.Module, *args: Any, **how: Any) -> None:
        load_between(model, *args, **how)
        assert solves or on_demand.is_on_demand(model)
        for p in model.parameters():
            if isinstance(p, on_demand.OnDemand):
                assert len(p.cell.form(slice(0, 1))) == 1

    return checked


@pytest.mark.parametrize("budget", [1 << 30, 400_000, 0])
def test_similarity_in_little_room(budget: int, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take turns; of those that have no room at all, fewer positions count."""
    from mergeid.verbs import similarity

    whole = mergeid.similarity(*pair[:2], data=pair[2])
    monkeypatch.setattr(similarity, "BUDGET", budget)
    found = mergeid.similarity(*pair[:2], data=pair[2])
    assert [x.layer for x in found.layers] == [x.layer for x in whole.layers]
    for x, y in zip(found.layers, whole.layers, strict=True):
        if budget:
            assert (x.rows, x.cka, x.svcca, x.pwcca) == (y.rows, *map(pytest.approx, (y.cka, y.svcca, y.pwcca)))
        else:
            assert 4 <= x.rows <= y.rows


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks at what Linux says of mapped files")
def test_a_shelf_is_on_disk_beyond_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "ROOM", 3000)
    monkeypatch.setattr(shelf, "SMALL", 100)
    kept = shelf.Shelf()
    given = [torch.randn(20, 30) for _ in range(3)]
    first, *others = [kept.keep(x) for x in given]
    assert all(torch.equal(x, y) for x, y in zip(given, (first, *others), strict=True)) and first is not given[0]
    assert "mergeid-" in Path("/proc/self/maps").read_text()
    others[0].add_(1)
    assert torch.equal(others[0], given[1] + 1) and torch.equal(others[1], given[2])
    del others
    assert "mergeid-" not in Path("/proc/self/maps").read_text()


def test_pieces_are_all_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_demand, "PIECE", 12)
    value, other = torch.randn(7, 5), torch.randn(7, 5)
    formed = on_demand.OnDemand(lambda which: value[which], value.shape, value.dtype)
    for weights, wanted in (
        ((formed, other), (value, other)),
        ((formed.t(), formed.t()), (value, value)),
        ((formed.t(), value.t()), (value.t(), value.t())),
        ((value,), (value,)),
    ):
        parts = list(on_demand.in_pieces(*weights))
        assert all(torch.equal(torch.cat(p), w) for p, w in zip(zip(*parts, strict=True), wanted, strict=True))
    assert len(list(on_demand.in_pieces(formed, other))) == 4
    assert torch.equal(formed.t().reshape(-1), value.t().reshape(-1))


def test_files_are_no_larger_than_they_may_be(pair: Pair, tmp_path: Path) -> None:
    a, b, _ = pair
    mergeid.scramble(a, output=tmp_path / "moved", seed=2, shard_size="20KB")
    mergeid.align(b, to=a, output=tmp_path / "aligned", shard_size="20KB")
    for folder in ("moved", "aligned"):
        files = list((tmp_path / folder).glob("*.safetensors"))
        sizes = [sum(v.numel() * v.element_size() for v in load_file(f).values()) for f in files]
        largest = max(v.numel() * v.element_size() for v in load_file(a / "model.safetensors").values())
        assert len(files) > 1 and max(sizes) <= max(20_000, largest)
        assert {k for f in files for k in load_file(f)} == load_file(a / "model.safetensors").keys()
