"""Hub ids, through the real huggingface_hub, against a small server on this machine (HF_ENDPOINT)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save
from serving import served

from mergeid.errors import MergeidError
from mergeid.io.opening import open_checkpoint

MAIN, OLD = "a" * 40, "b" * 40


def weights(value: float, *names: str) -> bytes:
    return save({n: torch.full((2, 3), value) for n in names}, metadata={"format": "pt"})


def model(value: float, **more: bytes) -> dict[str, bytes]:
    config = json.dumps({"model_type": "tiny", "value": value}).encode()
    readme = {"README.md": b"# a model", "onnx/model.onnx": b"x" * 100, "pytorch_model.bin": b"never fetched"}
    return {"config.json": config, "model.safetensors": weights(value, "w"), "tokenizer.json": b"{}", **readme, **more}


def sharded() -> dict[str, bytes]:
    shards = {f"model-0000{i}-of-00002.safetensors": weights(float(i), f"w{i}") for i in (1, 2)}
    weight_map = {"w1": "model-00001-of-00002.safetensors", "w2": "model-00002-of-00002.safetensors"}
    extra = {"consolidated.safetensors": weights(9.0, "z"), "config.json": b"{}"}
    return {**shards, **extra, "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


@dataclass
class Hub:
    """What the server has (repository -> commit -> files), and what it was asked for."""

    models: dict[str, dict[str, dict[str, bytes]]]
    branches: dict[str, str] = field(default_factory=lambda: {"main": MAIN, "v1.0": OLD, "refs/pr/4": OLD})
    gated: frozenset[str] = frozenset({"org/gated"})
    asked: list[str] = field(default_factory=list)
    status: int = 200
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """The three endpoints that a download uses: model info, the tree of a commit, and the files."""

    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        hub.asked.append(path)
        if hub.status != 200:
            return self.answer(hub.status)
        parts = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo not in hub.models:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if not path.startswith("api/"):
            return self.file(repo, *("/".join(rest[1:]).split("/", 1)))
        named = "/".join(rest[1:]) or "main"
        commit = hub.branches.get(named, named)
        files = hub.models[repo].get(commit)
        if files is None:
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        if rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": sha1(c)} for n, c in files.items()]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
        return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def file(self, repo: str, revision: str, name: str) -> None:
        if repo in self.hub.gated:
            message = f"Access to model {repo} is restricted."
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message=message)
        commit = self.hub.branches.get(revision, revision)
        content = self.hub.models[repo][commit][name]
        return self.answer(200, content, ETag=f'"{sha1(content)}"', X_Repo_Commit=commit)


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub(
        {
            "org/name": {MAIN: model(1.0), OLD: model(2.0)},
            "timm/tiny.in1k": {MAIN: model(3.0)},
            "org/sharded": {MAIN: sharded()},
            "org/gated": {MAIN: model(4.0)},
            "org/pickled": {MAIN: {"config.json": b"{}", "pytorch_model.bin": b"PK"}},
            "org/empty": {MAIN: {"README.md": b"nothing"}},
        }
    )
    with served(Handler, found) as found.url:
        yield found


CODE = """
import json, struct, sys
from mergeid.errors import MergeidError
from mergeid.io.opening import open_checkpoint
options = json.loads(sys.argv[2])
try:
    c = open_checkpoint(sys.argv[1], **options)
except MergeidError as error:
    print(json.dumps({"error": str(error)}))
else:
    # The first number of every tensor, read without torch (whose import would take most of the test's time).
    values = {n: struct.unpack_from("<f", c.file_of[n].read_bytes(), c._spans[n][0])[0] for n in c.table}
    print(json.dumps({"values": values, "config": c.config, "folder": str(c.path),
                      "files": sorted(p.name for p in c.path.rglob("*") if p.is_file())}))
