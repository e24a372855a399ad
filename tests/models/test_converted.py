"""Models some of whose tensors transformers turns into others on loading: experts that lie one by one, queries, keys
and values in one tensor, other layouts. Judged by the library itself: its own files, loaded by it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergeid
from mergeid.errors import MergeidError

pytest.importorskip("transformers.conversion_mapping")

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def mixtral() -> torch.nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))


def qwen() -> torch.nn.Module:
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12)
    return transformers.Qwen3MoeForCausalLM(config)


def nomic() -> torch.nn.Module:
    config = transformers.NomicBertConfig(**{**SIZES, "num_key_value_heads": 2})
    return transformers.NomicBertForMaskedLM(config)


def olmo() -> torch.nn.Module:
    """Three kernels that are one in the network, queries, keys and values of its linear attention."""
    config = transformers.OlmoHybridConfig(
        **SIZES, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return transformers.OlmoHybridForCausalLM(config)


KINDS = {"mixtral": mixtral, "qwen3_moe": qwen, "nomic_bert": nomic, "olmo_hybrid": olmo}


def saved(build: Callable[[], Any], folder: Path, seed: int, **how: Any) -> Path:
    """With weights large enough that no two neurons look alike."""
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, **how)
    return folder


def tuned(base: Path, folder: Path, seed: int) -> Path:
    """A fine-tune of the base, in the same files."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        moved = {k: t + 0.01 * torch.randn(t.shape, generator=generator) for k, t in state.items()}
        save_file(moved, file, metadata={"format": "pt"})
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def outputs(build: Callable[[], Any], folder: Path) -> Tensor:
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        found: Tensor = type(build()).from_pretrained(folder).eval()(input_ids=ids).logits
    return found


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(t, other[k], atol=tolerance) for k, t in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_scrambled_and_brought_back(kind: str, tmp_path: Path) -> None:
    """A scrambled copy is another file of the same function, in the same layout; aligned, it is the first again."""
    build = KINDS[kind]
    a = saved(build, tmp_path / "a", 0)
    found = mergeid.scramble(a, output=tmp_path / "s", seed=1)
    one, two = stored(a), stored(tmp_path / "s")
    assert {k: t.shape for k, t in one.items()} == {k: t.shape for k, t in two.items()}
    assert found.moved_share > 0.9 and sum(torch.equal(one[k], two[k]) for k in one) < len(one) / 4
    torch.testing.assert_close(outputs(build, tmp_path / "s"), outputs(build, a), rtol=1e-4, atol=1e-4)
    mergeid.align(tmp_path / "s", to=a, output=tmp_path / "b", match="always")
    torch.testing.assert_close(outputs(build, tmp_path / "b"), outputs(build, a), rtol=1e-4, atol=1e-4)
    if kind != "olmo_hybrid":  # whose heads share a norm, so that their order is told by few weights
        assert close(stored(tmp_path / "b"), one)


METHODS: dict[str, dict[str, Any]] = {
    "average": {},
    "angles of single experts": {"method": "slerp"},
    "signs of single experts": {"method": "ties", "density": 0.4},
    "weights of some experts": {"weights": {"*.experts.1.*": [0.9, 0.1], "*": [0.3, 0.7]}},
    "without some experts": {"skip": ["*.experts.1.*"]},
}


@pytest.mark.parametrize("name", METHODS)
def test_matched_is_the_plain_merge_of_what_was_scrambled(name: str, tmp_path: Path) -> None:
    """Also where the method looks at tensors as they lie in the file, and settings name them."""
    base = saved(qwen, tmp_path / "base", 0)
    a, b = (tuned(base, tmp_path / n, i) for i, n in enumerate("ab"))
    mergeid.scramble(b, output=tmp_path / "s", seed=1)
    how = dict(METHODS[name])
    origin = {"base": base} if how.get("method") == "ties" else {}
    mergeid.merge(a, b, output=tmp_path / "plain", match="never", **how, **origin)
    mergeid.merge(a, tmp_path / "s", output=tmp_path / "matched", match="always", **how, **origin)
    assert close(stored(tmp_path / "matched"), stored(tmp_path / "plain"))


