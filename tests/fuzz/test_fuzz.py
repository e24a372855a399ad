"""A seeded handful of every fuzzing campaign (`python tests/fuzz` runs thousands), and its judge sees each fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fuzz.campaigns import models
from fuzz.case import CAMPAIGNS, Case, rng_of
from fuzz.files import averaged, floats, header_of, join, pair, read, safetensors
from fuzz.kills import kills
from fuzz.lane import Lane
from fuzz.oracle import Ran, faults, snapshot
from fuzz.run import FAULTS, Ledger, one, several, shares, table

FEW = {
    "headers": 40,
    "folders": 25,
    "recipes": 40,
    "values": 40,
    "pickles": 25,
    "data": 8,
    "sketches": 8,
    "graphs": 5,
    "kept": 8,
    "plans": 8,
    "adapters": 12,
    "places": 25,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEID_FUZZ_MODELS", str(folder / "models"))
        models.folder.cache_clear()
        yield folder
    models.folder.cache_clear()


@pytest.fixture(scope="module")
def lane(place: Path) -> Iterator[Lane]:
    (place / "home").mkdir()
    found = Lane(place / "home", {})
    yield found
    found.close()


@pytest.mark.parametrize("name", FEW)
def test_a_few_of_every_campaign(name: str, place: Path, lane: Lane) -> None:
    for index in range(FEW[name]):
        found, ran = one(CAMPAIGNS[name], 20, index, lane, place, alone=False)
        assert not found, f"python tests/fuzz --seed 20 --replay {name}:{index}: {found}, {ran.err[-500:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_many_of_every_campaign(name: str, place: Path) -> None:
    (place / name).mkdir()
    own = Lane(place / name, CAMPAIGNS[name].env)
    try:
        ledger = several(CAMPAIGNS[name], 21, shares(3000, list(CAMPAIGNS))[name], own, place)
    finally:
        own.close()
    assert not ledger.failing and ledger.waiting


@pytest.mark.slow
def test_signals_at_random_moments(place: Path) -> None:
    found = kills(56, 22, place)
    assert not found.failing
    assert sum(found.sent.values()) == 2 * 56


def test_every_campaign_is_in_the_plain_suite_but_the_hub() -> None:
    assert {*FEW, "hub"} == set(CAMPAIGNS)


@pytest.mark.parametrize("name", ["headers", "recipes", "values"])
def test_an_input_is_made_again_from_its_number(name: str, tmp_path: Path) -> None:
    made = []
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        case = CAMPAIGNS[name].make(rng_of(name, 3, 17), tmp_path / str(k))
        made.append((case.words, snapshot(tmp_path / str(k))))
    assert made[0] == made[1]


def judged(folder: Path, case: Case, ran: Ran, change: str = "") -> list[str]:
    """Kinds of faults, where the command did `change` to the folder."""
    (folder / "a").write_text("input")
    before = snapshot(folder)
    if change == "changes":
        (folder / "a").write_text("other")
    elif change:
        (folder / change).write_bytes(b"\x01" * 9)
    return [f.partition(":")[0] for f in faults(case, ran, before, snapshot(folder), folder)]


REFUSED = Ran(2, "", "mergeid: error: no such file\n", 0.1)
DONE = Ran(0, "wrote o\n", "", 0.1)


@pytest.mark.parametrize(
    ("ran", "change", "kind"),
    [
        (REFUSED, "", None),
        (DONE, "", None),
        (Ran(None, "", "", 21.0), "", "hang"),
        (Ran(1, "", "Traceback (most recent call last):\n  x\nValueError: y\n", 0.1), "", "traceback"),
        (replace(REFUSED, code=3), "", "exit code"),
        (replace(REFUSED, code=-11), "", "exit code"),
        (replace(REFUSED, err="mergeid: error: a\nand b\n"), "", "message"),
        (replace(REFUSED, err=""), "", "message"),
        (replace(REFUSED, err=f"mergeid: error: {'x' * 700}\n"), "", "message"),
        (replace(REFUSED, err="mergeid: error: \x1b[31mred\n"), "", "message"),
        (replace(REFUSED, out="table"), "", "message"),
        (replace(DONE, out="\x9bX"), "", "message"),
        (REFUSED, "o", "left behind"),
        (DONE, "other", "left behind"),
        (DONE, "changes", "input changed"),
        (REFUSED, "changes", "input changed"),
        (DONE, "o.safetensors", "output not whole"),
        (replace(DONE, left=("tmpx",)), "", "left behind"),
    ],
)
def test_the_judge_sees(ran: Ran, change: str, kind: str | None, tmp_path: Path) -> None:
    case = Case(["merge"], ("o", "o.safetensors"))
    found = judged(tmp_path, case, ran, change)
    assert found == ([] if kind is None else found) and (kind is None or kind in found)
    assert {*found} <= {*FAULTS}


def test_the_judge_sees_a_wrong_result(tmp_path: Path) -> None:
    a, b = pair(rng_of("x", 0, 0), ["w"], [[2, 3]])
    (tmp_path / "o").write_bytes(safetensors(a))
    assert averaged(tmp_path / "o", [a, b], [1.0, 0.0]) is None
    assert averaged(tmp_path / "o", [a, b], [0.5, 0.5]) == "'w' is not the average"
    case = Case([], (), frozenset({0}), check=lambda folder: averaged(folder / "o", [a, b], [0.5, 0.5]))
    assert judged(tmp_path, case, DONE) == ["wrong result"]
    assert judged(tmp_path, case, REFUSED) == ["exit code"]


def test_what_the_generators_write_is_the_format(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = {"w": floats(rng_of("x", 0, 1), [2, 3]), "empty": floats(rng_of("x", 0, 2), [0])}
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(made, {"a": "b"}))
    assert read(path) == made and set(load_file(path)) == set(made)
    path.write_bytes(join(*header_of(made))[:-1])
    with pytest.raises(ValueError, match="bytes of data"):
        read(path)


def test_the_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ledger = Ledger(
        "headers", 0, next=7, processes=1, codes={"0": 3, "2": 4}, faults={"hang": 1}, failing={"4": ["None", "hang"]}
    )
    ledger.save(tmp_path)
    assert Ledger.of(tmp_path, "headers", 0) == ledger and Ledger.of(tmp_path, "headers", 1).next == 0
    assert "| **all** | 7 | 1 | 3 | 4 | 0 | 0 | 1 |" in table([ledger])


def test_an_input_that_is_mended_is_counted_as_what_it_is_now() -> None:
    ledger = Ledger("headers", 0)
    ledger.count(4, 3, ["exit code: 3", "traceback: x"])
    assert ledger.codes == {"3": 1} and ledger.failing == {"4": ["3", "exit code", "traceback"]}
    code, *kinds = ledger.failing.pop("4")
    ledger.count(4, 2, [], code, kinds)
    assert ledger.codes == {"3": 0, "2": 1} and not any(ledger.faults.values()) and not ledger.failing