"""


class Client:
    """Opens checkpoints in a process of its own (huggingface_hub reads its environment when it is imported)."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home

    def __call__(self, source: str, endpoint: str | None = None, offline: bool = False, **options: object) -> dict:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": endpoint or self.hub.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, "-c", CODE, source, json.dumps(options)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=self.home, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert "\n" not in found.get("error", "")
        return found


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    (tmp_path / "home").mkdir()
    return Client(hub, tmp_path / "home")


def test_found_and_only_what_is_needed_is_fetched(client: Client) -> None:
    found = client("org/name")
    assert found["values"] == {"w": 1.0} and found["config"]["value"] == 1.0
    assert found["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert client("timm/tiny.in1k")["values"] == {"w": 3.0}


@pytest.mark.parametrize("source", ["org/name@v1.0", "org/name@" + OLD, "org/name@refs/pr/4"])
def test_revision(client: Client, source: str) -> None:
    assert client(source)["values"] == {"w": 2.0}


def test_revision_option(client: Client) -> None:
    assert client("org/name", revision="v1.0")["values"] == {"w": 2.0}
    assert client("org/name@v1.0", revision="v1.0")["values"] == {"w": 2.0}
    assert "names the revision v1.0 and --revision names main" in client("org/name@v1.0", revision="main")["error"]


def test_sharded_fetches_the_shards_of_the_index(client: Client) -> None:
    found = client("org/sharded")
    assert found["values"] == {"w1": 1.0, "w2": 2.0}
    assert "consolidated.safetensors" not in found["files"]


def test_not_found(client: Client) -> None:
    error = client("org/nothing")["error"]
    assert error.startswith("no such file or folder: org/nothing; and http://127.0.0.1:")
    assert "has no model with that id, or it is private" in error


def test_revision_not_found(client: Client) -> None:
    error = client("org/name@v9")["error"]
    assert "org/name has no revision 'v9'; expected a branch, tag or commit listed at http" in error


def test_gated(client: Client) -> None:
    error = client("org/gated")["error"]
    assert "org/gated is gated: request access at http" in error and "HF_TOKEN" in error


def test_pickles_and_no_weights(client: Client) -> None:
    assert "org/pickled contains only pytorch_model.bin, a pickle" in client("org/pickled")["error"]
    assert not any("resolve" in path for path in client.hub.asked), "nothing is fetched in vain"
    assert "org/empty contains no weights" in client("org/empty")["error"]
    assert "cannot be read as a pickled state dict" in client("org/pickled", allow_pickle=True)["error"]


def test_offline(client: Client) -> None:
    error = client("org/name", offline=True)["error"]
    assert error.startswith("org/name is not in the local cache and HF_HUB_OFFLINE is set")
    client("org/name")
    client("org/sharded")
    client.hub.asked.clear()
    assert client("org/name", offline=True)["values"] == {"w": 1.0}
    assert client("org/sharded", offline=True)["values"] == {"w1": 1.0, "w2": 2.0}
    assert "is not in the local cache" in client("org/name@v1.0", offline=True)["error"]
    assert client.hub.asked == []


def test_unreachable(client: Client) -> None:
    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens
    error = client("org/name", endpoint=nowhere)["error"]
    assert f"not in the local cache and {nowhere} cannot be reached: check the path or the network" in error
    client("org/name")
    assert client("org/name", endpoint=nowhere)["values"] == {"w": 1.0}


def test_server_error(client: Client) -> None:
    client.hub.status = 503
    assert "answered with status 503" in client("org/name")["error"]
    client.hub.status = 403
    assert "the hub answered with status 403; check the id and your token" in client("org/name")["error"]


def test_a_path_wins_over_a_hub_id(client: Client) -> None:
    folder = client.home / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights(7.0, "local"))
    assert client("org/name")["values"] == {"local": 7.0}
    assert client.hub.asked == []


@pytest.mark.parametrize("source", ["org/na me", "org/name@", "-x/y", "org/name@a b"])
def test_no_hub_id(source: str) -> None:
    with pytest.raises(MergeidError, match="it is not a hub id either"):
        open_checkpoint(source)
