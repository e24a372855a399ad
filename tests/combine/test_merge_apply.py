"""File-to-file merges: against an in-memory oracle, and every bad pair."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import merge_checkpoints
from safetensors.torch import load_file, save_file

from mergeid.combine.by_numpy import CHUNK
from mergeid.combine.by_torch import check_finite
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.dtypes import dtype_name, tensor_bytes
from mergeid.io.opening import open_checkpoint
from mergeid.methods.registry import linear


def network(seed: int, dtype: torch.dtype = torch.float32, rows: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"big.weight": (2 * CHUNK // 100 + 3, 100), "fc.weight": (rows, 7), "fc.bias": (rows,), "scale": ()}
    found = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    return {**found, "empty": torch.zeros(0, 3, dtype=dtype), "steps": torch.tensor(11)}


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    first = save(tmp_path / "a.safetensors", network(1))
    return first, save(tmp_path / "b.safetensors", network(2)), tmp_path / "o.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_streamed_is_the_same_as_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = network(1, dtype), network(2, dtype)
    save(tmp_path / "a.safetensors", a)
    save(tmp_path / "b.safetensors", b)
    seen: list[tuple[int, int]] = []
    report = merge_checkpoints(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        tmp_path / "o.safetensors",
        weights=(0.3, 0.7),
        progress=lambda done, total: seen.append((done, total)),
    )
    found = load_file(tmp_path / "o.safetensors")
    for name in a:
        oracle = a[name] if name == "steps" else linear([a[name], b[name]], [0.3, 0.7])
        assert same_bits(found[name], oracle), name
    assert report.merged == 5 and report.kept == ("steps",) and report.taken_from_a == ()
    assert report.bytes == sum(t.numel() * t.itemsize for t in a.values()) == seen[-1][0] <= seen[-1][1]
    assert report.files == (tmp_path / "o.safetensors", tmp_path / "mergeid.json")
    json.dumps(report.to_json())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), weight=st.floats(0, 1))
def test_a_file_merged_with_its_copy_is_the_same_file(tmp_path: Path, dtype: torch.dtype, weight: float) -> None:
    first, second = (save(tmp_path / f"{n}.safetensors", network(1, dtype)) for n in "ab")
    merge_checkpoints(first, second, tmp_path / "o.safetensors", weights=(1 - weight, weight), force=True)
    assert (tmp_path / "o.safetensors").read_bytes() == first.read_bytes()


def test_half_and_half_is_the_plain_average(pair: tuple[Path, Path, Path]) -> None:
    merge_checkpoints(*pair)
    a, b, found = (load_file(p) for p in pair)
    for name in set(a) - {"steps"}:
        assert same_bits(found[name], (a[name] + b[name]) / 2)


def test_order_and_sharding_follow_a(tmp_path: Path) -> None:
    a, b = network(1), network(2)
    folders = []
    for label, tensors, parts in (("a", a, 2), ("b", b, 3)):
        folder = tmp_path / label
        folder.mkdir()
        names = list(tensors)[:: 1 if label == "a" else -1]
        weight_map = {n: f"model-0000{i % parts + 1}-of-0000{parts}.safetensors" for i, n in enumerate(names)}
        for shard in set(weight_map.values()):
            save(folder / shard, {n: tensors[n] for n in names if weight_map[n] == shard})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        folders.append(folder)
    (folders[0] / "config.json").write_text('{"hidden": 3}')
    (folders[0] / "tokenizer.json").write_text("{}")
    (folders[0] / "README.md").write_text("the card of a")
    report = merge_checkpoints(*folders, tmp_path / "o")
    assert {p.name for p in report.files} == {p.name for p in (tmp_path / "o").iterdir()} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "config.json", "tokenizer.json", "mergeid.json",
    }  # fmt: skip
    opened, like = open_checkpoint(tmp_path / "o"), open_checkpoint(folders[0])
    assert list(opened.table.items()) == list(like.table.items())
    for name in set(a) - {"steps"}:
        assert same_bits(opened.tensor(name), linear([a[name], b[name]], [0.5, 0.5]))


def test_the_record(pair: tuple[Path, Path, Path]) -> None:
    merge_checkpoints(*pair, weights=(1, 3), normalize=True, record={"plan": {"spaces": 2}, "method": "mine"})
    record = json.loads((pair[2].parent / "mergeid.json").read_text())
    assert record["format"] == "mergeid.record/1" and record["output"] == "o.safetensors"
    assert [i["weight"] for i in record["inputs"]] == [0.25, 0.75]
    assert record["inputs"][1]["sha256"] == open_checkpoint(pair[1]).fingerprint()
    assert record["plan"] == {"spaces": 2} and record["method"] == "mine" and "torch" in record["versions"]


# --- options -----------------------------------------------------------------------------------------------


def test_transform_and_overrides(pair: tuple[Path, Path, Path]) -> None:
    a, b = load_file(pair[0]), load_file(pair[1])
    order = torch.tensor([4, 2, 0, 1, 3])

    def transform(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[order] if name.startswith("fc.") else tensor

    report = merge_checkpoints(*pair, transform_b=transform, overrides={"scale": torch.tensor(42.0).double()})
    found = load_file(pair[2])
    assert same_bits(found["fc.weight"], linear([a["fc.weight"], b["fc.weight"][order]], [0.5, 0.5]))
    assert same_bits(found["big.weight"], linear([a["big.weight"], b["big.weight"]], [0.5, 0.5]))
    assert found["scale"] == 42 and found["scale"].dtype == torch.float32 and report.overridden == ("scale",)
    for overrides in ({"nope": torch.zeros(1)}, {"scale": torch.zeros(2)}):
        with pytest.raises(ValueError, match="matches no tensor"):
            merge_checkpoints(*pair, overrides=overrides, force=True)
    with pytest.raises(ValueError, match="transform_b made"):
        merge_checkpoints(*pair, transform_b=lambda n, t: t[None], force=True)


def test_integer_buffers_that_differ_are_taken_from_a_and_named(tmp_path: Path) -> None:
    a = {**network(1), "mask": torch.tensor([True, False])}
    b = {**network(2), "steps": torch.tensor(99, dtype=torch.int32), "mask": torch.tensor([True, False])}
    paths = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    report = merge_checkpoints(*paths, tmp_path / "o.safetensors")
    assert report.taken_from_a == ("steps",) and report.kept == ("mask",)
    assert load_file(tmp_path / "o.safetensors")["steps"] == 11
    assert json.loads((tmp_path / "mergeid.json").read_text())["taken_from_a"] == ["steps"]


def test_skip(tmp_path: Path) -> None:
    a, b = network(1), {**network(2, rows=6), "extra": torch.zeros(1)}
    paths = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    report = merge_checkpoints(*paths, tmp_path / "o.safetensors", skip=["fc.*", "extra"])
    found = load_file(tmp_path / "o.safetensors")
    assert same_bits(found["fc.weight"], a["fc.weight"]) and "extra" not in found
    assert set(report.skipped) == {"fc.weight", "fc.bias"} and report.left_out == ("extra",)


def test_different_dtypes_are_merged_in_the_wider_with_a_warning(tmp_path: Path) -> None:
    a, b = network(1, torch.float16), network(2, torch.float32)
    paths = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    with pytest.warns(MergeidWarning, match=r"'big.weight' and 4 more have different dtypes \(F16 in .*a.safetensors"):
        merge_checkpoints(*paths, tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    for name in set(a) - {"steps"}:
        assert same_bits(found[name], linear([a[name].float(), b[name]], [0.5, 0.5]))
    report = merge_checkpoints(*paths, tmp_path / "o.safetensors", dtype="bf16", force=True)  # chosen: no warning
    found = load_file(tmp_path / "o.safetensors")
    assert found["fc.weight"].dtype == torch.bfloat16 and found["steps"].dtype == torch.int64
    assert report.dtypes["fc.weight"] == "BF16"


def test_config_tells_the_new_dtype(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        save(tmp_path / name / "model.safetensors", network(ord(name)))
        (tmp_path / name / "config.json").write_text('{"torch_dtype": "float32", "n": 1}')
    merge_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "o", dtype="bfloat16")
    assert json.loads((tmp_path / "o" / "config.json").read_text()) == {"torch_dtype": "bfloat16", "n": 1}
    merge_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "p")
    assert (tmp_path / "p" / "config.json").read_text() == '{"torch_dtype": "float32", "n": 1}'


def test_the_same_file_twice_warns(pair: tuple[Path, Path, Path]) -> None:
    (pair[0].parent / "link.safetensors").symlink_to(pair[0])
    with pytest.warns(MergeidWarning, match=r"both models are the same file"):
        merge_checkpoints(pair[0], pair[0].parent / "link.safetensors", pair[2])
    assert pair[2].read_bytes() == pair[0].read_bytes()


def test_checkpoints_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = (Checkpoint.from_tensors(network(i), source=f"live {i}") for i in (1, 2))
    report = merge_checkpoints(a, b, "merged")
    assert [p.name for p in report.files] == ["model.safetensors", "mergeid.json"]
    merge_checkpoints(a, b, "model.safetensors")
    assert load_file("model.safetensors")["scale"] == load_file("merged/model.safetensors")["scale"]


# --- bad weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0)])
def test_nan_and_inf_are_named(tmp_path: Path, value: float, where: str, dtype: torch.dtype, weights) -> None:  # type: ignore[no-untyped-def]
    paths = []
    for label in "ab":
        tensors = network(ord(label), dtype)
        if label == where:
            tensors["big.weight"][-1, -1] = value
        paths.append(save(tmp_path / f"{label}.safetensors", tensors))
    what = "NaN" if math.isnan(value) else "an infinite number"
    with pytest.raises(MergeidError, match=rf"tensor 'big.weight' of .*{where}.safetensors holds {what}; .*--skip"):
        merge_checkpoints(*paths, tmp_path / "o.safetensors", weights=weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_check_before_planning(tmp_path: Path) -> None:
    tensors = network(1)
    good = open_checkpoint(save(tmp_path / "good.safetensors", tensors))
    check_finite(good, good.table)
    tensors["scale"] = torch.tensor(math.inf)
    bad = open_checkpoint(save(tmp_path / "bad.safetensors", tensors))
    check_finite(bad, [n for n in bad.table if n != "scale"])
    with pytest.raises(MergeidError, match=r"tensor 'scale' of .*bad.safetensors holds an infinite number"):
        check_finite(bad, bad.table)


def test_opposite_infinities_and_masks(tmp_path: Path) -> None:
    a, b = network(1), network(2)
    a["fc.bias"][0], b["fc.bias"][0] = math.inf, -math.inf
    paths = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    with pytest.raises(MergeidError, match=r"tensor 'fc.bias' of .*a.safetensors holds an infinite"):
        merge_checkpoints(*paths, tmp_path / "o.safetensors")
    merge_checkpoints(*paths, tmp_path / "o.safetensors", skip=["fc.bias"])
    assert load_file(tmp_path / "o.safetensors")["fc.bias"][0] == math.inf


def test_overflow_is_not_blamed_on_the_inputs(pair: tuple[Path, Path, Path]) -> None:
    tensors = {**load_file(pair[0]), "scale": torch.tensor(1e30)}
    save(pair[0], tensors)
    with pytest.raises(MergeidError, match=r"tensor 'scale' overflows F16 when merged .*--dtype float32"):
        merge_checkpoints(*pair, dtype="float16")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": (0.5, 0.6)}, "sum to 1.1, expected 1"),
        ({"weights": (1.0,)}, "1 weights given"),
        ({"method": "slurp"}, "unknown merge method 'slurp'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"skip": ["nothing*"]}, "matches no tensor"),
    ],
)
def test_bad_options_write_nothing(pair: tuple[Path, Path, Path], options: dict, match: str) -> None:
    with pytest.raises(MergeidError, match=match):
        merge_checkpoints(*pair, **options)
    assert sorted(p.name for p in pair[0].parent.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_output_is_an_input(pair: tuple[Path, Path, Path]) -> None:
    for target in pair[:2]:
        with pytest.raises(MergeidError, match="is the same file as the input"):
            merge_checkpoints(pair[0], pair[1], target, force=True)


# --- transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["o", "o.safetensors"])
def test_sharded_output_loads_in_transformers(tmp_path: Path, output: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=200, max_position_embeddings=64)
    models = []
    for seed, label in enumerate("ab"):
        torch.manual_seed(seed)
        models.append(transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval())
        models[-1].save_pretrained(tmp_path / label, max_shard_size="30KB")
    a, b = (dict(m.state_dict()) for m in models)
    assert len(open_checkpoint(tmp_path / "a").files) > 2
    report = merge_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / output)
    if output == "o":
        assert {p.name for p in report.files} == {p.name for p in (tmp_path / "a").iterdir()} | {"mergeid.json"}
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "o", dtype="auto")
        found = dict(loaded.state_dict())
    else:
        found = load_file(tmp_path / output)
    assert set(found) == set(a)
    for name, tensor in found.items():
        assert dtype_name(tensor.dtype) == "BF16" and same_bits(tensor, (a[name] + b[name]) / 2), name