def test_names_without_the_prefix_of_a_head(tmp_path: Path) -> None:
    """The model without its head has the names of its experts without a prefix, and merges in either order."""
    base = saved(mixtral, tmp_path / "base", 0)
    a, b = (tuned(base, tmp_path / n, i) for i, n in enumerate("ab"))
    transformers.MixtralModel.from_pretrained(b).save_pretrained(tmp_path / "bare")
    one, two, bare = stored(a), stored(b), stored(tmp_path / "bare")
    assert not one.keys() & bare.keys()
    mergeid.merge(a, tmp_path / "bare", output=tmp_path / "m")
    made = stored(tmp_path / "m")
    assert made.keys() == one.keys() and torch.equal(made["lm_head.weight"], one["lm_head.weight"])
    means = {k: (one[k] + two[k]) / 2 for k in one if k != "lm_head.weight"}
    assert close({k: made[k] for k in means}, means)
    mergeid.merge(tmp_path / "bare", a, output=tmp_path / "n")
    without = stored(tmp_path / "n")
    assert without.keys() == bare.keys() and close({f"model.{k}": t for k, t in without.items()}, means)


def test_shards_stay_as_they_are(tmp_path: Path) -> None:
    a = saved(mixtral, tmp_path / "a", 0, max_shard_size="8KB")
    mergeid.scramble(a, output=tmp_path / "s", seed=1)
    mergeid.merge(a, tmp_path / "s", output=tmp_path / "m")
    files = {p.name for p in a.glob("*.safetensors*")}
    assert len(files) > 3
    for other in ("s", "m"):
        assert {p.name for p in (tmp_path / other).glob("*.safetensors*")} == files
        for file in a.glob("*.safetensors"):
            assert load_file(file).keys() == load_file(tmp_path / other / file.name).keys()
    assert close(stored(tmp_path / "m"), stored(a))


@pytest.mark.parametrize("repair", ["solve", "regmean"])
def test_repaired_projections_lie_in_one_tensor(repair: str, tmp_path: Path) -> None:
    """The written file, as transformers loads it, is what the same merge of live modules gives."""
    a, b = (saved(nomic, tmp_path / n, i) for i, n in enumerate("ab"))
    ids = torch.randint(3, 40, (24, 8), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "x.safetensors")
    how: dict[str, Any] = {"data": tmp_path / "x.safetensors", "match": "never", "force": True, "repair": repair}
    kind = type(nomic())
    live = mergeid.merge(kind.from_pretrained(a).eval(), kind.from_pretrained(b).eval(), **how)
    found = mergeid.merge(a, b, output=tmp_path / "m", **how)
    assert any("q_proj" in k for k in found.repaired)
    assert live.state is not None
    assert close(kind.from_pretrained(tmp_path / "m").state_dict(), dict(live.state), 1e-4)


def test_a_layout_that_cannot_be_written_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeid_transformers import conversions

    def wrong(*given: Any) -> dict[str, Tensor]:
        return {name: t.flip(0) for name, t in right(*given).items()}

    a = saved(mixtral, tmp_path / "a", 0)
    right = conversions._save
    monkeypatch.setattr(conversions, "_save", wrong)
    with pytest.raises(MergeidError, match=r"cannot undo that exactly.*--match never"):
        mergeid.scramble(a, output=tmp_path / "s", seed=1)
    assert not (tmp_path / "s").exists()


def test_learned_coefficients_are_those_of_the_files_tensors(tmp_path: Path) -> None:
    base = saved(mixtral, tmp_path / "base", 0)
    a, b = (tuned(base, tmp_path / n, i) for i, n in enumerate("ab"))
    ids = torch.randint(3, 40, (16, 8), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids, "labels": ids.clone()}, tmp_path / "x.safetensors")
    mergeid.soup(
        [a, b], data=tmp_path / "x.safetensors", how="adamerging", base=base, steps=2, output=tmp_path / "m",
        match="never",
    )  # fmt: skip
    made, of = stored(tmp_path / "m"), {n: stored(tmp_path / n) for n in ("a", "b", "base")}
    began = {k: t + 0.3 * (of["a"][k] - t) + 0.3 * (of["b"][k] - t) for k, t in of["base"].items()}
    assert close(made, began, 1e-3) and not close(made, began, 1e-7)
