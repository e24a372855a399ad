"""Every kind of bad input, given to the real command: exit code 2, one sentence, no traceback, nothing written."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Done, mergeid
from safetensors.torch import load_file, save_file

from mergeid.commands.app import answer
from mergeid.errors import MergeidError
from mergeid.io.output import check_output

SHAPES = {
    "conv.weight": (8, 3, 3, 3),
    "conv.bias": (8,),
    "mid.weight": (8, 8),
    "mid.bias": (8,),
    "fc.weight": (4, 8),
    "fc.bias": (4,),
}
CLASSES, SIDE = 4, 32


def tensors(seed: int, dtype: torch.dtype = torch.float32, **other: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A tiny network's tensors; `other` changes shapes (underscores stand for dots)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**SHAPES, **{name.replace("_", "."): shape for name, shape in other.items()}}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a good pair, a.safetensors and b.safetensors."""
    save_file(tensors(1), tmp_path / "a.safetensors")
    save_file(tensors(2), tmp_path / "b.safetensors")
    return tmp_path


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two real networks that can run, a.safetensors and b.safetensors, 4 classes, grey images."""
    import timm

    folder = tmp_path_factory.mktemp("networks")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=CLASSES, in_chans=1)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return folder


def refused(done: Done, *parts: str, code: int = 2) -> None:
    """One sentence that says all of `parts` (regular expressions), and nothing else happened."""
    assert done.code == code, (done.code, done.stderr)
    assert done.stdout == ""
    assert len(done.lines) == 1, done.stderr
    assert done.lines[0].startswith("mergeid: error: ")
    assert "Traceback" not in done.stderr
    for part in parts:
        assert re.search(part, done.lines[0]), (part, done.lines[0])
    assert done.written == []


def all_refused(cwd: Path, *cases: tuple[list[object], list[str]]) -> None:
    """`refused` for several commands that may run side by side, since none of them writes anything."""
    with ThreadPoolExecutor(2) as pool:
        for done, (_, parts) in zip(pool.map(lambda c: mergeid(*c[0], cwd=cwd), cases), cases, strict=True):
            refused(done, *parts)


def merged(done: Done, *warnings: str) -> None:
    """It went through, with these warnings and no others."""
    assert done.code == 0, done.stderr
    assert len(done.lines) == len(warnings), done.stderr
    for line, part in zip(done.lines, warnings, strict=True):
        assert line.startswith("mergeid: warning: ")
        assert re.search(part, line), (part, line)


def test_missing_file(work: Path) -> None:
    refused(
        mergeid("merge", "a.safetensors", "c.safetensors", cwd=work), "no such file or folder: c.safetensors", "expect"
    )
    refused(mergeid("plan", "no_such_folder/", "b.safetensors", cwd=work), "no such file or folder: no_such_folder/")


def test_missing_file_in_every_verb(work: Path) -> None:
    says = ["no such file.*c.safetensors"]
    all_refused(
        work,
        (["graph", "c.safetensors"], says),
        (["scramble", "c.safetensors", "-o", "s.safetensors"], says),
        (["align", "c.safetensors", "--to", "a.safetensors"], says),
        (["barrier", "a.safetensors", "c.safetensors", "--data", "d.npz"], says),
    )


def test_not_safetensors(work: Path) -> None:
    (work / "text.safetensors").write_text("these are not the weights you are looking for, although there are many")
    done = mergeid("merge", "a.safetensors", "text.safetensors", cwd=work)
    refused(done, "text.safetensors is not a safetensors file", "expected")
    torch.save(tensors(3), work / "pickle.safetensors")
    done = mergeid("merge", "a.safetensors", "pickle.safetensors", cwd=work)
    refused(done, "pickle.safetensors is a PyTorch pickle", "save it with")


def test_truncated_file(work: Path) -> None:
    whole = (work / "b.safetensors").read_bytes()
    (work / "cut.safetensors").write_bytes(whole[:-100])
    done = mergeid("merge", "a.safetensors", "cut.safetensors", cwd=work)
    refused(done, "cut.safetensors is truncated", f"{len(whole):,} bytes", f"{len(whole) - 100:,}", "again")
    (work / "stub.safetensors").write_bytes(whole[:40])
    refused(mergeid("merge", "a.safetensors", "stub.safetensors", cwd=work), "stub.safetensors is truncated")


def test_different_architectures(work: Path) -> None:
    save_file({"blocks.0.w": torch.ones(3, 3), "blocks.0.b": torch.ones(3)}, work / "other.safetensors")
    done = mergeid("merge", "a.safetensors", "other.safetensors", cwd=work)
    refused(done, "a.safetensors and other.safetensors are different architectures", "0 of 8", "expected")


def test_empty_file(work: Path) -> None:
    (work / "empty.safetensors").touch()
    done = mergeid("merge", "a.safetensors", "empty.safetensors", cwd=work)
    refused(done, r"empty.safetensors is empty \(0 bytes\)", "expected", "again")


EMPTY = {
    "merge a.safetensors b.safetensors --match never -o @": "-o",
    "merge a.safetensors b.safetensors --match never --output=": "--output",
    "merge a.safetensors b.safetensors --data @ -o m.safetensors": "--data",
    "merge a.safetensors b.safetensors --base= -o m.safetensors": "--base",
    "merge a.safetensors b.safetensors --report @ -o m.safetensors": "--report",
    "merge a.safetensors @ --match never -o m.safetensors": "an argument of mergeid merge",
    "merge --force @ b.safetensors -o m.safetensors": "an argument of mergeid merge",
    "merge -o m.safetensors -- @ b.safetensors": "an argument of mergeid merge",
    "align b.safetensors --to @ -o m.safetensors": "--to",
    "scramble a.safetensors -o @": "-o",
    "plan a.safetensors b.safetensors --output @": "--output",
    "graph a.safetensors --json @": "--json",
    "graph @": "an argument of mergeid graph",
    "barrier a.safetensors b.safetensors --data x.npz --plot=": "--plot",
    "extract a.safetensors --base @ -o m": "--base",
}
"""@ stands for a word without letters."""


@pytest.mark.parametrize("line", EMPTY)
def test_names_that_are_empty(
    line: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parser takes them for the working directory, which messages then spoke of."""
    monkeypatch.chdir(work)
    assert answer(["" if word == "@" else word for word in line.split()]) == 2
    said = f"mergeid: error: {EMPTY[line]} is empty; expected the name of a file, folder or model\n"
    assert capsys.readouterr().err == said
    assert sorted(p.name for p in work.iterdir()) == ["a.safetensors", "b.safetensors"]
    with pytest.raises(MergeidError, match="the output has no name; expected"):
        check_output("")


