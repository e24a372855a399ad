"""The writer: what it writes is what other readers read, and it writes all of it or nothing."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from writing import write_checkpoint

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.dtypes import dtype_name, tensor_bytes, torch_dtype
from mergeid.io.opening import open_checkpoint
from mergeid.io.stream import CheckpointWriter
from mergeid.request.request import Output

DTYPES = ["BOOL", "U8", "I16", "I64", "F64", "F32", "F16", "BF16", "C64", "F8_E4M3", "F8_E5M2"]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    kind = torch_dtype(dtype)
    high = 2 if dtype == "BOOL" else 256
    raw = torch.randint(0, high, (*shape, kind.itemsize), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).flatten().view(kind).reshape(shape)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A sharded folder `m` with config and tokenizer, and the same tensors in `a.safetensors`."""
    tensors = {"w": torch.randn(4, 3), "v": torch.randn(6).bfloat16(), "n": torch.tensor(7)}
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"w": tensors["w"]}, folder / FIRST, metadata={"format": "pt", "part": "1"})
    save_file({"v": tensors["v"], "n": tensors["n"]}, folder / SECOND, metadata={"format": "pt"})
    weight_map = {"w": FIRST, "v": SECOND, "n": SECOND}
    index = {"metadata": {"total_size": 1, "total_parameters": 19}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "x"}')
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    dtype=st.sampled_from(["F32", "F16", "BF16", None]),
    pieces=st.integers(1, 5),
    order=st.randoms(use_true_random=False),
)
def test_safetensors_reads_what_we_write(tmp_path: Path, table, dtype, pieces, order) -> None:  # type: ignore[no-untyped-def]
    """Any names, dtypes and shapes, tensors in any order, whole or in pieces: safetensors reads them back."""
    tensors = {n: random_bits(d, tuple(s), i) for i, (n, (d, s)) in enumerate(table.items())}
    like = Checkpoint.from_tensors(tensors)
    dtypes = {} if dtype is None else {n: dtype for n, (d, _) in table.items() if d in ("F64", "F32", "F16")}
    wanted = {n: t.to(torch_dtype(dtypes[n])) if n in dtypes else t for n, t in tensors.items()}
    names = list(wanted)
    order.shuffle(names)
    pairs = ((n, iter(wanted[n].reshape(-1).split(pieces)) if wanted[n].numel() else wanted[n]) for n in names)
    output = tmp_path / "o.safetensors"
    write_checkpoint(output, pairs, like=like, dtypes=dtypes, force=True)
    found = load_file(output)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert tensor_bytes(found[name]) == tensor_bytes(tensor)
    opened = open_checkpoint(output)
    for name in opened.table:
        begin, _ = opened._spans[name]
        assert begin % torch_dtype(opened.table[name].dtype).itemsize == 0, "tensors stay aligned"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.safetensors"]


def test_copy_of_a_file_is_the_same_file(pair: Path) -> None:
    like = open_checkpoint(pair / "a.safetensors")
    written = write_checkpoint(pair / "o.safetensors", like.tensor, like=like)
    assert written == [pair / "o.safetensors"]
    assert written[0].read_bytes() == (pair / "a.safetensors").read_bytes()


def test_folder_keeps_shards_index_metadata_and_companions(pair: Path) -> None:
    like = open_checkpoint(pair / "m")
    record = {"seed": 1}
    written = write_checkpoint(
        pair / "o", like.tensor, like=like, companions=[pair / "m" / "config.json"], record=record
    )
    before, after = contents(pair / "m"), contents(pair / "o")
    assert {pair / "o" / n for n in after} == set(written)
    assert set(after) == {*before, "mergeid.json"}
    for name in (FIRST, SECOND, "config.json"):
        assert after[name] == before[name]
    index = json.loads(after["model.safetensors.index.json"])
    assert index["metadata"] == {"total_size": 4 * 3 * 4 + 6 * 2 + 8, "total_parameters": 19}
    assert index["weight_map"] == {"w": FIRST, "v": SECOND, "n": SECOND}
    assert json.loads(after["mergeid.json"]) == {"seed": 1, "output": "o"}


