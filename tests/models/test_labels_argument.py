"""A live module whose forward takes `labels` gets them; where it does not, they are targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mergeid


class Conditional(nn.Module):
    """A decoder that is told the class."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.first, self.head = nn.Embedding(4, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, *, labels: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x) + self.embed(labels)))


class Optional(Conditional):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x, labels=torch.zeros(len(x), dtype=torch.long) if labels is None else labels)


class Plain(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


def items(count: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(count, 6, generator=g), torch.randint(0, 4, (count,), generator=g)
    return [{"x": x[i], "labels": labels[i]} for i in range(count)]


def batch(count: int) -> dict[str, Tensor]:
    rows = items(count)
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}


@pytest.mark.parametrize("kind", [Conditional, Optional])
def test_a_module_that_takes_labels_gets_them(kind):
    a = kind(0)
    graph = mergeid.graph(a, example_inputs=batch(4), more_inputs=[batch(3)])
    assert any(axis.tensor == "embed.weight" for space in graph.spaces for axis in space.axes)
    scrambled = kind(0)
    scrambled.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), a.state_dict()))
    for data in (None, items(32)):
        merged = mergeid.merge(a, scrambled, data=data, example_inputs=batch(4), match="always")
        for name, tensor in a.state_dict().items():
            torch.testing.assert_close(merged.state[name], tensor)


def test_others_have_them_as_targets():
    a = Plain(0)
    assert mergeid.graph(a, example_inputs=batch(4)).spaces
    merged = mergeid.merge(a, Plain(0), data=items(32), example_inputs=batch(4))
    assert torch.equal(merged.state["head.weight"], a.head.weight)


def test_predictions_give_them_too():
    a, b = Conditional(0), Conditional(1)
    found = mergeid.predict(a, b, data=items(24), example_inputs=batch(4))
    assert found.best.nats.expected >= 0


def test_a_library_s_model_that_makes_inputs_of_its_targets_gets_them():
    from transformers import T5Config, T5ForConditionalGeneration

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=40,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
        return T5ForConditionalGeneration(config).eval()

    a = made(0)
    targets = {"input_ids": torch.arange(1, 15).view(2, 7), "labels": torch.arange(3, 13).view(2, 5)}
    own = {"input_ids": targets["input_ids"], "decoder_input_ids": a._shift_right(targets["labels"])}
    graph = mergeid.graph(a, targets)
    assert graph.verified and [s.size for s in graph.spaces] == [s.size for s in mergeid.graph(a, own).spaces]
    assert mergeid.predict(a, made(1), example_inputs=targets).outlooks
