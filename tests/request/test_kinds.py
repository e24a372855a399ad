"""Arguments of a verb: of the kind that its signature says, or refused in one sentence that names the argument."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.request import usual
from mergeid.request.kinds import _fits, checked, kinds_of

NAMES = ("merge", "soup", "zip_models", "plan", "predict", "rank", "report", "barrier", "align", "sketch", "similarity",
         "graph", "scramble", "extract", "moe", "load", "load_zipped", "estimate", "predict_sketches")  # fmt: skip
VERBS: dict[str, Callable[..., Any]] = {name: getattr(mergeid, name) for name in NAMES}
ODD: tuple[Any, ...] = (None, True, -1, 2**70, float("nan"), "", b"a", [], {}, [None], object(), int, 1j, {1: None},
                        np.zeros((2, 2)), torch.zeros(()), nn.Linear(1, 1), {"a", 1}, "\ud800", Path("x"))  # fmt: skip


def kinds(verb: Callable[..., Any]) -> dict[str, Any]:
    return kinds_of(inspect.signature(verb), (usual.__name__, verb.__module__))


@pytest.mark.parametrize("name", VERBS)
def test_what_no_hint_allows_is_refused_by_name(name: str) -> None:
    hints = kinds(VERBS[name])
    told = [key for key, hint in hints.items() if not _fits(object(), hint)]
    assert len(told) > len(hints) // 3  # most can be told
    for key in told:
        with pytest.raises(MergeidError, match=f"^{key} is of type object; expected ") as caught:
            checked({key: object()}, hints)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", VERBS)
@given(data=st.data())
def test_odd_arguments_never_raise_anything_else(name: str, data: st.DataObject) -> None:
    hints = kinds(VERBS[name])
    key, value = data.draw(st.sampled_from(sorted(hints))), data.draw(st.sampled_from(ODD))
    try:
        found = checked({key: value}, hints)
    except MergeidError as error:
        assert str(error).startswith(key)
        assert len(str(error)) < 300
    else:
        assert _fits(found[key], hints[key])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"output": 3}, "^output is 3; expected text or a path or None$"),
        ({"method": ["linear"]}, "^method is a list of 1; expected text$"),
        ({"weights": 0.5}, "^weights is 0.5; expected a list or a mapping or None$"),
        ({"weights": {"*": None}}, "^weights for '\\*' are empty; expected one number per model"),
        ({"weights": {"*": "ab"}}, "^weights for '\\*' are 'ab'; expected one number per model"),
        ({"seed": True}, "^seed is True; expected a whole number$"),
        ({"skip": [1]}, "^skip has an entry that is 1; expected text$"),
        ({"progress": "x"}, "^progress is 'x'; expected a function or None$"),
        ({"outputs": b"x"}, "^outputs is of type bytes; expected a list of texts$"),
        ({"normalize": "yes"}, "^normalize is 'yes'; expected True or False or None$"),
    ],
)
def test_sentences(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeidError, match=message):
        mergeid.merge(nn.Linear(2, 2), nn.Linear(2, 2), match="never", **argument)


def test_one_glob_is_not_read_letter_by_letter() -> None:
    """``skip="bias*"`` was five globs, of which ``*`` left every tensor as A's, without a word."""
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    one, several = (mergeid.merge(a, b, match="never", skip=skip).state for skip in ("bias*", ["bias*"]))
    assert one is not None and several is not None
    assert torch.equal(one["bias"], a.bias) and torch.equal(several["bias"], a.bias)
    assert torch.allclose(one["weight"], (a.weight + b.weight) / 2)
    assert torch.equal(one["weight"], several["weight"])


def test_what_stands_for_a_name_or_a_number(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in "ab":
        save_file({"w": torch.full((2,), float(name == "b"))}, tmp_path / f"{name}.safetensors")
    out = tmp_path / "o.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mergeid.merge(
            tmp_path / "a.safetensors",
            tmp_path / "b.safetensors",
            output=out,
            match="never",
            dtype=torch.float16,
            device=torch.device("cpu"),
            seed=np.int64(3),
            batch_size=torch.tensor(2),
            weights=(w for w in (0.25, 0.75)),
            allow_pickle=np.bool_(False),
        )
    assert load_file(out)["w"].dtype == torch.float16
    assert load_file(out)["w"].tolist() == [0.75, 0.75]


def test_one_axis_is_frozen_as_a_list_of_it() -> None:
    x, net = torch.randn(2, 4), nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    for freeze in ("0.bias", ["0.bias"]):
        assert mergeid.graph(net, x, freeze=freeze).spaces == []


@pytest.mark.parametrize(
    ("argument", "taken"),
    [
        ({"skip": None}, ()),
        ({"outputs": None}, ()),
        ({"device": None}, None),
        ({"density": torch.tensor([0.5, 0.25])}, (0.5, 0.25)),
        ({"density": [torch.tensor(0.5), np.float32(0.25)]}, (0.5, 0.25)),
        ({"density": Fraction(1, 2)}, 0.5),
        ({"dtype": np.float16}, "float16"),
        ({"dtype": np.dtype("float16")}, "float16"),
        ({"shard_size": 5e9}, 5e9),
        ({"a": (name for name in "xy")}, ("x", "y")),
        ({"a": {"first": "x", "second": "y"}.values()}, ("x", "y")),
    ],
)
def test_what_people_write_is_taken(argument: dict[str, Any], taken: Any) -> None:
    """Some of it was taken before kinds were asked for, and the rest meant nothing else."""
    assert [*checked(argument, kinds(mergeid.merge)).values()] == [taken]


def test_weights_may_be_tensors() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        expected = a.weight / 4 + b.weight * 3 / 4
    for weights in (torch.tensor([0.25, 0.75]), [torch.tensor(0.25), torch.tensor(0.75)], np.array([0.25, 0.75])):
        state = mergeid.merge(a, b, match="never", weights=weights).state
        assert state is not None
        torch.testing.assert_close(state["weight"], expected)


def test_lists_of_what_only_type_checkers_import() -> None:
    with pytest.raises(MergeidError, match=r"^sketches is 3; expected a list$"):
        mergeid.predict_sketches(3)  # type: ignore[arg-type]


def test_batches_larger_than_any_number() -> None:
    """A quotient that rounds to nothing made no batches at all."""
    from mergeid.data.batches import balanced

    assert balanced(3, 10**400) == [range(3)] and balanced(0, 4) == []
    assert [len(r) for r in balanced(10, 4)] == [3, 4, 3]
    data = list(torch.randn(8, 4))
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    example = data[0][None]
    found = [mergeid.similarity(a, b, data=data, example_inputs=example, layers=which) for which in ([], ["*"])]
    assert len(found[0].layers) == len(found[1].layers) > 0