def test_sharded_input_into_one_file(pair: Path) -> None:
    like = open_checkpoint(pair / "m")
    write_checkpoint(pair / "o.safetensors", like.tensor, like=like, record={})
    assert set(load_file(pair / "o.safetensors")) == {"w", "v", "n"}
    with safe_open(pair / "o.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "part": "1"}
    assert json.loads((pair / "mergeid.json").read_text()) == {"output": "o.safetensors"}


def test_one_file_into_a_folder(pair: Path) -> None:
    like = open_checkpoint(pair / "a.safetensors")
    write_checkpoint(pair / "o", like.tensor, like=like)
    assert list(contents(pair / "o")) == ["model.safetensors"]


def test_companions_can_be_replaced_and_keep_their_subfolder(pair: Path) -> None:
    (pair / "m" / "sub").mkdir()
    (pair / "m" / "sub" / "config.json").write_text("inner")
    companions = [pair / "m" / "config.json", pair / "m" / "sub" / "config.json"]
    like = open_checkpoint(pair / "m")
    write_checkpoint(pair / "o", like.tensor, like=like, companions=companions, replace={"config.json": "new"})
    after = contents(pair / "o")
    assert after["config.json"] == b"new" and after["sub/config.json"] == b"inner"


def test_a_record_of_another_output_is_not_lost(pair: Path) -> None:
    like = open_checkpoint(pair / "a.safetensors")
    for name in ("one", "two"):
        write_checkpoint(pair / f"{name}.safetensors", like.tensor, like=like, record={"n": name})
    write_checkpoint(pair / "one.safetensors", like.tensor, like=like, record={"n": "again"}, force=True)
    assert json.loads((pair / "mergeid.json").read_text())["n"] == "again"
    assert json.loads((pair / "two.mergeid.json").read_text())["n"] == "two"


# --- nothing is overwritten --------------------------------------------------------------------------------


def refuse(pair: Path, output: str, match: str, *, force: bool = False, source: str = "a.safetensors") -> None:
    before = contents(pair)
    like = open_checkpoint(pair / source)
    with pytest.raises(MergeidError, match=match):
        write_checkpoint(pair / output, like.tensor, like=like, force=force, inputs=[pair / "m"], record={})
    assert contents(pair) == before


def test_existing_outputs_need_force(pair: Path) -> None:
    (pair / "o.safetensors").write_bytes(b"precious")
    refuse(pair, "o.safetensors", "exists already; choose another name .option -o. or pass --force")
    like = open_checkpoint(pair / "m")
    write_checkpoint(pair / "o.safetensors", like.tensor, like=like, force=True)
    assert set(load_file(pair / "o.safetensors")) == {"w", "v", "n"}
    (pair / "o").mkdir()
    write_checkpoint(pair / "o", like.tensor, like=like)  # an empty folder is nothing to lose
    refuse(pair, "o", "exists already")
    (pair / "o" / "stale.txt").write_text("old")
    write_checkpoint(pair / "o", like.tensor, like=like, force=True, record={})
    assert set(contents(pair / "o")) == {FIRST, SECOND, "model.safetensors.index.json", "mergeid.json"}
    assert sorted(p.name for p in pair.iterdir()) == ["a.safetensors", "m", "o", "o.safetensors"]


def test_inputs_are_never_overwritten(pair: Path) -> None:
    (pair / "link.safetensors").symlink_to(pair / "a.safetensors")
    os.link(pair / "a.safetensors", pair / "hard.safetensors")
    (pair / "linked").symlink_to(pair / "m")
    for name in ("a.safetensors", "link.safetensors", "hard.safetensors"):
        refuse(pair, name, "is the same file as the input", force=True)
    for name in ("m", "linked"):
        refuse(pair, name, "is the same folder as the input", force=True)
    refuse(pair, "a.safetensors", "is the same file as the input")
    refuse(pair, ".", "cannot be replaced: .* is in it", force=True)


@pytest.mark.parametrize("name", ["model.safetensors", "merged.safetensors"])
def test_no_weights_go_into_the_folder_of_an_input(pair: Path, name: str) -> None:
    """The file would count instead of the shards, or leave it open which one counts."""
    refuse(pair, f"m/{name}", "would be a second file of weights in the input folder", force=True)
    (pair / "m" / "merged").mkdir()
    like = open_checkpoint(pair / "m")
    write_checkpoint(pair / "m" / "merged" / name, like.tensor, like=like, inputs=[pair / "m"])
    assert set(open_checkpoint(pair / "m").table) == set(like.table)


def test_force_replaces_model_folders_only(pair: Path) -> None:
    (pair / "thesis").mkdir()
    (pair / "thesis" / "chapter1.tex").write_text("years of work")
    refuse(pair, "thesis", "is not a model folder", force=True)


def test_places_that_cannot_be(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(pair, "no/such/o.safetensors", "output folder .*no/such does not exist; create it")
    refuse(pair, "m", "same folder", force=True)
    for name in ("merged.bin", "merged.SAFETENSORS", "merged.gguf", "merged.yaml"):  # a folder of that name was made
        refuse(pair, name, "wrong ending; expected a .safetensors file or a folder")
    (pair / "d.safetensors").mkdir()
    refuse(pair, "d.safetensors", "is a folder; expected the name of a new file")
    (pair / "plain").write_text("x")
    refuse(pair, "plain", "is a file; expected a folder")
    refuse(pair, "plain/o.safetensors", "output folder .*plain does not exist")
    (pair / "empty").mkdir()
    monkeypatch.chdir(pair / "empty")
    refuse(pair, "empty", "exists already")


WRITE = (
    "import sys, warnings; from mergeid.errors import MergeidError\n"
    "from mergeid.io.opening import open_checkpoint; sys.path.insert(0, sys.argv.pop())\n"
    "from writing import write_checkpoint\n"
    "like = open_checkpoint(sys.argv[1])\n"
    "try: write_checkpoint(sys.argv[2], like.tensor, like=like, record={})\n"
    "except MergeidError as error: sys.exit(str(error))\n"
)


def run_writer(source: Path, output: Path, **options) -> subprocess.CompletedProcess[str]:  # type: ignore[no-untyped-def]
    command = [sys.executable, "-c", WRITE, str(source), str(output), str(Path(__file__).parents[1] / "helpers")]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def without_override() -> None:
    """Root may write anywhere; a child without this capability may not (prctl PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):
        raise OSError("the capability cannot be dropped")


def test_folder_that_is_not_writable(pair: Path) -> None:
    closed = pair / "closed"
    closed.mkdir(mode=0o555)
    done = run_writer(pair / "a.safetensors", closed / "o.safetensors", preexec_fn=without_override)
    assert "output folder" in done.stderr and "is not writable; choose another place" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(closed.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_disk_too_small_is_seen_before_writing(tmp_path: Path, tiny_disk: Path) -> None:
    save_file({"w": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    done = run_writer(tmp_path / "a.safetensors", tiny_disk / "o.safetensors")
    assert "disk full" in done.stderr and "needs 400," in done.stderr and done.stderr.count("\n") == 1
    assert not list(tiny_disk.iterdir())


def test_disk_that_fills_up_while_writing(tmp_path: Path, tiny_disk: Path) -> None:
    like = Checkpoint.from_tensors({"w": torch.zeros(5000), "v": torch.zeros(10_000)})

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", like.tensor("w")
        (tiny_disk / "somebody else").write_bytes(bytes(20_000))
        yield "v", like.tensor("v")

    with pytest.raises(MergeidError, match=r"disk full .* while writing .*nothing was left behind"):
        write_checkpoint(tiny_disk / "o.safetensors", tensors(), like=like, record={})
    assert [p.name for p in tiny_disk.iterdir()] == ["somebody else"]


@pytest.mark.parametrize("output", ["o.safetensors", "o"])
def test_file_size_limit_while_writing(tmp_path: Path, output: str) -> None:
    save_file({"w": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = run_writer(tmp_path / "a.safetensors", tmp_path / output, preexec_fn=limit)
    assert "disk full (or over a size limit) while writing" in done.stderr and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# --- whole or not at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["o.safetensors", "o"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_left_behind_by_an_exception(pair: Path, output: str, error: type, force: bool) -> None:
    like = open_checkpoint(pair / "m")
    if force:
        write_checkpoint(pair / output, like.tensor, like=like, record={})
    before = contents(pair)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", like.tensor("w")
        raise error("stop")

    with pytest.raises(error):
        write_checkpoint(pair / output, tensors(), like=like, record={"n": 2}, force=force)
    assert contents(pair) == before


@pytest.mark.parametrize("output", ["o.safetensors", "o"])
@pytest.mark.parametrize("step", ["replace", "rename", "fsync"])
def test_nothing_is_left_behind_when_the_last_step_fails(
    pair: Path, output: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = open_checkpoint(pair / "m")
    write_checkpoint(pair / "o", like.tensor, like=like)
    before = contents(pair)
    real, calls = getattr(os, step), []

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, step, failing)
    try:
        write_checkpoint(pair / output, like.tensor, like=like, record={"n": 2}, force=True)
    except MergeidError as error:
        assert "input/output error" in str(error)
        assert contents(pair) == before
    else:
        assert len(calls) < 2  # this kind of output does not take the step
    assert not [p for p in pair.iterdir() if p.name.startswith(".")]


def test_wrong_tensors_are_refused(pair: Path) -> None:
    like = open_checkpoint(pair / "a.safetensors")
    good = like.state_dict()
    for change, match in (
        ({"x": good["w"]}, "tensor 'x' has no place"),
        ({"w": good["w"][:2]}, "tensor 'w' has a wrong size"),
        ({"w": torch.zeros(5, 5)}, "tensor 'w' has a wrong size"),
        ({"w": good["w"].double()}, "tensor 'w' is torch.float64; the output's header says F32"),
    ):
        with pytest.raises(MergeidError, match=match):
            write_checkpoint(pair / "o", {**good, **change}.items(), like=like)
    with pytest.raises(MergeidError, match=r"2 tensors were never written to .*first 'n'"):
        write_checkpoint(pair / "o", [("w", good["w"])], like=like)
    assert sorted(p.name for p in pair.iterdir()) == ["a.safetensors", "m"]


def test_the_name_under_which_a_file_speaks_of_itself_is_refused(tmp_path: Path) -> None:
    """A pickle may have a tensor of that name; no file of safetensors can."""
    like = Checkpoint.from_tensors({"w": torch.ones(2), "__metadata__": torch.ones(2)})
    with pytest.raises(MergeidError, match="a tensor is named '__metadata__', under which safetensors"):
        write_checkpoint(tmp_path / "o.safetensors", like.tensor, like=like)
    assert not list(tmp_path.iterdir())


def test_an_output_that_appears_meanwhile_is_not_overwritten(pair: Path) -> None:
    like = open_checkpoint(pair / "a.safetensors")
    place = Output(pair / "o.safetensors")
    with pytest.raises(MergeidError, match="exists already"), CheckpointWriter(place, like=like) as w:
        for name in w.order():
            w.write(name, like.tensor(name))
        (pair / "o.safetensors").write_text("somebody else's")
    assert (pair / "o.safetensors").read_text() == "somebody else's"
    assert sorted(p.name for p in pair.iterdir()) == ["a.safetensors", "m", "o.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_views_and_special_tensors(dtype: str) -> None:
    tensor = random_bits(dtype, (4, 6), 1)
    assert bytes(tensor_bytes(tensor.t())) == tensor.t().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    assert bytes(tensor_bytes(tensor[1:3])) == bytes(tensor_bytes(tensor))[6 * tensor.itemsize : 18 * tensor.itemsize]
    assert dtype_name(tensor.dtype) == dtype
