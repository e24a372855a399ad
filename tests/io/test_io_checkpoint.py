"""Opening checkpoints: what is read, and one sentence for everything that can be wrong with them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from writing import write_checkpoint

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.dtypes import dtype_name, parse_dtype, tensor_bytes, torch_dtype, wider
from mergeid.io.folders import find_weights
from mergeid.io.opening import open_checkpoint

EVERY_DTYPE = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {str(d): torch.randint(0, 2, (3, 5), generator=generator).to(d) for d in EVERY_DTYPE}
    return {**found, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a) == tensor_bytes(b)


def test_reads_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(some_tensors(), path, metadata={"format": "pt", "note": "é"})
    checkpoint = open_checkpoint(path)
    oracle = load_file(path)
    assert set(checkpoint.table) == set(oracle)
    for name, tensor in checkpoint.state_dict().items():
        assert same_bits(tensor, oracle[name]), name
        assert checkpoint.table[name] == (dtype_name(tensor.dtype), tuple(tensor.shape))
    assert checkpoint.metadata == {"format": "pt", "note": "é"}
    assert not checkpoint.is_folder and checkpoint.config is None
    assert checkpoint.fingerprint() == {"a.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_released_pages_are_read_again_and_the_file_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(5000.0), "v": torch.ones(5000)}, path)
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    tensor = checkpoint.tensor("w")
    tensor.add_(1)  # a private copy of the page
    checkpoint.release("w")
    assert torch.equal(checkpoint.tensor("w"), torch.arange(5000.0))
    assert path.read_bytes() == before


def test_unaligned_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * ((3 - len(header)) % 8)
    values = torch.tensor([1.0, -2.0, 3.5])
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(tensor_bytes(values)))
    assert torch.equal(open_checkpoint(path).tensor("w"), values)


def test_nothing_imports_torch_before_a_tensor_is_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    code = (
        "import sys, mergeid.io.stream, mergeid.combine.tensor_plan, mergeid.methods.registry\n"
        "from mergeid.io.opening import open_checkpoint\n"
        "open_checkpoint(sys.argv[1]); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], check=True)


# --- damaged files -----------------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty .0 bytes."),
        (b"hello", "is not a safetensors file"),
        (b"<!DOCTYPE html><html>" * 10, "is not a safetensors file"),
        (b"PK\x03\x04" + b"x" * 100, "is a PyTorch pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (raw({"w": entry()}, b"\0" * 7), "is truncated: its tensors need 7. bytes and the file has 7."),
        (raw({"w": entry()})[:30], "is truncated: its header alone"),
        (raw({"w": entry()}, b"\0" * 9), "is damaged: 1 bytes follow the last tensor"),
        (raw(b"{broken json}"), "its header is not JSON"),
        (raw(b"{\xff}        "), "its header is not JSON"),
        (raw(b'{"w": {"dtype": "F32"}, "w": {}}'), "a name occurs twice"),
        (raw({"w": entry(offsets=(0, 4))}, b"\0" * 4), "tensor 'w' claims 4 bytes for F32 of shape .2."),
        (raw({"w": entry(shape=(-2,))}, b"\0" * 8), "tensor 'w' has a wrong dtype, shape"),
        (raw({"w": {"dtype": "F32"}}), "tensor 'w' lacks"),
        (raw({"w": 3}), "tensor 'w' lacks"),
        (raw({"w": entry(), "v": entry(offsets=(4, 12))}, b"\0" * 12), "overlaps its neighbour or leaves a gap"),
        (raw({"w": entry(offsets=(4, 12))}, b"\0" * 12), "overlaps its neighbour or leaves a gap"),
        (raw({"__metadata__": {"a": 1}, "w": entry()}, b"\0" * 8), "__metadata__ is not a table of strings"),
        (raw({}), "contains no tensors"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(MergeidError, match=match) as caught:
        open_checkpoint(path)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_truncation_and_every_flipped_byte_is_caught_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    whole = raw({"a": entry(), "b": entry("BF16", (3,), (8, 14))}, bytes(14))
    cut = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:cut])
    with pytest.raises(MergeidError, match=r"empty|truncated|not a safetensors"):
        open_checkpoint(path)
    at, value = data.draw(st.integers(0, len(whole) - 15)), data.draw(st.integers(0, 255))
    path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    try:
        opened = open_checkpoint(path)
    except MergeidError as error:
        assert "\n" not in str(error)
    else:
        assert sum(end - begin for begin, end in opened._spans.values()) == 14


# --- where a checkpoint lies -------------------------------------------------------------------------------


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    text = json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map} if index is None else index)
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


W, V = {"w": torch.ones(2)}, {"v": torch.zeros(3)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_sharded_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {FIRST: W, SECOND: V})
    (folder / "config.json").write_text('{"model_type": "x"}')
    checkpoint = open_checkpoint(folder)
    assert [f.name for f in checkpoint.files] == [FIRST, SECOND]
    assert list(checkpoint.table) == ["w", "v"] and checkpoint.file_of["v"].name == SECOND
    assert checkpoint.config == {"model_type": "x"} and checkpoint.is_folder
    assert torch.equal(checkpoint.tensor("v"), V["v"])


def test_index_decides_where_a_tensor_is_read(tmp_path: Path) -> None:
    shards = {FIRST: W, SECOND: {**V, "w": torch.zeros(2)}}
    folder = sharded(tmp_path / "m", shards, {"weight_map": {"w": FIRST, "v": SECOND}})
    assert torch.equal(open_checkpoint(folder).tensor("w"), torch.ones(2))


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ([], "does not hold a JSON object"),
        ({}, 'has no "weight_map"'),
        ({"weight_map": {"w": FIRST, "v": "gone.safetensors"}}, "lists the shard gone.safetensors, which is missing"),
        ({"weight_map": {"w": FIRST, "x": SECOND}}, "places tensor 'x' in model-00002"),
        ({"weight_map": {"w": "../" + FIRST}}, "expected a file in the same folder"),
        ({"weight_map": {"w": 7}}, "expected a file in the same folder"),
    ],
)
def test_broken_index(tmp_path: Path, index: object, match: str) -> None:
    folder = sharded(tmp_path / "m", {FIRST: W, SECOND: V}, index)
    with pytest.raises(MergeidError, match=match):
        open_checkpoint(folder)


NET = "diffusion_pytorch_model"
PLAIN_INDEX, FP16_INDEX = f"{NET}.safetensors.index.json", f"{NET}.safetensors.index.fp16.json"
SHARDS = [f"{NET}-0000{i}-of-00002.safetensors" for i in (1, 2)]
FP16 = {
    "new names": [f"{NET}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)],
    "old names": [f"{NET}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)],
}


@pytest.mark.parametrize("kind", FP16)
def test_other_formats_of_the_same_weights_do_not_count(kind: str) -> None:
    plain, half = [PLAIN_INDEX, *SHARDS], [FP16_INDEX, *FP16[kind]]
    assert find_weights([*plain, *half], "x").name == PLAIN_INDEX
    assert find_weights([*plain, f"{NET}.fp16.safetensors"], "x").name == PLAIN_INDEX
    assert find_weights([f"{NET}.safetensors", *half], "x").name == f"{NET}.safetensors"
    assert find_weights([f"{NET}.safetensors", f"{NET}.fp16.safetensors"], "x").name == f"{NET}.safetensors"
    assert find_weights(half, "x").name == FP16_INDEX
    with pytest.raises(MergeidError, match="contains several checkpoints"):
        find_weights([*plain, "other.safetensors"], "x")
    with pytest.raises(MergeidError, match="contains several checkpoints"):
        find_weights([*half, f"{NET}.safetensors.index.bf16.json"], "x")


def test_diffusers_and_we_read_the_same_weights(tmp_path: Path) -> None:
    unet = pytest.importorskip("diffusers").UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = unet(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert {PLAIN_INDEX, FP16_INDEX} <= {p.name for p in tmp_path.iterdir()}
    found = open_checkpoint(tmp_path)
    for name, value in unet.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(found.tensor(name), value)


def test_shards_in_another_format_alone_are_split_again(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for file, tensors in zip(FP16["new names"], (W, V), strict=True):
        save_file(tensors, tmp_path / "m" / file)
    weight_map = dict(zip("wv", FP16["new names"], strict=True))
    (tmp_path / "m" / FP16_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    like = open_checkpoint(tmp_path / "m")
    write_checkpoint(tmp_path / "o", like.tensor, like=like, shard_size=12)
    assert {p.name for p in (tmp_path / "o").iterdir()} == {PLAIN_INDEX, *SHARDS}


def test_index_that_is_no_json(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {FIRST: W})
    (folder / "model.safetensors.index.json").write_text("{not json")
    with pytest.raises(MergeidError, match=r"index.json is not valid JSON"):
        open_checkpoint(folder)
    with pytest.raises(MergeidError, match="is the index of a sharded checkpoint; name its folder"):
        open_checkpoint(folder / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["m.gguf"], "m.gguf is in a format that mergeid does not read: convert the model to safetensors"),
        (["tf_model.h5"], "tf_model.h5 is in a format"),
        (["checkpoint-9/config.json", "checkpoint-9/model.safetensors"], "a model's folder: name .*checkpoint-9$"),
        (["snapshots/x/config.json", "snapshots/x/model.safetensors"], "a model's folder: name .*snapshots/x$"),
        (["step1/mp_rank_00_model_states.pt"], "step1 holds the parts of a distributed checkpoint"),
        (["fsdp_0/__0_0.distcp"], "fsdp_0 holds the parts of a distributed checkpoint"),
        (["optimizer.pt", "logs/a.txt"], "expected model.safetensors, or shards"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds_instead(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(MergeidError, match=f"contains no weights; .*{said}"):
        open_checkpoint(tmp_path)


def test_shards_without_index_and_several_files_and_none(tmp_path: Path) -> None:
    with pytest.raises(MergeidError, match=r"contains no weights; expected model.safetensors"):
        open_checkpoint(tmp_path)
    save_file(W, tmp_path / FIRST)
    assert list(open_checkpoint(tmp_path).table) == ["w"]  # the only file there is
    save_file(V, tmp_path / SECOND)
    with pytest.raises(MergeidError, match=r"holds 2 shards but no model.safetensors.index.json"):
        open_checkpoint(tmp_path)
    save_file(V, tmp_path / "other.safetensors")
    with pytest.raises(MergeidError, match=r"several checkpoints \(model-00001.*other.safetensors\); name one of"):
        open_checkpoint(tmp_path)
    save_file(V, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).table) == ["v"]


def test_config_beside_a_single_file(tmp_path: Path) -> None:
    save_file(W, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    assert open_checkpoint(tmp_path / "a.safetensors").config == {"architecture": "resnet18"}
    (tmp_path / "config.json").write_text("nonsense")
    with pytest.raises(MergeidError, match=r"config.json is not valid JSON"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["missing.safetensors", "./missing", "a/b/c", "missing", "~/no/such"])
def test_missing(name: str) -> None:
    with pytest.raises(MergeidError, match=r"no such file or folder: .*hub id"):
        open_checkpoint(name)


def test_revision_of_a_local_file(tmp_path: Path) -> None:
    save_file(W, tmp_path / "a.safetensors")
    with pytest.raises(MergeidError, match="--revision v1 does not apply"):
        open_checkpoint(tmp_path / "a.safetensors", revision="v1")


# --- pickles -----------------------------------------------------------------------------------------------


def test_pickles_are_refused_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"epoch": 3, "state_dict": {**W, "n": torch.tensor(3)}}, path)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    for source in (path, tmp_path):
        with pytest.raises(MergeidError, match=r"pytorch_model.bin(,| is) a pickle .* --allow-pickle"):
            open_checkpoint(source)
        opened = open_checkpoint(source, allow_pickle=True)
        assert list(opened.table) == ["w", "n"] and torch.equal(opened.tensor("w"), W["w"])
        assert opened.metadata == {"format": "pt"} and list(opened.fingerprint()) == ["pytorch_model.bin"]


def test_pickled_shards_hold_what_their_index_places_in_them(tmp_path: Path) -> None:
    first, second = (f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))
    torch.save(W, tmp_path / first)
    torch.save({**V, "w": torch.zeros(2)}, tmp_path / second)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": first, "v": second}}))
    assert torch.equal(open_checkpoint(tmp_path, allow_pickle=True).tensor("w"), W["w"])
    index.write_text(json.dumps({"weight_map": {"w": first, "v": second, "x": second}}))
    with pytest.raises(MergeidError, match=r"is incomplete: the index places tensor 'x' in pytorch_model-00002"):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_sharded_pickles(tmp_path: Path) -> None:
    torch.save(W, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(V, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(MergeidError, match="holds 2 shards but no"):
        open_checkpoint(tmp_path, allow_pickle=True)
    weight_map = {"w": "pytorch_model-00001-of-00002.bin", "v": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(tmp_path, allow_pickle=True).table) == {"w", "v"}


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("this must not run",))


def test_bad_pickles_even_when_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    for content in ({"w": Harmful()}, [1, 2], {"epoch": 3}):
        torch.save(content, path)
        with pytest.raises(MergeidError, match=r"model.pt (cannot be read|holds|contains)"):
            open_checkpoint(path, allow_pickle=True)
    path.write_bytes(b"rubbish")
    with pytest.raises(MergeidError, match="cannot be read as a pickled state dict"):
        open_checkpoint(path, allow_pickle=True)
    path.write_bytes(b"")
    with pytest.raises(MergeidError, match="is empty"):
        open_checkpoint(path)
    assert capsys.readouterr().out == ""


# --- dtypes ------------------------------------------------------------------------------------------------


def test_dtype_names() -> None:
    for dtype in EVERY_DTYPE:
        assert torch_dtype(dtype_name(dtype)) == dtype
    for text in ("bf16", "bfloat16", "torch.bfloat16", "BF16"):
        assert parse_dtype(text) == "BF16"
    with pytest.raises(MergeidError, match="unknown dtype 'int8'; expected one of float64"):
        parse_dtype("int8")
    with pytest.raises(MergeidError, match="dtype F4 cannot be read as a plain tensor"):
        torch_dtype("F4")


@given(*[st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])] * 2)
def test_wider_is_torch_promotion(a: torch.dtype, b: torch.dtype) -> None:
    assert torch_dtype(wider(dtype_name(a), dtype_name(b))) == torch.promote_types(a, b)


def test_in_memory() -> None:
    checkpoint = Checkpoint.from_tensors({"w": torch.ones(2, requires_grad=True)}, source="live")
    assert checkpoint.table == {"w": ("F32", (2,))} and checkpoint.fingerprint() == {}
    assert not checkpoint.tensor("w").requires_grad
    checkpoint.release("w")


def test_the_same_tensors_and_metadata_are_the_same_bytes() -> None:
    """The library's own header lists the metadata in another order every time."""
    from safetensors.torch import load, save

    from mergeid.io.header import in_order

    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    about = {f"key {i}": f"ü {i}" for i in range(20)}
    written = {in_order(save(tensors, metadata=about)) for _ in range(6)}
    assert len(written) == 1
    (data,) = written
    found = load(data)
    assert all(torch.equal(found[k], v) for k, v in tensors.items()) and set(found) == set(tensors)
    size = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + size])["__metadata__"] == about and size % 8 == 0
    plain = save(tensors)
    assert in_order(plain) == plain
