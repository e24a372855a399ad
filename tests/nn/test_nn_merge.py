"""Asymmetric checkpoints as files: recognised, traced, merged with what they share, folded."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import mergeid
from mergeid import MergeidError
from mergeid import nn as mnn
from mergeid.combine.asymmetric import effective_averages
from mergeid.io.opening import open_checkpoint
from mergeid.nn import stored

ARCH = "timm/test_resnet"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int, kind: str = "w", fixed_seed: int = 9) -> nn.Module:
    """A small ResNet whose trainable weights and statistics come from `seed`."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=4, zero_init_last=False)
    mnn.asymmetrise(model, kind, generator=seeded(fixed_seed))
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(4, 3, 32, 32))
    return model.eval()


def plain() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=4).eval()


def file_of(state: dict[str, Tensor], path):
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


@pytest.fixture(scope="module", params=["w", "syre"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    models = [network(s, request.param) for s in (0, 1)]
    for name, model in zip("ab", models, strict=True):
        file_of(model.state_dict(), folder / f"{name}.safetensors")
        file_of(mnn.fold(model), folder / f"{name}-folded.safetensors")
    return folder, models


def frozen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k.endswith(("_fixed", "_mask"))}


# -- names --------------------------------------------------------------------------------------------------


def test_tables_are_recognised_by_names_alone():
    state = network(0).state_dict()
    assert stored.is_asymmetric(state) and not stored.is_asymmetric(plain().state_dict())
    assert set(stored.plain_table(state)) == set(plain().state_dict())
    # a mask of something else is no asymmetric layer
    assert not stored.is_asymmetric(["attn.bias", "attn.bias_mask", "logits_fixed"])
    assert list(stored.plain_table({"attn.bias": 1, "attn.bias_mask": 2})) == ["attn.bias", "attn.bias_mask"]


def test_recognising_needs_no_torch():
    code = "import sys; from mergeid.nn.names import is_asymmetric; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- loading and the graph ----------------------------------------------------------------------------------


def test_a_checkpoint_loads_as_the_same_function(pair):
    folder, models = pair
    x = torch.randn(2, 3, 48, 48, generator=seeded(3))
    loaded = mergeid.load(folder / "a.safetensors")
    assert loaded.arch.id == ARCH
    assert torch.equal(loaded.model(x), models[0](x))
    ordinary = mergeid.load(folder / "a-folded.safetensors")
    torch.testing.assert_close(ordinary.model(x), models[0](x))


def test_the_graph_moves_the_fixed_parts_with_the_weights(pair):
    folder, models = pair
    graph, ordinary = (mergeid.graph(folder / f"{n}.safetensors") for n in ("a", "a-folded"))
    assert graph.verified["max_relative_error"] < 1e-9
    assert not graph.unknown_ops
    assert sorted(s.size for s in graph.spaces) == sorted(s.size for s in ordinary.spaces)
    for space in graph.spaces:
        axes = {(a.tensor, a.axis): a.index.tolist() for a in space.axes}
        for (tensor, axis), index in axes.items():
            for suffix in ("_fixed", "_mask"):
                if f"{tensor}{suffix}" in graph.tensors:
                    assert axes[f"{tensor}{suffix}", axis] == index
    # one group, seen through either: permuting then folding is folding then permuting
    element = graph.random_element(seeded(1))
    names = {a.tensor: (s.id, a) for s in ordinary.spaces for a in s.axes}
    moved = mnn.fold_state(graph.apply_state(element, models[0].state_dict()))
    folded = mnn.fold(models[0])
    assert names
    for name, value in folded.items():
        torch.testing.assert_close(graph.apply(element, name, value), moved[name])


def test_scrambling_is_a_symmetry_of_the_function_that_leaves_the_shared_parts(pair, tmp_path):
    folder, models = pair
    done = mergeid.scramble(folder / "a.safetensors", output=tmp_path / "s.safetensors", seed=2)
    assert done.max_relative_error < 1e-9 and done.moved_share > 0.9
    x = torch.randn(2, 3, 48, 48, generator=seeded(3))
    torch.testing.assert_close(mergeid.load(tmp_path / "s.safetensors").model(x), models[0](x), rtol=1e-4, atol=1e-5)
    start, end = frozen(models[0].state_dict()), frozen(load_file(tmp_path / "s.safetensors"))
    assert all(not torch.equal(v, end[k]) for k, v in start.items() if k.endswith("_fixed"))


# -- merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_keeps_what_both_share_bit_for_bit(pair, tmp_path, weights, dtype):
    _, models = pair
    states = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in m.state_dict().items()} for m in models]
    paths = [file_of(s, tmp_path / f"{i}.safetensors") for i, s in enumerate(states)]
    done = mergeid.merge(*paths, output=tmp_path / "m.safetensors", match="never", weights=weights)
    merged = load_file(done.files[0])
    assert merged.keys() == states[0].keys() and not done.notes
    shared = frozen(states[0])
    assert shared and all(torch.equal(merged[k], v) for k, v in shared.items())