@pytest.mark.parametrize("arch", ["timm/resnet18", "resnet18", "resnet50.a1_in1k", "transformers/bert", "bert"])
def test_a_known_architecture_costs_no_import(arch: str, work: Path) -> None:
    """Of a library that takes seconds; nothing is built for a plain merge."""
    words = ["merge", "a.safetensors", "b.safetensors", "--match", "never", "-o", "m.safetensors", "--arch", arch]
    code = (
        f"import sys; from mergeid.commands.app import answer; code = answer({words}); "
        "sys.exit(code or f'imported {found}' if (found := {'timm', 'transformers', 'diffusers'} & {*sys.modules}) "
        "else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (work / "m.safetensors").is_file()


NOBODY_KNOWS = {
    "nonsense": "unknown architecture 'nonsense'; expected LIBRARY/NAME",
    "timm/nonsense": "timm has no architecture 'nonsense'",
    "transformers/bertt": "no model type 'bertt'",
    "no/config.json": "no such config file",
    "": "--arch is empty; expected a name such as timm/resnet18",
    "  ": "--arch is empty; expected a name such as timm/resnet18",
    "timm": "names a library without an architecture; expected timm/NAME",
    "transformers/": "names a library without an architecture; expected transformers/NAME",
    "torchvision/resnet18": "no library 'torchvision' in 'torchvision/resnet18'; expected LIBRARY/NAME",
    "resnett18": "near names are timm/resnet18",
    "/": "unknown architecture '/'",
    ".": "unknown architecture '.'",
    "../up": "no library '..'",
}
"""--arch to what the refusal says. Some of them are folders, which is no reason to call them inputs."""


@pytest.mark.parametrize("arch", NOBODY_KNOWS)
def test_architectures_that_nobody_knows(
    arch: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no network is built of them."""
    monkeypatch.chdir(work)
    words = ["merge", "a.safetensors", "b.safetensors", "--match", "never", "--arch", arch]
    assert answer([*words, "-o", "m.safetensors"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mergeid: error: ") and NOBODY_KNOWS[arch] in said and said.count("/") < 20
    if not arch.strip():
        assert answer(["plan", "a.safetensors", "b.safetensors", "--arch", arch]) == 2
    assert not (work / "m.safetensors").exists()


def test_other_shapes(work: Path) -> None:
    save_file(tensors(2, fc_weight=(5, 8), fc_bias=(5,)), work / "wide.safetensors")
    done = mergeid("merge", "a.safetensors", "wide.safetensors", cwd=work)
    refused(done, r"'fc.bias' has shape \[4\] in a.safetensors and \[5\] in wide.safetensors", "1 more", "--skip")
    skipped = mergeid("merge", "a.safetensors", "wide.safetensors", "--skip", "fc.*", "--match", "never", cwd=work)
    merged(skipped)
    assert torch.equal(load_file(work / "merged.safetensors")["fc.weight"], tensors(1)["fc.weight"])


def test_extra_and_missing_tensors(work: Path) -> None:
    rest = tensors(2)
    del rest["conv.bias"]
    save_file(rest, work / "less.safetensors")
    save_file({**tensors(2), "head.weight": torch.ones(2, 2)}, work / "more.safetensors")
    done = mergeid("merge", "a.safetensors", "less.safetensors", cwd=work)
    refused(done, "'conv.bias' is only in a.safetensors", "expected the same tensors", "--skip 'conv.bias'")
    done = mergeid("merge", "a.safetensors", "more.safetensors", cwd=work)
    refused(done, "'head.weight' is only in more.safetensors", "--skip 'head.weight'")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_not_a_number(networks: Path, tmp_path: Path, value: float, word: str) -> None:
    broken = load_file(networks / "b.safetensors")
    broken["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    save_file(broken, tmp_path / "broken.safetensors")
    pair = [networks / "a.safetensors", "broken.safetensors"]
    says = ["'layer1.0.conv1.weight' of .*broken.safetensors holds", word, "--skip"]
    all_refused(tmp_path, (["merge", *pair], says), (["merge", *pair, "--match", "never"], says))


def test_output_is_an_input(work: Path) -> None:
    for name in ("a.safetensors", "./b.safetensors"):
        done = mergeid("merge", "a.safetensors", "b.safetensors", "-o", name, "--force", cwd=work)
        refused(done, "is the same file as the input", Path(name).name, "-o")
    os.symlink(work / "a.safetensors", work / "link.safetensors")
    done = mergeid("merge", "a.safetensors", "b.safetensors", "-o", "link.safetensors", "--force", cwd=work)
    refused(done, "is the same file as the input")


def test_output_exists(work: Path) -> None:
    (work / "merged.safetensors").write_text("precious")
    refused(
        mergeid("merge", "a.safetensors", "b.safetensors", cwd=work), "merged.safetensors exists already", "--force"
    )


def _without_override() -> None:
    """Root may write anywhere; a process without this capability may not (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):
        raise OSError("the capability cannot be dropped")


def test_output_folder_not_writable(work: Path) -> None:
    (work / "closed").mkdir(mode=0o555)
    words = ("merge", "a.safetensors", "b.safetensors", "-o", "closed/m.safetensors")
    done = mergeid(*words, cwd=work, before=_without_override)
    refused(done, "output folder .*closed is not writable", "-o")
    done = mergeid("merge", "a.safetensors", "b.safetensors", "-o", "nowhere/m.safetensors", cwd=work)
    refused(done, "output folder .*nowhere does not exist", "-o")


def _small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_disk_full_while_writing(work: Path) -> None:
    big = {"w": torch.ones(100, 100), "v": torch.ones(100, 100)}
    for name in ("big1", "big2"):
        save_file(big, work / f"{name}.safetensors")
    words = ("merge", "big1.safetensors", "big2.safetensors", "--match", "never", "-o", "m.safetensors")
    done = mergeid(*words, cwd=work, before=_small_files_only)
    refused(done, "disk full", "m.safetensors", "nothing was left behind", "-o")


def test_unknown_architecture(networks: Path, tmp_path: Path) -> None:
    a, b = networks / "a.safetensors", networks / "b.safetensors"
    all_refused(
        tmp_path,
        (["merge", a, b, "--arch", "timm/test_resnt"], ["'test_resnt'", "test_resnet"]),
        (["merge", a, b, "--arch", "resnet_18"], ["'resnet_18'", "timm/resnet18"]),
        (["merge", a, b, "--arch", "keras/resnet18"], ["'keras/resnet18'", "timm/resnet18"]),
        (["merge", a, b, "--arch", "timm/resnet18"], ["does not fit timm/resnet18", "test_resnet"]),
    )


def test_architecture_that_nobody_knows(work: Path) -> None:
    done = mergeid("merge", "a.safetensors", "b.safetensors", cwd=work)
    refused(done, "cannot tell the architecture of a.safetensors", "--arch")


def _images(path: Path, channels: int, side: int, classes: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((40, channels, side, side), dtype=np.float32)
    np.savez(path, x=x, labels=np.arange(40) % classes)


def test_data_that_does_not_fit(networks: Path, tmp_path: Path) -> None:
    a, b = networks / "a.safetensors", networks / "b.safetensors"
    _images(tmp_path / "rgb.npz", 3, SIDE, CLASSES)
    _images(tmp_path / "classes.npz", 1, SIDE, CLASSES + 3)
    np.savez(tmp_path / "unlabelled.npz", x=np.zeros((40, 1, SIDE, SIDE), np.float32))
    np.savez(tmp_path / "uneven.npz", x=np.zeros((40, 1, SIDE, SIDE), np.float32), labels=np.zeros(3, int))
    all_refused(
        tmp_path,
        (["merge", a, b, "--data", "rgb.npz"], ["rgb.npz", "3", "1"]),
        (["plan", a, b, "--data", "uneven.npz"], ["uneven.npz", "40", "3"]),
        (["barrier", a, b, "--data", "classes.npz"], ["classes.npz", "label", str(CLASSES)]),
        (["barrier", a, b, "--data", "unlabelled.npz"], ["labels"]),
        (["merge", a, b, "--data", "nowhere/"], ["nowhere", "exist"]),
        (["merge", a, b, "--data", "nowhere:function"], ["nowhere", "import"]),
    )


def test_weights(work: Path) -> None:
    pair = ("merge", "a.safetensors", "b.safetensors", "--match", "never", "--weights")
    refused(mergeid(*pair, "0.5,0.6", cwd=work), r"0.5 \+ 0.6 sum to 1.1, expected 1", "--weights", "--normalize")
    refused(mergeid(*pair, "0.5,0.2,0.3", cwd=work), "3 weights", "2 models", "--weights")
    refused(mergeid(*pair, "half,half", cwd=work), "--weights 'half,half'", "0.5,0.5")
    refused(mergeid(*pair, "nan,1", cwd=work), "--weights")
    merged(mergeid(*pair, "1,3", "--normalize", cwd=work))
    expected = 0.25 * tensors(1)["fc.weight"].double() + 0.75 * tensors(2)["fc.weight"].double()
    assert torch.equal(load_file(work / "merged.safetensors")["fc.weight"], expected.float())


def test_pickle(work: Path) -> None:
    torch.save(tensors(1), work / "a.bin")
    done = mergeid("merge", "a.bin", "b.safetensors", "--match", "never", cwd=work)
    refused(done, "a.bin", "--allow-pickle")
    merged(mergeid("merge", "a.bin", "b.safetensors", "--match", "never", "--allow-pickle", cwd=work))


def test_skip_that_matches_nothing(work: Path) -> None:
    done = mergeid("merge", "a.safetensors", "b.safetensors", "--skip", "head.*", cwd=work)
    refused(done, r"--skip 'head.\*' matches no tensor")


def test_number_format(work: Path) -> None:
    done = mergeid("merge", "a.safetensors", "b.safetensors", "--dtype", "int3", cwd=work)
    refused(done, "'int3'", "bfloat16", "--dtype")


def _folder(path: Path, seed: int, config: dict[str, object], vocabulary: list[str] | None = None) -> None:
    path.mkdir()
    save_file(tensors(seed), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    if vocabulary is not None:
        (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))


def test_other_label_maps_and_tokenizers(tmp_path: Path) -> None:
    labels = {str(i): name for i, name in enumerate(["cat", "dog", "cow", "hen"])}
    _folder(tmp_path / "a", 1, {"model_type": "x", "id2label": labels})
    _folder(tmp_path / "b", 2, {"model_type": "x", "id2label": {**labels, "2": "pig"}})
    done = mergeid("merge", "a", "b", cwd=tmp_path)
    refused(done, "label maps differ", "class 2", "'cow' in a", "'pig' in b", "--skip")
    _folder(tmp_path / "c", 1, {"model_type": "x", "vocab_size": 4}, ["a", "b", "c", "d"])
    _folder(tmp_path / "d", 2, {"model_type": "x", "vocab_size": 4}, ["a", "c", "b", "d"])
    refused(mergeid("merge", "c", "d", cwd=tmp_path), "tokenizers differ", "'b'", "--skip")


def test_quantised(work: Path) -> None:
    quantised = {**tensors(1), "fc.weight": torch.ones(4, 8, dtype=torch.int8)}
    save_file(quantised, work / "q1.safetensors")
    save_file(quantised, work / "q2.safetensors")
    refused(
        mergeid("merge", "q1.safetensors", "q2.safetensors", cwd=work), "'fc.weight'", "I8", "quantised", "dequantise"
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["merge", "a.safetensors"], "Missing argument 'B'"),
        (["merge", "a.safetensors", "b.safetensors", "--frobnicate"], "--frobnicate"),
        (
            ["merge", "a.safetensors", "b.safetensors", "--match", "sometimes"],
            "'--match'.*sometimes.*auto.*never.*always",
        ),
        (["merge", "a.safetensors", "b.safetensors", "--limit", "many"], "--limit is 'many'; expected a whole number"),
        (["frobnicate"], "frobnicate"),
        (["barrier", "a.safetensors", "b.safetensors"], "--data"),
        (["barrier", "a.safetensors", "b.safetensors", "--data", "d.npz", "--plot", "p.gif"], "p.gif.*.png"),
        (["plan", "a.safetensors", "b.safetensors", "-o", "plan.safetensors"], "plan.safetensors.*json"),
        (["graph", "a.safetensors", "--json", "a.safetensors"], "--json a.safetensors"),
        (["graph", "resnet18", "--why", "conv1.weight"], "--why 'conv1.weight'.*TENSOR"),
        (["graph", "resnet18", "--why", "conv1.wight[0]"], "'conv1.wight'.*conv1.weight"),
        (["graph", "resnet18", "--why", "conv1.weight[4]"], "below 4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage(work: Path, words: list[str], part: str) -> None:
    refused(mergeid(*words, cwd=work), part)


def test_same_file_twice(work: Path) -> None:
    merged(mergeid("merge", "a.safetensors", "a.safetensors", "--match", "never", cwd=work), "same file.*a.safetensors")
    back, there = load_file(work / "merged.safetensors"), load_file(work / "a.safetensors")
    assert all(torch.equal(back[name], there[name]) for name in there)


def test_different_number_formats(work: Path) -> None:
    save_file(tensors(2, torch.float16), work / "half.safetensors")
    done = mergeid("merge", "half.safetensors", "a.safetensors", "--match", "never", cwd=work)
    merged(done, "different dtypes.*F16.*half.safetensors.*F32.*a.safetensors.*merged in F32, which.*--dtype")
    assert load_file(work / "merged.safetensors")["fc.bias"].dtype == torch.float32
    chosen = ("--dtype", "bfloat16", "-o", "chosen.safetensors")
    merged(mergeid("merge", "half.safetensors", "a.safetensors", "--match", "never", *chosen, cwd=work))
    assert load_file(work / "chosen.safetensors")["fc.bias"].dtype == torch.bfloat16
