"""Every verb that runs networks, on small pairs: what it says, and what it writes, on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from math import isnan
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import mergeid

EXAMPLES = 48
Case = Callable[[Path, str], Any]


def write_pairs(folder: Path) -> None:
    """``cnn`` (BatchNorm), ``decoder`` (RMSNorm, heads; ``halves``: the same in bf16) and ``mlp``-like encoders
    (LayerNorm): A, and a scrambled copy with noise as B, with labelled examples."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        ResNetConfig,
        ResNetForImageClassification,
    )

    small: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
    }
    makers: dict[str, Callable[[], Any]] = {
        "cnn": lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
        ),
        "decoder": lambda: LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=1)),
        "encoder": lambda: BertForSequenceClassification(BertConfig(**small, num_labels=3)),
    }
    for name, make in makers.items():
        torch.manual_seed(0)
        model = make().eval()
        model.save_pretrained(folder / name / "a")
        mergeid.scramble(folder / name / "a", output=folder / name / "b", seed=3)
        other = type(model).from_pretrained(folder / name / "b")
        with torch.no_grad():
            for p in other.parameters():
                p += 0.1 * p.std(correction=0) * torch.randn_like(p)
        other.save_pretrained(folder / name / "b")
        if name == "decoder":
            for which, net in (("a", model), ("b", other)):
                net.bfloat16().save_pretrained(folder / "halves" / which)
    draw = np.random.default_rng(1)
    ids = draw.integers(3, 40, size=(EXAMPLES, 8))
    mask = (np.arange(8) < draw.integers(4, 9, size=(EXAMPLES, 1))).astype(np.int64)
    labels = draw.integers(3, size=EXAMPLES)
    images = draw.standard_normal((EXAMPLES, 3, 12, 12), np.float32)
    np.savez(folder / "cnn" / "data.npz", pixel_values=images, labels=labels)
    np.savez(folder / "encoder" / "data.npz", input_ids=ids, attention_mask=mask, labels=labels)
    for name in ("decoder", "halves"):
        np.savez(folder / name / "data.npz", input_ids=ids, attention_mask=mask, labels=np.where(mask, ids, -100))


def on(pair: str, verb: str, /, **keywords: Any) -> Case:
    """A verb on a pair of files with data."""

    def case(folder: Path, device: str) -> Any:
        place = folder / pair
        return getattr(mergeid, verb)(
            place / "a", place / "b", **{"data": place / "data.npz", **keywords}, device=device, batch_size=20
        ).to_json()

    return case


def written(pair: str, verb: str, /, **keywords: Any) -> Case:
    """A verb on a pair of files with data, and the tensors that it writes."""

    def case(folder: Path, device: str) -> Any:
        from safetensors.torch import load_file

        output = folder / f"{pair}-{verb}"
        said = on(pair, verb, output=output, force=True, **keywords)(folder, device)
        return {"said": said, "tensors": load_file(output / "model.safetensors")}

    return case


def _halves(folder: Path, device: str) -> Any:
    """bf16 files run in bf16 on a device, in float32 on the CPU: decisions and merged tensors are the same."""
    found = written("halves", "merge", repair="none")(folder, device)
    return {"decisions": [s["decision"] for s in found["said"]["plan"]["spaces"]], "tensors": found["tensors"]}


def _base(case: Callable[..., Case], pair: str, verb: str, **keywords: Any) -> Case:
    return lambda folder, device: case(pair, verb, base=folder / pair / "a", **keywords)(folder, device)


NO_ROOM = {
    "models.load.LARGEST_HELD": 0,
    "basics.on_demand.PIECE": 64,
    "basics.shelf.ROOM": 0,
    "basics.shelf.SMALL": 0,
    "basics.when_asked.ROOM": 0,
    "basics.when_asked.SMALL": 0,
    "evidence.evidence.SUMS": 0,
    "matchers.inner_products.PIECE": 64,
    "matchers.plain.LEAST_SIZE": 16,
    "matchers.plain.LEAST_ENTRIES": 16,
    "repair.layers.WIDE": 1 << 12,
    "repair.layers.BLOCK": 1 << 11,
    "stages.write.PIECE": 64,
}
"""Bounds beyond which weights are formed on demand, products are cut in pieces and sums go to disk."""


def as_large(case: Case) -> Case:
    """The same of models that nothing has room for."""

    def cased(folder: Path, device: str) -> Any:
        with ExitStack() as stack:
            for name, value in NO_ROOM.items():
                stack.enter_context(patch(f"mergeid.{name}", value))
            return case(folder, device)

    return cased


def _sketches(folder: Path, device: str) -> Any:
    place = folder / "cnn"
    one, two = (mergeid.sketch(place / k, data=place / "data.npz", device=device) for k in "ab")
    return {"activations": dict(one.activations), "pair": mergeid.predict_sketches([one, two]).to_json()}


def _similarity(folder: Path, device: str) -> Any:
    place = folder / "encoder"
    return mergeid.similarity(place / "a", place / "b", data=place / "data.npz", device=device).to_json()


def _rank(folder: Path, device: str) -> Any:
    place = folder / "cnn"
    return mergeid.rank([place / "a", place / "b"], data=place / "data.npz", device=device).to_json()