@pytest.mark.parametrize("match", ["never", "auto"])
def test_folding_the_merge_is_merging_the_folds(pair, tmp_path, match):
    folder, _ = pair
    options = {"match": match, "arch": ARCH}
    if match == "auto":
        images = torch.randn(64, 3, 32, 32, generator=seeded(4)).numpy()
        np.savez(tmp_path / "data.npz", x=images)
        options |= {"data": tmp_path / "data.npz", "repair": False, "force": True}
    merged = mergeid.merge(
        folder / "a.safetensors", folder / "b.safetensors", output=tmp_path / "m.safetensors", **options
    )
    folds = [folder / f"{n}-folded.safetensors" for n in "ab"]
    mergeid.merge(*folds, output=tmp_path / "f.safetensors", match="never")
    if match == "auto" and merged.plan.moves:
        # some space was matched: then the folds have to be matched alike
        element = merged.plan.element
        aligned = merged.plan.graph.apply_state(element, load_file(folds[1]))
        file_of(aligned, tmp_path / "b.safetensors")
        mergeid.merge(
            folds[0], tmp_path / "b.safetensors", output=tmp_path / "f.safetensors", match="never", force=True
        )
    found, expected = stored.folded(load_file(tmp_path / "m.safetensors")), load_file(tmp_path / "f.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 3, 48, 48, generator=seeded(3))
    model = plain()
    model.load_state_dict(expected)
    torch.testing.assert_close(mergeid.load(tmp_path / "m.safetensors").model(x), model(x), rtol=1e-3, atol=1e-4)


def test_a_scrambled_partner_is_brought_back_to_the_shared_parts(pair, tmp_path):
    # matching undoes the scramble, after which F and D are shared again
    folder, models = pair
    mergeid.scramble(folder / "b.safetensors", output=tmp_path / "s.safetensors", seed=5)
    done = mergeid.merge(
        folder / "a.safetensors", tmp_path / "s.safetensors", output=tmp_path / "m.safetensors", match="always"
    )
    merged, shared = load_file(done.files[0]), frozen(models[0].state_dict())
    assert all(torch.equal(merged[k], v) for k, v in shared.items())
    assert not any("masks" in n for n in done.notes)
    direct = mergeid.merge(
        folder / "a.safetensors", folder / "b.safetensors", output=tmp_path / "d.safetensors", match="never"
    )
    expected = load_file(direct.files[0])
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value)


def test_other_masks_are_averaged_in_effective_weights(tmp_path):
    models = [network(s, "w", fixed_seed=s) for s in (0, 1)]
    paths = [file_of(m.state_dict(), tmp_path / f"{i}.safetensors") for i, m in enumerate(models)]
    done = mergeid.merge(*paths, output=tmp_path / "m.safetensors", match="never", weights=(0.25, 0.75))
    merged = load_file(done.files[0])
    assert any("asymmetric layers of B do not have A's masks" in n for n in done.notes)
    folded = [mnn.fold(m) for m in models]
    for name, value in stored.folded(merged).items():
        expected = 0.25 * folded[0][name].double() + 0.75 * folded[1][name].double()
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(merged["conv1.0.weight_mask"], torch.ones_like(merged["conv1.0.weight"]))
    assert merged["conv1.0.weight_fixed"].abs().max() == 0
    live = mergeid.merge(*models, match="never", weights=(0.25, 0.75)).state
    assert live.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(live[name], value)


def test_effective_averages_touch_only_layers_with_other_masks():
    torch.manual_seed(0)
    ours = {f"{n}.weight{s}": torch.randn(3, 2) for n in ("same", "other", "dense") for s in ("", "_fixed")}
    ours |= {f"{n}.weight_mask": torch.tensor([[1.0, 0], [0, 1], [1, 1]]) for n in ("same", "other")}
    theirs = {k: v.clone() if "mask" in k else torch.randn(3, 2) for k, v in ours.items()}
    theirs["other.weight_mask"] = 1 - ours["other.weight_mask"]
    reads = [ours.__getitem__, theirs.__getitem__]
    found = effective_averages(ours, reads, lambda _, tensors, base: (tensors[0] + tensors[1]) / 2)
    assert set(found) == {"other.weight", "other.weight_fixed", "other.weight_mask"}
    expected = np.zeros((3, 2))
    for i in range(3):
        for j in range(2):
            for state in (ours, theirs):
                w, f, d = (float(state[f"other.weight{s}"][i, j]) for s in ("", "_fixed", "_mask"))
                expected[i, j] += 0.5 * (f + d * w)
    np.testing.assert_allclose(found["other.weight"].numpy(), expected, rtol=1e-6)


