"""Planted permutations are found again, on several architectures and with noise on every weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import inverse, permutations_of, seeded, traced
from tiny_transformers import configs
from torch import Tensor, nn

from mergeid.evidence.activations import PairStream, TapReader
from mergeid.evidence.evidence import ActivationEvidence
from mergeid.evidence.taps import choose_taps
from mergeid.matchers import MatchTask, get_matcher
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

NOISE = 0.1
"""Of the weights' norm, tensor by tensor."""

LITTLE = 0.01
"""The same where activations must tell every neuron: noise on the weights adds up over the depth."""


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))


def network(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """(model, inputs of 64 examples): everything in float32, every neuron different from the next."""
    generator = torch.Generator().manual_seed(5)
    if name == "mlp":
        return seeded(mlp).float(), {"input": torch.randn(64, 8, generator=generator)}
    if name.startswith("timm/"):
        import timm

        model = seeded(lambda: timm.create_model(name[5:], num_classes=5)).float()
        size = 32 if "vit" not in name else model.patch_embed.img_size[0]
        return model, {"x": torch.randn(64, 3, size, size, generator=generator)}
    import transformers

    config = dict(configs()[name])
    kind = config.pop("model_type")
    config.pop("architectures")
    built = transformers.AutoConfig.for_model(kind, **config)
    model = seeded(lambda: getattr(transformers, name)(built)).float()
    if "image_size" in config:
        return model, {"pixel_values": torch.randn(64, 3, 32, 32, generator=generator)}
    ids = {"input_ids": torch.randint(3, 90, (64, 12), generator=generator)}
    if "decoder" in " ".join(config) or kind == "t5":
        ids["decoder_input_ids"] = torch.randint(3, 90, (64, 8), generator=generator)
    return model, ids


def run(model: nn.Module, batch: Any) -> Any:
    return model(*batch.values()) if "input" in batch or "x" in batch else model(**batch)


def noisy(state: dict[str, Tensor], seed: int, noise_share: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, value in state.items():
        out[name] = value
        if value.is_floating_point() and value.numel():
            noise = torch.randn(value.shape, generator=generator)
            out[name] = value + noise * (noise_share * value.norm() / noise.norm().clamp(min=1e-12))
            if "running_var" in name:
                out[name] = out[name].abs() + 0.05
    return out


def distinct(graph: NeuronGraph, a: dict[str, Tensor]) -> set[str]:
    """Spaces whose members' own weights (all axes, in A) differ by far more than the noise."""
    out = set()
    for s in graph.spaces:
        parts = [torch.zeros(s.size, 0)]
        for axis in s.axes:
            if len(axis.members) == s.size:
                rows = a[axis.tensor].movedim(axis.axis, 0)[torch.from_numpy(axis.positions)].reshape(s.size, -1)
                parts.append(rows / rows.norm().clamp(min=1e-12))
        rows = torch.cat(parts, 1)
        near = torch.cdist(rows, rows) + torch.eye(s.size) * 1e9
        if rows.shape[1] and float(near.min()) > 3 * NOISE * float(rows.norm(dim=1).mean()):
            out.add(s.id)
    return out


def loaded(name: str, state: dict[str, Tensor]) -> nn.Module:
    model, _ = network(name)
    model.load_state_dict(state)
    return model


MORE = [
    "timm/test_vit",
    "timm/test_convnext",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "timm/test_efficientnet",
    "timm/test_mambaout",
    "timm/test_byobnet",
    "timm/test_convnext2",
    "timm/test_vit2",
    "timm/test_vit3",
    "BertModel",
    "DistilBertForMaskedLM",
    "RobertaForSequenceClassification",
    "MistralForCausalLM",
    "Qwen3ForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
]


def correlations(graph: NeuronGraph, a: nn.Module, b: nn.Module, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    taps = choose_taps(graph, a)
    flat = [t for found in taps.values() for t in found]
    stream = PairStream(TapReader(a, run, flat), TapReader(b, run, flat), lambda: iter([inputs]))
    evidence = ActivationEvidence(graph, stream, taps)
    evidence.collect()
    return evidence.correlations()


SMALL = ["mlp", "timm/test_resnet", "BertForSequenceClassification"]


def dominant(correlation: np.ndarray) -> bool:
    """Whether every neuron is most like itself, seen from either side."""
    off = correlation - 9 * np.eye(len(correlation))
    own = correlation.diagonal()
    return bool((own > off.max(0) + 1e-3).all() and (own > off.max(1) + 1e-3).all())


def wrong(graph: NeuronGraph, found: Element, truth: Element, spaces: set[str]) -> dict[str, int]:
    """Label -> members that a match sends elsewhere; spaces without such are left out."""
    assert graph.contains(found)
    count = {s.label: int((found[s.id] != truth[s.id]).sum()) for s in graph.spaces if s.id in spaces}
    return {k: n for k, n in count.items() if n}


def recovers(name: str) -> None:
    a, inputs = network(name)
    state = dict(a.state_dict())
    graph = traced(a, {k: v[:2] for k, v in inputs.items()}, run)
    element = permutations_of(graph, 3)
    truth = inverse(element)
    sure = distinct(graph, state)
    assert sure
    for share in (NOISE, LITTLE):
        plain = noisy(state, 3, share)
        moved = graph.apply_state(element, plain)
        b = loaded(name, moved)
        found = correlations(graph, a, b, inputs)
        task = MatchTask(graph, state, moved, torch.Generator().manual_seed(0), found)
        for matcher in ("weight", "combined"):
            assert not wrong(graph, get_matcher(matcher).match(task), truth, sure), (matcher, share)
        # activations can only tell neurons apart that are most like themselves before anything is permuted
        before = correlations(graph, a, loaded(name, plain), inputs)
        told = {s.id for s in graph.spaces if s.id in before and dominant(before[s.id])}
        told = {s for s in told if set(graph.by_id[s].parents) <= told}
        assert told
        assert not wrong(graph, get_matcher("activation").match(task), truth, told), share


@pytest.mark.parametrize("name", SMALL)
def test_planted(name: str) -> None:
    recovers(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_planted_on_more(name: str) -> None:
    recovers(name)
