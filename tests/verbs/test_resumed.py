"""`align` and `scramble` that were killed go on where they were, and write the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mergeid
from mergeid.errors import MergeidError

ARCH = "timm/test_resnet"

KILLED = """
# Every child is killed when it comes to some tensor, and another one goes on. Prints what each of them wrote itself.
import json, os, pathlib, signal, sys
import mergeid
from mergeid.io import stream

place = pathlib.Path(sys.argv[1])
stream.COMMIT = 1  # every tensor counts at once
a, b, arch = place / "a.safetensors", place / "b.safetensors", "timm/test_resnet"
plain = stream.CheckpointWriter.write

def work(verb, output, resume, last=None):
    written = []
    def write(self, name, tensor):
        if len(written) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, name, tensor)
        written.append(name)
    stream.CheckpointWriter.write = write
    if verb == "align":
        mergeid.align(b, a, output=output, resume=resume, match="always", arch=arch)
    else:
        mergeid.scramble(a, output=output, resume=resume, seed=5, arch=arch)
    return len(written)

for verb in ("align", "scramble"):
    whole = work(verb, place / verb / "whole.safetensors", False)
    output, counts = place / verb / "resumed.safetensors", []
    for last in (0, 3, whole // 2, None):
        read, end = os.pipe()
        pid = os.fork()
        if not pid:
            count = work(verb, output, True, last)
            os.write(end, str(count).encode())
            os._exit(0)
        os.close(end)
        status = os.waitpid(pid, 0)[1]
        counts.append("killed" if os.WIFSIGNALED(status) else int(os.read(read, 20)))
    print(json.dumps({"whole": whole, "counts": counts}), flush=True)
"""


def state(seed: int) -> dict[str, torch.Tensor]:
    import timm

    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=4).state_dict()


@pytest.mark.slow
def test_killed_work_goes_on(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save_file(state(seed), tmp_path / f"{name}.safetensors")
    for verb in ("align", "scramble"):
        (tmp_path / verb).mkdir()
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for verb, line in zip(("align", "scramble"), done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        half = found["whole"] // 2
        assert found["counts"] == ["killed", "killed", "killed", found["whole"] - 3 - half], "what is done stays done"
        whole, resumed = (tmp_path / verb / f"{n}.safetensors" for n in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes()
        assert not list((tmp_path / verb).glob(".*"))


def test_other_work_is_not_gone_on_with(tmp_path: Path) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_file(state(0), source)

    def stopped(what: str, done: int, total: int) -> None:
        if what == "writing" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mergeid.scramble(source, output=output, arch=ARCH, seed=5, resume=True, progress=stopped)
    with pytest.raises(MergeidError, match=r"interrupted at .*out\.safetensors had other order of neurons"):
        mergeid.scramble(source, output=output, arch=ARCH, seed=6, resume=True)
    mergeid.scramble(source, output=output, arch=ARCH, seed=5, resume=True)
    mergeid.scramble(source, output=tmp_path / "whole.safetensors", arch=ARCH, seed=5)
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))