def test_an_asymmetric_and_an_ordinary_checkpoint_are_not_mixed(pair, tmp_path):
    folder, _ = pair
    for first, second in (("a", "b-folded"), ("a-folded", "b")):
        with pytest.raises(
            MergeidError, match=r"has asymmetric layers and .* has ordinary ones.*fold the former first"
        ):
            mergeid.merge(
                folder / f"{first}.safetensors",
                folder / f"{second}.safetensors",
                output=tmp_path / "m.safetensors",
                match="never",
            )
    assert not (tmp_path / "m.safetensors").exists()


def test_the_plan_says_whether_the_fixed_parts_are_shared(pair, tmp_path):
    folder, models = pair
    plan = mergeid.plan(folder / "a.safetensors", folder / "b.safetensors", match="never", arch=ARCH)
    count = sum(k.endswith("_fixed") for k in models[0].state_dict())
    assert f"both networks have the same fixed parts (F, D) in all {count} asymmetric weights" in plan.notes
    state = models[1].state_dict()
    state["conv1.0.weight_fixed"] = -state["conv1.0.weight_fixed"]
    other = file_of(state, tmp_path / "o.safetensors")
    notes = mergeid.plan(folder / "a.safetensors", other, match="never", arch=ARCH).notes
    assert any(f"1 of {count} asymmetric weights differ (first: 'conv1.0.weight')" in n for n in notes)
    ordinary = mergeid.plan(*(folder / f"{n}-folded.safetensors" for n in "ab"), match="never", arch=ARCH)
    assert not any("fixed parts" in n for n in ordinary.notes)


# -- folding files and live modules -------------------------------------------------------------------------


def test_fold_file_writes_the_plain_checkpoint(pair, tmp_path):
    folder, models = pair
    written = mnn.fold_file(folder / "a.safetensors", tmp_path / "f.safetensors")
    assert written[0] == tmp_path / "f.safetensors"
    found, expected = load_file(written[0]), mnn.fold(models[0])
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    with pytest.raises(MergeidError, match="has no asymmetric layers"):
        mnn.fold_file(written[0], tmp_path / "g.safetensors")
    with pytest.raises(MergeidError, match="exists"):
        mnn.fold_file(folder / "a.safetensors", tmp_path / "f.safetensors")
    source, target = (open_checkpoint(p) for p in (folder / "a.safetensors", written[0]))
    assert target.metadata == source.metadata


@pytest.mark.parametrize("match", ["auto", "always"])
def test_live_modules_merge_with_what_they_share(match):
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(6, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 3)
        )
        mnn.asymmetrise(model, "w", generator=seeded(2))
        return model.eval()

    a, b = make(0), make(1)
    x = torch.randn(64, 6, generator=seeded(3))
    direct = mergeid.merge(a, b, match="never").state
    shared = frozen(a.state_dict())
    assert shared and all(torch.equal(direct[k], v) for k, v in shared.items())
    # whatever is matched, the result is the average of the two functions' weights
    how = {"repair": "none", "refuse_above": float("inf")}
    done = mergeid.merge(a, b, data=[{"arg0": v} for v in x], example_inputs=x[:2], match=match, **how)
    folded = mnn.fold(a), done.plan.graph.apply_state(done.plan.element, mnn.fold(b))
    for name, value in mnn.fold_state(done.state).items():
        torch.testing.assert_close(value, (folded[0][name] + folded[1][name]) / 2)


@pytest.mark.parametrize("match", ["never", "always"])
def test_the_barrier_is_that_of_the_folded_networks(pair, tmp_path, match):
    folder, _ = pair
    generator = np.random.default_rng(0)
    images = generator.standard_normal((48, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=images, labels=generator.integers(0, 4, 48))
    options = {"data": tmp_path / "data.npz", "points": 3, "match": match, "arch": ARCH, "dtype": "float64"}
    found, expected = (
        mergeid.barrier(folder / f"a{end}.safetensors", folder / f"b{end}.safetensors", **options)
        for end in ("", "-folded")
    )
    # the ends are the same networks; between them, too, if the two pairs were matched alike
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-5)
    assert found.losses[-1] == pytest.approx(expected.losses[-1], rel=1e-5)
    if match == "never":
        assert found.losses[1] == pytest.approx(expected.losses[1], rel=1e-5)
    else:
        plan = mergeid.plan(
            folder / "a.safetensors", folder / "b.safetensors", data=options["data"], match=match, arch=ARCH
        )
        aligned = plan.graph.apply_state(plan.element, load_file(folder / "b-folded.safetensors"))
        file_of(aligned, tmp_path / "b.safetensors")
        options["match"] = "never"
        again = mergeid.barrier(folder / "a-folded.safetensors", tmp_path / "b.safetensors", **options)
        assert found.losses[1] == pytest.approx(again.losses[1], rel=1e-5)


