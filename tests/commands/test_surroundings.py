"""What surrounds a command: closed or full streams, a working directory that is gone, variables of the environment."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import PROGRESS, Done, mergeid
from safetensors.torch import save_file

from mergeid.commands.cli import run
from mergeid.errors import MergeidError

PACKAGE = Path(__file__).parents[2] / "mergeid"
MERGE = ("merge", "a.safetensors", "b.safetensors", "--match", "never", "-o", "o.safetensors")


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        save_file({"w": torch.full((64, 64), float(seed))}, tmp_path / f"{name}.safetensors")
    return tmp_path


def closing(*numbers: int) -> Callable[[], None]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize("numbers", [(2,), (0, 1, 2)])
def test_a_closed_stream_never_becomes_the_output(pair: Path, numbers: tuple[int, ...]) -> None:
    """Exit code 3 where progress was to be printed; and the output could have got the number of stderr, and with it
    whatever libraries print there."""
    here = {**os.environ, "HF_HUB_OFFLINE": "1"}
    whole = mergeid(*MERGE[:-1], "whole.safetensors", cwd=pair)
    assert whole.code == 0
    command = [sys.executable, "-m", "mergeid", *MERGE]
    done = subprocess.run(command, cwd=pair, preexec_fn=closing(*numbers), env=here, timeout=300, check=False)
    assert done.returncode == 0
    assert (pair / "o.safetensors").read_bytes() == (pair / "whole.safetensors").read_bytes()


class Full(io.StringIO):
    """A stream onto a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stream", [Full(), None])
def test_nobody_can_be_told_how_far_it_is(
    pair: Path, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None
) -> None:
    from mergeid.commands import work

    monkeypatch.setattr(work, "PLAIN_EVERY", -1.0)
    monkeypatch.chdir(pair)
    monkeypatch.setattr(sys, "stderr", stream)
    assert run(MERGE) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_named(pair: Path, unbuffered: str) -> None:
    for words in (("--version",), ("explain", "--json")):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "mergeid", *words],
                cwd=pair,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
                timeout=300,
                check=False,
            )
        assert done.returncode == 2
        assert re.fullmatch(r"mergeid: error: cannot write .*stdout.*: no space left on device.*\n", done.stderr)


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    from mergeid.io.output import check_output

    with pytest.raises(MergeidError, match="output o cannot be written: the working directory is gone"):
        check_output("o")
    assert run(["explain"]) == 2  # libraries below abort the process there


@pytest.mark.parametrize(
    ("variables", "words", "message"),
    [
        ({"ACCELERATE_USE_CPU": "nonsense"}, ["barrier", "--points", "2"], "Accelerate cannot be set up: .*nonsense"),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, ["plan"], "Accelerate cannot be set up: .*MASTER_ADDR"),
        ({"MPLBACKEND": "nonsense"}, ["barrier", "--points", "2", "--plot", "p.png"], "matplotlib cannot draw p.png: "),
    ],
)
def test_variables_that_libraries_do_not_take(
    tmp_path: Path, variables: dict[str, str], words: list[str], message: str
) -> None:
    import timm

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    data = {"x": torch.rand(8, 1, 32, 32), "y": torch.arange(8) % 3}
    save_file(data, tmp_path / "d.safetensors")
    verb, *more = words
    files = ("a.safetensors", "b.safetensors", "--arch", "timm/test_resnet", "--data", "d.safetensors")
    done = mergeid(verb, *files, *more, cwd=tmp_path, **variables)
    _refused(done, message)


def _refused(done: Done, message: str) -> None:
    lines = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    assert done.code == 2 and len(lines) == 1, (done.code, done.stderr)
    assert re.match(f"mergeid: error: {message}", lines[0]), lines
    assert done.written == []


def test_warnings_as_errors(pair: Path) -> None:
    """A docstring had an escape that is none, which Python's newer versions warn of while they compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in sorted(PACKAGE.rglob("*.py")):
            compile(file.read_text(encoding="utf-8"), str(file), "exec")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--limit", "x"), "--limit is 'x'; expected a whole number; see mergeid merge --help"),
        (("--limit", "1.5"), "--limit is '1.5'; expected a whole number; see mergeid merge --help"),
        (("--limit", "0"), "--limit is '0'; expected at least 1; see mergeid merge --help"),
        (("--seed", str(2**64)), f"seed is {2**64}; expected a whole number from 0 to 2^63 - 1 (option --seed)"),
        (("--refuse-above", "x"), "--refuse-above is 'x'; expected a number; see mergeid merge --help"),
    ],
)
def test_numbers_that_are_none(words: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "a", "b", *words]) == 2
    assert capsys.readouterr().err == f"mergeid: error: {message}\n"


def test_a_seed_that_is_none_starts_no_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--seed", str(2**63), "-o", str(tmp_path / "demo")]) == 2
    assert "2^63 - 1 (option --seed)" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_calibration_that_nothing_reads(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that was mistyped went unnoticed."""
    assert run(["barrier", "a", "b", "--data", "d", "--calibration", "nothing"]) == 2
    assert "--calibration is read for --match, --repair and --solve" in capsys.readouterr().err


def test_a_config_that_makes_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": "many", "num_hidden_layers": 1}
    for name in ("some", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file({"w": torch.zeros(1)}, tmp_path / name / "model.safetensors")
    assert run(["plan", str(tmp_path / "some"), str(tmp_path / "other")]) == 2
    assert f"{tmp_path / 'some'}: config.json does not describe a 'bert' model" in capsys.readouterr().err


def test_a_result_never_becomes_a_part_of_an_input(tmp_path: Path) -> None:
    """``graph a --json a/generation_config.json`` made a file that the next program reads as the model's."""
    from mergeid.io.output import check_files

    folder = tmp_path / "a"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "b.safetensors")
    for name in ("a/config.json", "a/mergeid.json", "a/model.safetensors.index.json", "a/vocab.txt", "config.json"):
        with pytest.raises(MergeidError, match=f"-o .*{name} would be read as a part of the input"):
            check_files({"-o": tmp_path / name}, [str(folder), str(tmp_path / "b.safetensors")])
    for name in ("a/plan.json", "plan.json", "mergeid.json"):
        check_files({"-o": tmp_path / name}, [str(folder), str(tmp_path / "b.safetensors")])
    check_files({"-o": tmp_path / "config.json"}, [str(folder)])


@pytest.mark.parametrize("name", ["new\nline", "\x1b[31m", "\udcff\udcfe", "-x", "%s{0}"])
def test_models_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Bytes that are no UTF-8 ended in an error of ours where the models' origins are told apart."""
    import timm

    monkeypatch.chdir(tmp_path)
    for seed, file in enumerate((f"{name}.safetensors", "b.safetensors")):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_resnet", num_classes=3, in_chans=1).state_dict(), f"x{seed}.safetensors")
        os.rename(f"x{seed}.safetensors", file)
    words = ["merge", "--arch", "timm/test_resnet", "--force", "-o", "o.safetensors", "--resume", "--"]
    assert run([*words, f"{name}.safetensors", "b.safetensors"]) == 0
    assert (tmp_path / "o.safetensors").is_file()
