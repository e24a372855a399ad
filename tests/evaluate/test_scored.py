"""Which positions count where a task scores some of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mergeid.data.batching import IGNORED
from mergeid.evaluate.nearness import Panel, joined
from mergeid.evaluate.scored import per_example, scored_positions
from mergeid.models.examples import Examples
from mergeid.models.loaded import class_loss
from mergeid.plugins import Batch, LossParts

CLASSES = 6


def first(shifted: bool = False, classes: bool = True) -> Any:
    """What a `Loaded` is asked for; a causal model's loss compares a position with the next label."""

    def loss(out: Tensor, batch: Batch) -> LossParts | None:
        labels = batch.get("labels")
        if shifted and isinstance(labels, Tensor):
            out, labels = out[:, :-1], labels[:, 1:]
        return class_loss(out, labels)

    def outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"logits": model(batch["x"])}

    adapter = SimpleNamespace(name="toy")
    example = {"x": torch.zeros(1, 3, 4), "labels": torch.zeros(1, 3).long()} if classes else {}
    return SimpleNamespace(
        loss=loss,
        outputs=outputs,
        unread=frozenset(),
        adapter=adapter,
        example=example,
        inputs={},
        joined=None,
        model=nn.Linear(4, CLASSES),
        inputs_of=lambda batch: {k: v for k, v in batch.items() if k != "labels"},
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.integers(2, 7))
def test_those_whose_label_is_not_ignored(seed: int, shifted: bool, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (3, length), generator=generator)
    hidden = torch.rand(3, length, generator=generator) < 0.5
    hidden[0, 0] = True
    batch = {"labels": labels.masked_fill(hidden, IGNORED)}
    found = scored_positions(first(shifted), batch, torch.Size((3, length)))
    expected = ~hidden
    if shifted:
        expected = torch.cat([~hidden[:, 1:], torch.zeros(3, 1, dtype=torch.bool)], 1)
    assert found is not None and torch.equal(found, expected)
    # whatever the labels are, even such as the model has no output for
    others = {"labels": torch.where(hidden, IGNORED, 1000 + labels)}
    again = scored_positions(first(shifted), others, torch.Size((3, length)))
    assert again is not None and torch.equal(again, found)


@pytest.mark.parametrize(
    "labels",
    [None, torch.tensor([1, 2]), torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.full((2, 4), IGNORED)],
    ids=["none", "one per example", "none ignored", "no classes", "of another length"],
)
def test_labels_that_tell_no_positions_apart(labels: Tensor | None) -> None:
    assert scored_positions(first(), {} if labels is None else {"labels": labels}, torch.Size((2, 3))) is None


def test_the_mean_is_over_what_counts_and_is_no_padding() -> None:
    scores = torch.arange(12.0).reshape(3, 4)
    labels = torch.full((3, 4), IGNORED)
    labels[0, [1, 3]] = 2
    labels[1, 0] = 2
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"labels": labels, "attention_mask": mask}
    # the second's only one is padding, and the third has none: all that is real counts
    assert per_example(scores, batch, 3, first()).tolist() == [2.0, 6.0, 8.5]
    assert per_example(scores, batch, 3).tolist() == [1.5, 6.0, 8.5]


def test_what_padding_holds_is_no_distance() -> None:
    """Of a head and of values: NaN there, in the network and in the models, is as good as any number."""
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.randint(1, 6, (10, 1))
    x = torch.randn(10, 5, 4)

    def far(padding: float, net: nn.Module, models: list[nn.Module], classes: bool) -> float:
        padded = x.masked_fill(~mask[..., None], padding)
        rows = [{"x": r, "attention_mask": m.long()} for r, m in zip(padded, mask, strict=True)]
        panel = Panel(
            cast(Any, first(classes=classes)),
            models,
            shares=[0.5, 0.5],
            examples=Examples(rows),
            device="cpu",
            batch_size=4,
        )
        return panel.far(net, 0)["logits"].distance

    a, b, net = (nn.Linear(4, CLASSES) for _ in range(3))
    for classes in (True, False):
        assert far(torch.nan, net, [a, b], classes) == pytest.approx(far(0.0, net, [a, b], classes), rel=1e-6)


@pytest.mark.parametrize("size", [3, 12])
def test_an_output_that_is_of_no_single_example(size: int) -> None:
    """Where examples belong to models: compared with the models' mean, and the others as if it were not there."""
    torch.manual_seed(0)
    x, owners = torch.randn(12, 3, 4), tuple(k % 2 for k in range(12))
    a, b, net = (nn.Linear(4, CLASSES) for _ in range(3))

    def far(penalty: bool, net: nn.Module) -> dict[str, float]:
        said = first()

        def outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            out = model(batch["x"])
            return {"logits": out, "penalty": out.square().mean()} if penalty else {"logits": out}

        said.outputs = outputs
        examples = Examples([{"x": r} for r in x], owners=owners)
        panel = Panel(said, [a, b], shares=[0.5, 0.5], examples=examples, device="cpu", batch_size=size)
        return {name: found.distance for name, found in panel.far(net, 0).items()}

    both = far(True, net)
    assert both["logits"] == far(False, net)["logits"]
    parts = x.split(size)
    with torch.no_grad():
        said = [[float(m(p).square().mean()) for p in parts] for m in (a, b, net)]
    mean = [(u + v) / 2 for u, v in zip(said[0], said[1], strict=True)]
    error = sum((u - v) ** 2 for u, v in zip(mean, said[2], strict=True)) / len(parts)
    spread = sum((u - sum(mean) / len(mean)) ** 2 for u in mean) / len(parts)
    least = torch.finfo(torch.float32).eps * sum(u * u for u in mean) / len(parts)
    assert both["penalty"] == pytest.approx(error / max(spread, least), rel=1e-4)


def test_what_a_network_says_where_nobody_asks_is_no_distance() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(4, CLASSES) for _ in range(2)]
    x = torch.randn(10, 5, 4)
    hidden = torch.rand(10, 5) < 0.4
    hidden[:, 0] = True

    class Spoilt(nn.Module):
        """The first model where it is asked, and nonsense elsewhere."""

        def forward(self, rows: Tensor) -> Tensor:
            asked = torch.stack([hidden[int(torch.nonzero((x == row).all(-1).all(-1))[0])] for row in rows])
            return torch.where(asked[..., None], models[0](rows), 9.0 * rows[..., :1] * torch.arange(CLASSES))

    def far(net: nn.Module, labelled: bool) -> float:
        rows = [
            {"x": r, **({"labels": torch.where(h, 0, IGNORED)} if labelled else {})}
            for r, h in zip(x, hidden, strict=True)
        ]
        panel = Panel(
            cast(Any, first()), models, shares=[0.5, 0.5], examples=Examples(rows), device="cpu", batch_size=4
        )
        found = joined([panel.far(net, part) for part in range(len(panel.parts))])
        return found["logits"].distance

    assert far(Spoilt(), True) == pytest.approx(far(models[0], True), abs=1e-6)
    assert far(Spoilt(), False) > far(models[0], False) + 0.1