def test_a_gated_checkpoint_is_loaded_and_merged(tmp_path):
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = plain()
        images = torch.randn(2, 3, 32, 32, generator=seeded(7))
        mnn.asymmetrise(model, "sigma", generator=seeded(2), example_inputs=images)
        return model.eval()

    a, b = make(0), make(1)
    # as a wrapper writes it: one prefix before every name
    paths = [
        file_of({f"module.{k}": v for k, v in m.state_dict().items()}, tmp_path / f"{n}.safetensors")
        for n, m in (("a", a), ("b", b))
    ]
    x = torch.randn(2, 3, 48, 48, generator=seeded(3))
    assert torch.equal(mergeid.load(paths[0], arch=ARCH).model(x), a(x))
    done = mergeid.merge(*paths, output=tmp_path / "m.safetensors", match="never")
    merged = load_file(done.files[0])
    gates = [k for k in merged if k.endswith("gate_fixed")]
    assert gates and all(torch.equal(merged[k], a.state_dict()[k.removeprefix("module.")]) for k in gates)
    with pytest.raises(MergeidError, match="no ordinary form"):
        mnn.fold_file(paths[0], tmp_path / "f.safetensors")


def test_a_state_with_a_layer_that_the_model_lacks_is_refused():
    state = mnn.asymmetric_layer(nn.Linear(8, 4), generator=seeded()).state_dict()
    with pytest.raises(MergeidError, match="Linear has no layer 'fc'"):
        mnn.restore(nn.Linear(8, 4), {f"fc.{k}": v for k, v in state.items()})


@pytest.mark.parametrize("name", ["vit", "gpt2", "bert"])
def test_tables_and_tied_heads_as_files(name, tmp_path):
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if name == "vit":
            model = timm.create_model("test_vit", num_classes=4)
        else:
            small = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
            model = {
                "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **small)),
                "bert": lambda: BertForMaskedLM(
                    BertConfig(
                        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, **small
                    )
                ),
            }[name]()
        mnn.asymmetrise(model, "w", generator=seeded(9))
        return model.eval()

    models = [make(0), make(1)]
    for end, model in zip("ab", models, strict=True):
        if name == "vit":
            file_of(model.state_dict(), tmp_path / f"{end}.safetensors")
        else:
            model.save_pretrained(tmp_path / end)
    paths = [tmp_path / (f"{end}.safetensors" if name == "vit" else end) for end in "ab"]
    x = torch.randn(2, 3, 160, 160, generator=seeded(3)) if name == "vit" else torch.arange(12).reshape(2, 6)

    def outputs(model: nn.Module) -> Tensor:
        with torch.no_grad():
            out = model(x)
        return out if name == "vit" else out.logits

    for path, model in zip(paths, models, strict=True):
        torch.testing.assert_close(outputs(mergeid.load(path).model), outputs(model))
    # no data: the fixed parts reach from the inputs to every space
    plan = mergeid.plan(*paths)
    assert plan.evidence == "structure", [s.certificate.why for s in plan.spaces]
    merged = mergeid.merge(*paths, output=tmp_path / ("m.safetensors" if name == "vit" else "m"))
    result = mergeid.load(merged.files[0] if name == "vit" else tmp_path / "m").model
    middle = copy.deepcopy(models[0])
    other = models[1].state_dict()
    middle.load_state_dict(
        {k: (v + other[k]) / 2 if v.is_floating_point() else v for k, v in middle.state_dict().items()}
    )
    torch.testing.assert_close(outputs(result), outputs(middle))
    # folded, for tools that know the ordinary architecture only
    folded = mnn.fold_file(paths[0], tmp_path / ("f.safetensors" if name == "vit" else "f"))
    plain = mergeid.load(folded[0] if name == "vit" else tmp_path / "f")
    assert not stored.is_asymmetric(plain.model.state_dict())
    torch.testing.assert_close(outputs(plain.model), outputs(models[0]))
    if name != "vit":
        again = type(models[0]).from_pretrained(tmp_path / "f")
        torch.testing.assert_close(outputs(again.eval()), outputs(models[0]))
