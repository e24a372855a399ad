"""The command line as a user meets it: what is printed where, exit codes, files, and how soon."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Done, files_in, mergeid
from safetensors.torch import load_file, save_file

from mergeid.commands.app import app
from mergeid.commands.cli import run
from mergeid.neuron_graph import NeuronGraph

Inside = Callable[..., Done]
VERBS = sorted(command.name or "" for command in app.registered_commands)
HEAVY = ("torch", "transformers", "timm", "accelerate", "numpy", "scipy", "matplotlib", "pandas", "sklearn")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.safetensors; b.safetensors, its fine-tune in all but name; data.npz with 64 labelled images for both."""
    import timm

    folder = tmp_path_factory.mktemp("networks")
    x = np.random.default_rng(0).standard_normal((64, 1, 32, 32), dtype=np.float32)
    np.savez(folder / "data.npz", x=x, labels=np.arange(64) % 4)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4, in_chans=1).train()
    model(torch.from_numpy(x))  # statistics that a trained network would have
    state = model.state_dict()
    save_file(state, folder / "a.safetensors", metadata={"author": "nobody"})
    moved = {k: v + 0.02 * v.std() * torch.randn_like(v) if v.is_floating_point() and v.numel() > 1 else v
             for k, v in state.items()}  # fmt: skip
    save_file(moved, folder / "b.safetensors")
    return folder


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inside:
    """`mergeid` of command_line.py without a process of its own (and its imports); works in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object, columns: int = 80) -> Done:
        monkeypatch.setenv("COLUMNS", str(columns))
        there = files_in(tmp_path)
        code = run([str(word) for word in words])
        stdout, stderr = capsys.readouterr()
        after = files_in(tmp_path)
        return Done(code, stdout, stderr, [name for name in after if after[name] != there.get(name)])

    return call


def test_help_loads_nothing_heavy() -> None:
    code = f"import sys, mergeid.commands.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    done = subprocess.run([sys.executable, "-m", "mergeid", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [60, 80])
def test_help_of_every_verb(inside: Inside, verb: str, columns: int) -> None:
    done = inside(verb, "--help", columns=columns)
    assert done.code == 0 and done.stderr == "" and "--json" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "\x1b" not in done.stdout
    assert not re.search(r"<(bool|str|list)|\d{7}|``", done.stdout), "Python's types, bounds that nobody meets, markup"


def test_version(tmp_path: Path) -> None:
    from importlib.metadata import version

    assert mergeid("--version", cwd=tmp_path).stdout == f"mergeid {version('mergeid')}\n"
    assert mergeid(cwd=tmp_path).stdout.startswith("\n") or "merge" in mergeid(cwd=tmp_path).stdout


def test_installed_command() -> None:
    command = Path(sys.executable).parent / "mergeid"
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("mergeid ")


@pytest.mark.parametrize("columns", [80, 120])
def test_graph_table(inside: Inside, columns: int) -> None:
    done = inside("graph", "resnet18", columns=columns)
    assert (done.code, done.lines, done.written) == (0, [], [])
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= columns and "\x1b" not in done.stdout
    assert lines[0].split() == ["timm/resnet18:", "12", "spaces"]
    assert "layer1.*.conv1.weight[0]" in done.stdout and "S(512)" in done.stdout
    text = " ".join(done.stdout.split())
    assert "Can be permuted: 99.99 % of 11,699,112 parameters (running statistics included)." in text
    assert "Verified: 2 random permutations" in done.stdout


def test_graph_all_names_every_axis(inside: Inside) -> None:
    done = inside("graph", "timm/test_resnet", "--all", columns=140)
    written = inside("graph", "timm/test_resnet", "--json")
    graph = NeuronGraph.from_json(written.stdout)
    for space in graph.spaces:
        for axis in space.axes:
            assert f"{axis.tensor}[{axis.axis}]" in done.stdout


def test_graph_json(inside: Inside, networks: Path, tmp_path: Path) -> None:
    model = networks / "a.safetensors"
    stdout = inside("graph", model, "--json")
    assert (stdout.code, stdout.lines, stdout.written) == (0, [], [])
    file = inside("graph", model, "--json", "graph.json")
    assert (file.code, file.stdout, file.written) == (0, "", ["graph.json"])
    graphs = [json.loads(stdout.stdout), json.loads((tmp_path / "graph.json").read_text())]
    for words in (["--json", "-", model], ["--json", model], [model, "-o", "o.json", "--json", "--seed", "0"]):
        graphs.append(json.loads(inside("graph", *words).stdout))
    graphs.append(json.loads((tmp_path / "o.json").read_text()))
    assert all(g == graphs[0] for g in graphs)
    assert graphs[0]["format"] == "mergeid.graph/1" and graphs[0]["verified"]["max_relative_error"] < 1e-6
    assert set(graphs[0]["tensors"]) == {k for k, v in load_file(model).items() if v.is_floating_point()}


def test_graph_why(inside: Inside) -> None:
    free = inside("graph", "resnet18", "--why", "layer1.0.conv1.weight[0]")
    assert "64 of 64 positions belong to space" in free.stdout and "layer1.*.conv2.weight[1]" in free.stdout
    frozen = inside("graph", "resnet18", "--why", "fc.weight[0]", "--json")
    answer = json.loads(frozen.stdout)
    assert answer["spaces"] == [] and "output" in answer["frozen"]


def test_scramble_keeps_the_function(inside: Inside, networks: Path, tmp_path: Path) -> None:
    import timm

    words = ("scramble", networks / "a.safetensors", "-o", "s.safetensors", "--seed", 7)
    done = inside(*words, "--json")
    result = json.loads(done.stdout)
    assert done.code == 0 and done.lines == []
    assert result["moved_share"] > 0.95 and result["max_relative_error"] < 1e-6
    model = timm.create_model("test_resnet", num_classes=4, in_chans=1).double().eval()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for path in (networks / "a.safetensors", tmp_path / "s.safetensors"):
        model.load_state_dict(load_file(path))
        with torch.no_grad():
            outputs.append(model(x))
    assert (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max() < 1e-6
    again = inside(*words)
    assert again.code == 2 and "exists already" in again.lines[-1]
    forced = inside(*words, "--force")
    assert forced.code == 0 and "s.safetensors" in forced.stdout


def test_plan_and_merge(inside: Inside, networks: Path, tmp_path: Path) -> None:
    pair = (networks / "a.safetensors", networks / "b.safetensors")
    plan = inside("plan", *pair, "--json", "--data", networks / "data.npz", "--strict")
    found = json.loads(plan.stdout)
    assert (plan.code, plan.lines, plan.written) == (0, [], [])
    assert found["verdict"] == "direct" and {s["decision"] for s in found["spaces"]} == {"direct"}
    merged = inside("merge", *pair, "--json", "--data", networks / "data.npz", "--no-repair")
    result = json.loads(merged.stdout)
    assert result["verdict"] == "direct" and sorted(merged.written) == ["merged.safetensors", "mergeid.json"]
    a, b, out = (load_file(p) for p in (*pair, tmp_path / "merged.safetensors"))
    for name in a:
        if a[name].is_floating_point():
            assert torch.equal(out[name], ((a[name].double() + b[name].double()) / 2).float())
    repaired = inside("merge", *pair, "--data", networks / "data.npz", "--repair", "bn", "-o", "r.safetensors")
    assert "Chosen: plain+bn, 0." in repaired.stdout
    assert repaired.code == 0 and "re-estimated on the calibration data" in repaired.stdout
    assert not torch.equal(load_file(tmp_path / "r.safetensors")["bn1.running_mean"], out["bn1.running_mean"])
    words = ("merge", *pair, "--data", networks / "data.npz", "-o", "n.safetensors", "--refuse-above", "0")
    refused = inside(*words)
    assert (refused.code, refused.written) == (1, []) and "--refuse-above is 0; nothing was written" in refused.stderr
    assert inside(*words, "--force").written == ["n.mergeid.json", "n.safetensors"]
    record = json.loads((tmp_path / "n.mergeid.json").read_text())["comparison"]
    assert record["distance"] > 0 and record["unit"] == "nats" and record["examples"] > 0


@pytest.mark.parametrize("columns", [80, 120])
def test_plan_of_a_scrambled_pair(inside: Inside, networks: Path, tmp_path: Path, columns: int) -> None:
    inside("scramble", networks / "a.safetensors", "-o", "s.safetensors", "--seed", 3)
    words = ("plan", networks / "b.safetensors", "s.safetensors", "--data", networks / "data.npz", "-o", "plan.json")
    done = inside(*words, columns=columns)
    assert done.code == 0 and done.written == ["plan.json"]
    assert "Verdict: match first" in done.stdout
    lines = done.stdout.splitlines()
    assert f"Next: mergeid merge {networks}/b.safetensors s.safetensors --data" in done.stdout  # one line, to be copied
    assert max(len(x) for x in lines if not x.startswith("Next: ")) <= columns and "\x1b" not in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["verdict"] == "match"
    aligned = inside("align", "s.safetensors", "--to", networks / "b.safetensors", "--data", networks / "data.npz")
    assert aligned.code == 0 and "aligned.safetensors" in aligned.stdout
    back, there = load_file(tmp_path / "aligned.safetensors"), load_file(networks / "a.safetensors")
    assert all(torch.equal(back[name], there[name]) for name in there)


def test_barrier(inside: Inside, networks: Path, tmp_path: Path) -> None:
    pair = (networks / "a.safetensors", networks / "b.safetensors", "--data", networks / "data.npz", "--points", 3)
    done = inside("barrier", *pair, "--plot", "p.svg", "-o", "b.json", "--repair")
    assert done.code == 0 and sorted(done.written) == ["b.json", "p.svg"] and "\x1b" not in done.stdout
    assert "barrier" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    again = inside("barrier", *pair, "--repair", "--json")
    assert json.loads(again.stdout) == json.loads((tmp_path / "b.json").read_text())
    itself = (networks / "a.safetensors", networks / "a.safetensors", "--data", networks / "data.npz", "--points", 3)
    same = inside("barrier", *itself, "--json")
    assert json.loads(same.stdout)["barrier"] == 0


def test_adapters(inside: Inside) -> None:
    done = inside("adapters", "--json")
    rows = {row["adapter"]: row for row in json.loads(done.stdout)}
    assert {"timm", "transformers"} <= set(rows) and rows["timm"]["architectures"] > 1000
    assert inside("adapters", "timm/resnet1?").stdout == "timm/resnet18\n"
    nothing = inside("adapters", "no*such")
    assert (nothing.code, nothing.stdout) == (1, "")


def _in_terminal(words: list[str], cwd: Path) -> tuple[int, str]:
    """Runs a command whose stdin, stdout and stderr are a terminal; its exit code and everything it shows."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(cwd)
        os.environ |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        os.execv(sys.executable, [sys.executable, "-m", "mergeid", *words])
    shown = b""
    while True:
        if not select.select([terminal], [], [], 120)[0]:
            os.kill(process, signal.SIGKILL)
            raise TimeoutError(shown)
        try:
            block = os.read(terminal, 4096)
        except OSError:
            block = b""
        if not block:
            break
        shown += block
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode()


