"""``mergeid zip`` and ``--transport``, from and to files: what they write loads, does what they say, and is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import files_in
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mergeid
from mergeid.commands.cli import run
from mergeid.errors import MergeidError
from mergeid.io.together import write_together

Refuse = Callable[..., str]


def built(classes: int, state: dict[str, Tensor] | None = None) -> nn.Module:
    model = timm.create_model("test_resnet", num_classes=classes, in_chans=1)
    if state is not None:
        model.load_state_dict(state)
    return model.eval()


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a and b with 4 classes, c with 5; moved, which is a with its neurons in another order; narrow and wide, two
    folders of transformers' ResNet; data.npz."""
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("networks")
    np.savez(folder / "data.npz", x=images().numpy())
    for seed, (name, classes) in enumerate((("a", 4), ("b", 4), ("c", 5))):
        torch.manual_seed(seed)
        model = built(classes).train()
        model(images())
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    a = built(4, load_file(folder / "a.safetensors"))
    graph = mergeid.graph(a)
    element = graph.random_element(torch.Generator().manual_seed(1))
    save_file(graph.apply_state(element, a.state_dict()), folder / "moved.safetensors")
    for seed, (name, sizes) in enumerate((("narrow", [8, 16]), ("wide", [12, 20]))):
        torch.manual_seed(seed)
        config = ResNetConfig(
            num_channels=1, embedding_size=sizes[0], hidden_sizes=sizes, depths=[1, 1], layer_type="basic", num_labels=4
        )
        model = ResNetForImageClassification(config).train()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None
        with torch.no_grad():
            model(images())  # its statistics are those of these inputs, as a trained network's are
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """The one sentence of a command that is refused, having written nothing."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> str:
        assert run([str(word) for word in words]) == 2
        stdout, stderr = capsys.readouterr()
        lines = [line for line in stderr.splitlines() if line.startswith("mergeid: error: ")]
        assert stdout == "" and len(lines) == 1 and "Traceback" not in stderr
        assert files_in(tmp_path) == {}
        return lines[0]

    return call


def done(*words: object) -> None:
    assert run([str(word) for word in words]) == 0


def two(networks: Path, *names: str, data: bool = True) -> list[object]:
    files = [networks / (n if n in ("narrow", "wide") else f"{n}.safetensors") for n in names]
    return [*files, *(["--data", networks / "data.npz"] if data else [])]


def test_two_heads_of_other_classes(networks: Path, tmp_path: Path) -> None:
    done("zip", *two(networks, "a", "c"), "-o", tmp_path / "zipped")
    states = [load_file(tmp_path / "zipped" / part / "model.safetensors") for part in "ab"]
    record = json.loads((tmp_path / "zipped" / "mergeid.json").read_text())
    trunk = record["zip"]["trunk"]
    assert not [k for k in trunk if k.startswith("fc.")]
    assert set(states[0]) - set(trunk) == {"fc.weight", "fc.bias"} | {k for k in states[0] if "num_batches" in k}
    for key in trunk:
        assert torch.equal(states[0][key], states[1][key]), key
    assert torch.equal(states[1]["fc.bias"], load_file(networks / "c.safetensors")["fc.bias"])
    # each loads alone, and both together with the trunk in memory once
    x = images(4)
    together = mergeid.load_zipped(tmp_path / "zipped")
    with torch.no_grad():
        for state, classes, y in zip(states, (4, 5), together(x), strict=True):
            assert torch.allclose(built(classes, state)(x), y, atol=1e-5)
    first, second = (dict(head.named_parameters()) for head in together.heads)
    assert all((first[k] is second[k]) == (k in trunk) for k in first)
    # what the zip replaced is told with its hash, and it is found in the record
    assert [Path(i["path"]).name for i in record["inputs"]] == ["a.safetensors", "c.safetensors"]


def test_a_network_zipped_with_itself_in_another_order_is_itself(networks: Path, tmp_path: Path) -> None:
    done("zip", *two(networks, "a", "moved"), "--across", "--no-repair", "-o", tmp_path / "zipped")
    x = images()[:4]  # a feature that is silent on the calibration data has no partner
    with torch.no_grad():
        wanted = built(4, load_file(networks / "a.safetensors"))(x)
        both = mergeid.load_zipped(tmp_path / "zipped")(x)
    for y in both:
        assert torch.allclose(y, wanted, atol=1e-3 * float(wanted.abs().max()))


def test_one_head_is_the_mean_of_both(networks: Path, tmp_path: Path) -> None:
    done("zip", *two(networks, "a", "b"), "--no-repair", "-o", tmp_path / "zipped")
    done("zip", *two(networks, "a", "b"), "--no-repair", "--one-head", "-o", tmp_path / "one.safetensors")
    x = images(4)
    with torch.no_grad():
        both = mergeid.load_zipped(tmp_path / "zipped")(x)
        one = built(4, load_file(tmp_path / "one.safetensors"))(x)
    assert torch.allclose(one, (both[0] + both[1]) / 2, atol=1e-4 * float(one.abs().max()))


def test_a_zip_up_to_a_layer_leaves_the_rest_as_it_was(networks: Path, tmp_path: Path) -> None:
    done("zip", *two(networks, "a", "c"), "--no-repair", "--up-to", "layer2", "-o", tmp_path / "zipped")
    for part, name in (("a", "a"), ("b", "c")):
        now = load_file(tmp_path / "zipped" / part / "model.safetensors")
        before = load_file(networks / f"{name}.safetensors")
        kept = {k for k in now if torch.equal(now[k], before[k])}
        assert {k for k in now if k.startswith(("layer4", "fc"))} <= kept
        assert "layer1.0.conv1.weight" not in kept


def test_live_modules_and_files_are_zipped_alike(networks: Path, tmp_path: Path) -> None:
    models = [built(4, load_file(networks / f"{n}.safetensors")) for n in "ab"]
    data = [{"arg0": x} for x in images()]
    live = mergeid.zip_models(*models, data=data, example_inputs=images(2), one_head=True)
    done("zip", *two(networks, "a", "b"), "--one-head", "-o", tmp_path / "one.safetensors")
    written = load_file(tmp_path / "one.safetensors")
    (state,) = live.states
    assert set(state) == set(written)
    assert all(torch.allclose(v.float(), written[k].float(), atol=1e-4) for k, v in state.items())
    assert all(torch.equal(v, m.state_dict()[k]) for m, n in zip(models, "ab", strict=True)
               for k, v in load_file(networks / f"{n}.safetensors").items())  # fmt: skip


def test_what_is_no_zip(networks: Path, refuse: Refuse) -> None:
    a_and_c = two(networks, "a", "c")
    assert "--one-head needs models with the same classes" in refuse("zip", *a_and_c, "--one-head")
    assert "no module 'layer9'" in refuse("zip", *a_and_c, "--up-to", "layer9")
    first = "resnet.embedder.embedder.convolution"  # writes a residual stream
    assert "also written by later layers" in refuse("zip", *two(networks, "narrow", "narrow"), "--up-to", first)
    assert "leave out --up-to" in refuse("zip", *a_and_c, "--up-to", "layer2", "--one-head")
    assert "name of a file" in refuse("zip", *a_and_c, "-o", "x.safetensors")
    assert "--transport" in refuse("zip", *two(networks, "narrow", "wide"))
    assert "mergeid zip" in refuse("merge", *a_and_c, "--method", "zip")
    assert "at least 16" in refuse("zip", *a_and_c, "--limit", "8")
    with pytest.raises(MergeidError, match="not an output of mergeid zip"):
        mergeid.load_zipped(networks)


def test_several_checkpoints_appear_together_or_not_at_all(tmp_path: Path) -> None:
    def write(place: Path) -> None:
        place.mkdir()
        (place / "w").write_text("new")

    def fail(place: Path) -> None:
        raise MergeidError("disk full")

    with pytest.raises(MergeidError, match="disk full"):
        write_together(tmp_path / "out", {"a": write, "b": fail}, record={})
    assert files_in(tmp_path) == {}
    files = write_together(tmp_path / "out", {"a": write, "b": write}, record={"format": "x"})
    assert [str(f.relative_to(tmp_path)) for f in files] == ["out/a/w", "out/b/w", "out/mergeid.json"]
    with pytest.raises(MergeidError, match="exists already"):
        write_together(tmp_path / "out", {"a": write}, record={})
    with pytest.raises(MergeidError, match="disk full"):
        write_together(tmp_path / "out", {"a": fail}, record={}, force=True)
    assert [str(p) for p in files if p.exists()] == [str(p) for p in files]
    write_together(tmp_path / "out", {"a": write}, record={}, force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "mergeid.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("data", [False, True])
def test_transport_of_the_same_network_in_another_order(networks: Path, tmp_path: Path, data: bool) -> None:
    """The plan between a network and itself is nearly the permutation between them."""
    out = tmp_path / "out.safetensors"
    done("align", networks / "moved.safetensors", "--to", networks / "a.safetensors", "--transport", "-o", out,
         *two(networks, data=data))  # fmt: skip
    x = images()[:8]
    with torch.no_grad():
        moved, wanted, unlike = (built(4, load_file(f))(x) for f in (out, *two(networks, "a", "b", data=False)))
    assert float((moved - wanted).norm() / (unlike - wanted).norm()) < 0.1


def test_transport_from_another_width(networks: Path, tmp_path: Path) -> None:
    pair = two(networks, "narrow", "wide", data=False)
    done("merge", *pair, "--transport", "-o", tmp_path / "merged")
    done("align", pair[1], "--to", pair[0], "--transport", "-o", tmp_path / "aligned")
    done("merge", pair[0], tmp_path / "aligned", "--match", "never", "-o", tmp_path / "plain")
    narrow, merged, plain = (load_file(p / "model.safetensors") for p in (pair[0], tmp_path / "merged",
                                                                         tmp_path / "plain"))  # fmt: skip
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in narrow.items()}
    assert all(torch.equal(v, plain[k]) for k, v in merged.items())
    assert not torch.equal(merged["classifier.1.weight"], narrow["classifier.1.weight"])
    assert json.loads((tmp_path / "merged/config.json").read_text())["hidden_sizes"] == [8, 16]
    record = json.loads((tmp_path / "merged/mergeid.json").read_text())
    assert record["verdict"] == "transported"
    assert [Path(i["path"]).name for i in record["inputs"]] == ["narrow", "wide"]
    assert all(i["sha256"] for i in record["inputs"])


def test_transport_with_data_is_repaired(networks: Path, tmp_path: Path) -> None:
    gaps = []
    for stage in ("none", "bn"):
        out = tmp_path / stage
        done("merge", *two(networks, "narrow", "wide"), "--transport", "--repair", stage, "--force", "-o", out)
        model = mergeid.load(out).model
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        seen: list[Tensor] = []
        norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(images())
        gaps.append((seen[0].var((0, 2, 3)) / norm.running_var).log().abs().max())
    assert gaps[1] < gaps[0] / 2  # not nothing: what few images say is shrunk by its sampling error


def test_what_transport_refuses(networks: Path, refuse: Refuse) -> None:
    pair = two(networks, "narrow", "wide", data=False)
    assert "--match cannot be combined" in refuse("merge", *pair, "--transport", "--match", "always")
    assert "--matcher cannot be combined" in refuse("merge", *pair, "--transport", "--matcher", "weight")
    assert "--base cannot be combined" in refuse("merge", *pair, "--transport", "--method", "ties", "--base", pair[0])
    assert "merged with --transport" in refuse("merge", *pair)
    assert "--skip" in refuse("merge", *two(networks, "a", "c", data=False), "--transport")
    assert "which" in refuse("merge", *two(networks, "a", "narrow", data=False), "--transport")


def test_an_earlier_output_outlives_a_failed_publication(tmp_path, monkeypatch):
    """Even where it cannot be put back: it stays where it was set aside."""

    def write(place):
        place.mkdir()
        (place / "w").write_text("earlier")

    write_together(tmp_path / "out", {"a": write}, record={})
    rename, calls = os.rename, []

    def once(source, target):
        calls.append(source)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(MergeidError, match="disk full"):
        write_together(tmp_path / "out", {"a": write}, record={}, force=True)
    assert len(calls) == 3
    assert [p.read_text() for p in tmp_path.rglob("w")] == ["earlier"]