def _soup(how: str) -> Case:
    def case(folder: Path, device: str) -> Any:
        place, base = folder / "cnn", {"base": folder / "cnn" / "a"} if how == "adamerging" else {}
        result = mergeid.soup(
            [place / "a", place / "b"], data=place / "data.npz", how=how, steps=3, device=device, **base,
            output=folder / "soup", force=True, match="always",
        )  # fmt: skip
        return result.to_json()

    return case


def _zip(folder: Path, device: str) -> Any:
    place = folder / "cnn"
    return mergeid.zip_models(
        place / "a", place / "b", data=place / "data.npz", output=folder / "zipped", device=device, force=True
    ).to_json()


def _report(folder: Path, device: str) -> Any:
    place = folder / "cnn"
    found = mergeid.report(place / "a", place / "b", data=place / "data.npz", points=3, device=device)
    return [part.to_json() for part in (found.plan, *found.curves, found.prediction, found.merge) if part is not None]


def _live(folder: Path, device: str) -> Any:
    """Modules as a user has them, on the device or not."""

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).eval()

    x = torch.randn(EXAMPLES, 6, generator=torch.Generator().manual_seed(0))
    found = {}
    for where, place in {"here": "cpu", "there": device}.items():
        a, b = network(0).to(place), network(1).to(place)
        inputs = x[:2].to(place)
        merged = mergeid.merge(a, b, data=list(x), example_inputs=inputs, device=device, force=True, repair="solve")
        assert next(a.parameters()).device == next(network(0).to(place).parameters()).device  # left where it was
        found[where] = {"said": merged.to_json(), "tensors": merged.state}
    return found


CASES: dict[str, Case] = {
    "plan, BatchNorm": on("cnn", "plan"),
    "plan, RMSNorm": on("decoder", "plan"),
    "plan, weights": on("decoder", "plan", data=None),
    "plan, activation matcher": on("encoder", "plan", matcher="activation"),
    "plan, base and radii": _base(on, "encoder", "plan", certify=True),
    "plan, sinkhorn": on("encoder", "plan", matcher="sinkhorn", match="always"),
    "plan, straight-through": on("cnn", "plan", matcher="straight_through", match="always"),
    "align": written("decoder", "align"),
    "merge": written("cnn", "merge"),
    "merge, LayerNorm": written("encoder", "merge"),
    "merge, bn": written("cnn", "merge", repair="bn"),
    "merge, REPAIR": written("encoder", "merge", repair="repair"),
    "merge, solve": written("decoder", "merge", repair="solve"),
    "merge, polish": written("cnn", "merge", repair="solve+polish"),
    "merge, bf16 files": _halves,
    "merge, fisher": written("encoder", "merge", method="fisher"),
    "merge, regmean": written("encoder", "merge", method="regmean"),
    "merge, ties": _base(written, "encoder", "merge", method="ties"),
    "merge, dare": _base(written, "encoder", "merge", method="dare_ties", density=0.5),
    "merge, della": _base(written, "encoder", "merge", method="della", density=0.5),
    "merge, slerp": written("encoder", "merge", method="slerp"),
    "merge, live modules": _live,
    "merge, transport": written("cnn", "merge", transport=True),
    "predict": on("cnn", "predict"),
    "predict, weights": on("decoder", "predict", data=None),
    "predict, base": _base(on, "encoder", "predict"),
    "predict, trial": on("cnn", "predict", trial=True),
    "sketch": _sketches,
    "similarity": _similarity,
    "rank": _rank,
    "soup": _soup("greedy"),
    "soup, adamerging": _soup("adamerging"),
    "zip": _zip,
    "barrier": on("cnn", "barrier", match="auto", repair=True, points=3),
    "report": _report,
    "large: plan": as_large(on("decoder", "plan")),
    "large: plan, weights": as_large(on("decoder", "plan", data=None)),
    "large: align": as_large(written("decoder", "align")),
    "large: merge": as_large(written("decoder", "merge")),
    "large: merge, weights": as_large(written("decoder", "merge", data=None)),
    "large: merge, bf16 files": as_large(_halves),
    "large: merge, LayerNorm": as_large(written("encoder", "merge")),
    "large: merge, solve": as_large(written("decoder", "merge", repair="solve")),
    "large: merge, fisher": as_large(written("encoder", "merge", method="fisher")),
    "large: predict": as_large(on("decoder", "predict")),
    "large: predict, trial": as_large(on("decoder", "predict", trial=True)),
    "large: barrier": as_large(on("decoder", "barrier", match="auto", points=3)),
    "large: similarity": as_large(_similarity),
}


def differences(one: Any, other: Any, tolerance: float, where: str = "") -> Iterator[str]:
    """Where two results differ: numbers by more than a tolerance, anything else at all."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            if key not in ("seconds", "device", "files", "output"):
                yield from differences(one.get(key), other.get(key), tolerance, f"{where}/{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for i, (x, y) in enumerate(zip(one, other, strict=True)):
            yield from differences(x, y, tolerance, f"{where}/{i}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        gap = (one.cpu().double() - other.cpu().double()).abs().max() if one.numel() else torch.zeros(())
        if not gap <= tolerance * one.abs().double().max().clamp(min=1):
            yield f"{where}: differs by {float(gap):.2g}"
    elif isinstance(one, float) and isinstance(other, float):
        if isnan(one) and isnan(other):
            return
        if not abs(one - other) <= tolerance * max(abs(one), 1) and one != other:
            yield f"{where}: {one} and {other}"
    elif one != other:
        yield f"{where}: {str(one)[:80]} and {str(other)[:80]}"