def test_colours_and_progress_on_a_terminal(networks: Path, tmp_path: Path) -> None:
    words = ["plan", *(str(networks / n) for n in ("a.safetensors", "b.safetensors"))]
    code, shown = _in_terminal([*words, "--data", str(networks / "data.npz")], tmp_path)
    assert code == 0 and "\x1b[32mdirect" in shown and "calibration" in shown


def test_interrupt_is_quiet(networks: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mergeid", "demo", "-o", "d"]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a job in the background is born deaf to interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (tmp_path / "d").exists():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    # Python ends itself by the signal where it struck inside exec(); a shell calls both 130.
    assert process.returncode in (130, -signal.SIGINT) and stdout == "" and "Traceback" not in stderr


def test_reader_that_stops_reading(tmp_path: Path) -> None:
    command = f"{sys.executable} -m mergeid graph timm/test_resnet --json | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == '{"format":' and done.stderr == ""


def test_a_fault_of_mergeid_itself(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, one sentence with the place, and the traceback on request, wherever that stands."""

    def broken() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("mergeid.plugins.adapter_names", broken)
    done = inside("adapters")
    assert done.code == 3 and done.stdout == "" and len(done.lines) == 1
    assert "internal error in " in done.lines[0] and "KeyError: 'a bug'" in done.lines[0]
    assert "--traceback" in done.lines[0]
    for words in (("--traceback", "adapters"), ("adapters", "--traceback")):
        shown = inside(*words)
        assert shown.code == 3 and "Traceback" in shown.stderr and shown.lines[-1] == done.lines[0]


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "not enough memory"),
        (OSError(28, "No space left on device", "there"), "there.*no space left"),
        (PermissionError(13, "Permission denied"), "permission denied"),
    ],
)
def test_what_the_system_refuses(inside: Inside, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str) -> None:
    def refused() -> None:
        raise error

    monkeypatch.setattr("mergeid.plugins.adapter_names", refused)
    done = inside("adapters")
    assert done.code == 2 and len(done.lines) == 1 and re.search(part, done.lines[0])


def test_python_verbs_and_subpackages_of_one_name() -> None:
    code = (
        "import mergeid\n"
        "early = mergeid.merge, mergeid.graph\n"
        "import mergeid.methods.registry, mergeid.neuron_graph.group, mergeid.models.load\n"
        "from mergeid.neuron_graph import NeuronGraph\n"
        "assert callable(mergeid.merge) and callable(mergeid.graph) and callable(mergeid.load)\n"
        "assert mergeid.methods.registry and mergeid.neuron_graph.group\n"
        "assert isinstance(mergeid.graph('timm/test_resnet'), NeuronGraph)\n"
        "assert sorted(set(mergeid.__all__) & set(dir(mergeid))) == sorted(mergeid.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
