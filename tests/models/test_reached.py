"""Experts that no example input chose: found with more examples, or named."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidWarning


class Expert(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.relu(self.up(x)))
        return found


class Routed(nn.Module):
    """Each row goes to one expert, of which only those run that are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.leave = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(8, 4)
        self.experts = nn.ModuleList(Expert(8, 12) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.enter(x))
        chosen = self.gate(hidden).argmax(-1)
        added = torch.zeros_like(hidden)
        for i in chosen.unique().tolist():
            added[chosen == i] = self.experts[i](hidden[chosen == i])
        found: Tensor = self.leave(hidden + added)
        return found


def shuffled(model: Routed) -> Routed:
    """The same function, its residual stream in another order."""
    other, order = Routed().eval(), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    state = {k: t.clone() for k, t in model.state_dict().items()}
    for key in state:
        if key.startswith("enter") or ("down" in key):
            state[key] = state[key][order]
        elif key in ("gate.weight", "leave.weight") or key.endswith("up.weight"):
            state[key] = state[key][:, order]
    other.load_state_dict(state)
    return other


@pytest.fixture
def pair() -> tuple[Routed, Routed, Tensor]:
    torch.manual_seed(0)
    a = Routed().eval()
    x = torch.randn(200, 5)
    b = shuffled(a)
    torch.testing.assert_close(a(x), b(x))
    assert len(a.gate(torch.relu(a.enter(x))).argmax(-1).unique()) > 2
    return a, b, x


def test_experts_that_the_example_does_not_reach_are_named(pair: tuple[Routed, Routed, Tensor]) -> None:
    a, b, x = pair
    with pytest.warns(MergeidWarning, match=r"never reach experts\.\d\.down and \d+ more.*give example_inputs that"):
        mergeid.merge(a, b, example_inputs=x[:1], match="always")


def test_with_inputs_that_reach_all_that_run_nothing_is_said(pair: tuple[Routed, Routed, Tensor]) -> None:
    a, b, x = pair
    reached = a.gate(torch.relu(a.enter(x))).argmax(-1).unique().tolist()
    for model in (a, b):  # those that are left have no part in any output
        model.experts = nn.ModuleList(model.experts[i] for i in reached)
        rows = model.gate.weight[reached].clone(), model.gate.bias[reached].clone()
        model.gate = nn.Linear(8, len(reached))
        model.gate.load_state_dict({"weight": rows[0], "bias": rows[1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", MergeidWarning)
        found = mergeid.merge(a, b, example_inputs=x, match="always")
    merged = Routed().eval()
    merged.gate, merged.experts = a.gate, a.experts
    wanted = a(x)
    assert found.state is not None
    merged.load_state_dict(found.state)
    torch.testing.assert_close(merged(x), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_asked_for_more_examples(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch Transformers hold experts one by one; an example of one token reaches few, and more are run then."""
    import transformers
    from mergeid_transformers import TransformersAdapter

    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = str(tmp_path)
    model.save_pretrained(folder)
    whole, sizes = TransformersAdapter.example_inputs, []

    def few(self, arch, model, generator, batch_size=2):
        sizes.append(batch_size)
        batch = whole(self, arch, model, generator, batch_size)
        return {k: t[:1, :1] for k, t in batch.items()} if batch_size == 2 else batch

    monkeypatch.setattr(TransformersAdapter, "example_inputs", few)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MergeidWarning)
        mergeid.scramble(folder, output=f"{folder}/s", seed=1)
    assert max(sizes) > 2
    ids = torch.randint(1, 40, (16, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        one, two = (
            type(model).from_pretrained(f).eval()(input_ids=ids, decoder_input_ids=ids).logits
            for f in (folder, f"{folder}/s")
        )
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


class TwoExits(nn.Module):
    """Only some inputs take the early exit."""

    def __init__(self, seed: int, unused: int = 9) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.early, self.b, self.late = (nn.Linear(i, o) for i, o in ((6, 16), (16, 3), (16, 12), (12, 3)))
        self.unused = nn.Linear(unused, 2)

    def forward(self, x: Tensor, early: bool = False) -> Tensor:
        h = self.a(x).relu()
        return self.early(h) if early else self.late(self.b(h).relu())


def test_tensors_that_may_read_what_moves_are_named() -> None:
    """Merged in the old order, the other exit is that of neither model."""
    x, a, b = torch.randn(4, 6), TwoExits(0).eval(), TwoExits(1).eval()
    said = "early.weight is never read on the example inputs"
    for found in (mergeid.plan(a, b, example_inputs=x, match="always"), mergeid.align(a, b, example_inputs=x)):
        assert [n for n in found.notes if "never read" in n and n.startswith(said)], found.notes
    same = mergeid.plan(a, TwoExits(0).eval(), example_inputs=x)
    assert not any("never read" in n for n in same.notes)
