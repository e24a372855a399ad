"""--push, through the real huggingface_hub, against a small server on this machine that takes commits."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load, load_file, save_file
from serving import served

import mergeid
from mergeid import MergeidError
from mergeid.io.push import check_push


@dataclass
class Hub:
    """What was committed, and how the server behaves.

    Attributes:
        files: by name, of commits alone.
        stored: large files by their SHA-256, as they were put.
        large: bytes from which a file is a large one.
        part: bytes of a part of a large file; 0: it is put as a whole.
        fails: the request that fails ("batch", "object", "put", "complete", "verify", "commit", "lost commit").
        status: with which it does; 0: the connection breaks.
        puts: how often something was put.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    large: int = 1 << 40
    part: int = 0
    fails: str = ""
    status: int = 500
    puts: int = 0
    refuses: int | None = None
    known: bool = True


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if "whoami" in self.path and not self.hub.known:
            return self.answer(401, {"error": "Invalid token"})
        self.answer(200, {"name": "me", "type": "user", "auth": {}, "sha": "a" * 40, "id": "org/name", "siblings": []})

    def failed(self, request: str) -> bool:
        """Whether this request was to fail, and did."""
        if self.hub.fails != request:
            return False
        if self.hub.status:
            self.answer(self.hub.status, {"error": "no"})
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return True

    def do_PUT(self) -> None:
        """A large file, or a part of one."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.puts += 1
        if self.failed("put"):
            return
        _, _, oid, part = self.path.split("/")
        if part == "whole":
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.stored[oid] = body
        else:
            self.hub.stored[f"{oid}/{part}"] = body
        self.answer(200, {})

    def end_headers(self) -> None:
        if self.command == "PUT":
            self.send_header("ETag", self.path.rsplit("/", 1)[1])
        super().end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        origin = f"http://{self.headers['Host']}"
        if self.path.endswith("repos/create"):
            return self.answer(200, {"url": f"{origin}/org/name", "name": "org/name"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["size"] >= self.hub.large else "regular" for f in asked}
            found = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
            return self.answer(200, {"files": found})
        if self.path.endswith("/objects/batch"):
            if not self.failed("batch"):
                objects = [self.instructions(o, origin) for o in json.loads(body)["objects"]]
                self.answer(200, {"transfer": "multipart" if self.hub.part else "basic", "objects": objects})
            return
        if self.path == "/complete":
            if not self.failed("complete"):
                told = json.loads(body)
                assert [p["partNumber"] for p in told["parts"]] == [int(p["etag"]) for p in told["parts"]]
                whole = b"".join(self.hub.stored.pop(f"{told['oid']}/{p['etag']}") for p in told["parts"])
                assert hashlib.sha256(whole).hexdigest() == told["oid"]
                self.hub.stored[told["oid"]] = whole
                self.answer(200, {})
            return
        if self.path == "/verify":
            if not self.failed("verify"):
                told = json.loads(body)
                right = len(self.hub.stored.get(told["oid"], b"")) == told["size"]
                self.answer(200 if right else 422, {})
            return
        if "/commit/" in self.path:
            if not self.failed("commit"):
                self.commit(body, origin)
            return
        self.answer(200, {"errors": [], "warnings": []})

    def instructions(self, asked: dict[str, Any], origin: str) -> dict[str, Any]:
        """What the batch endpoint says of one object."""
        oid, size = asked["oid"], asked["size"]
        if self.hub.fails == "object":
            return {"oid": oid, "size": size, "error": {"code": 413, "message": "over the quota"}}
        verify = {"href": f"{origin}/verify"}
        if oid in self.hub.stored:
            return {"oid": oid, "size": size}
        if not self.hub.part:
            return {
                "oid": oid,
                "size": size,
                "actions": {"upload": {"href": f"{origin}/put/{oid}/whole"}, "verify": verify},
            }
        parts = {str(i + 1): f"{origin}/put/{oid}/{i + 1}" for i in range(-(-size // self.hub.part))}
        upload = {"href": f"{origin}/complete", "header": {"chunk_size": str(self.hub.part), **parts}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def commit(self, body: bytes, origin: str) -> None:
        """All files of a commit at once, or none."""
        if self.hub.refuses:
            return self.answer(self.hub.refuses, {"error": "no"})
        found: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    return self.answer(400, {"error": "no such object"})
                found[value["path"]] = self.hub.stored[value["oid"]]
        self.hub.files |= found
        if not self.failed("lost commit"):
            self.answer(200, {"commitUrl": f"{origin}/org/name/commit/{'b' * 40}", "commitOid": "b" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    found = Hub()
    with served(Handler, found) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        monkeypatch.setattr("huggingface_hub.HfApi.__init__.__defaults__", (address, "token", None, None, None, None))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers speak a protocol of their own
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield found


def _model(folder: Path, value: float) -> Path:
    folder.mkdir()
    save_file({"w": torch.full((2, 3), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert", "_name_or_path": "x"}')
    return folder


def test_all_of_the_output_is_committed_with_a_card(hub: Hub, tmp_path: Path) -> None:
    a, b = _model(tmp_path / "a", 1.0), _model(tmp_path / "b", 2.0)
    result = mergeid.merge(a, b, output=tmp_path / "out", match="never", push="org/name")
    assert result.notes[-1].endswith("/org/name")
    assert hub.files.keys() == {"model.safetensors", "config.json", "mergeid.json", "README.md"}
    assert torch.equal(load(hub.files["model.safetensors"])["w"], torch.full((2, 3), 1.5))
    _, front, text = hub.files["README.md"].decode().split("---", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "mergeid"]}
    assert "linear" in text and str(a) in text


def test_the_plan_and_its_plot_go_along(hub: Hub, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    mergeid.scramble(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors", seed=1)
    mergeid.merge(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", output=tmp_path / "out.safetensors", push="org/name"
    )
    assert hub.files.keys() == {"out.safetensors", "mergeid.json", "README.md", "evidence.svg"}
    assert json.loads(hub.files["mergeid.json"])["plan"]["verdict"] == "match"
    assert b"<svg" in hub.files["evidence.svg"] and b"](evidence.svg)" in hub.files["README.md"]
    assert all(
        torch.allclose(v, model.state_dict()[k], atol=1e-6) for k, v in load(hub.files["out.safetensors"]).items()
    )


def test_card_names_models_of_the_hub_in_its_own_vocabulary() -> None:
    from mergeid.reporting.card import Origin, model_card
    from mergeid.results.merge import MergeResult

    origin = Origin(["org/a", "./b"], "org/base", ["org/a", "org/base"], "ties", "transformers")
    front = yaml.safe_load(model_card("me/out", MergeResult("direct"), origin).split("---")[1])
    assert front["base_model"] == ["org/a", "org/base"] and front["base_model_relation"] == "merge"


def test_a_refusal_is_one_sentence_and_the_output_stays(hub: Hub, tmp_path: Path) -> None:
    a, b = _model(tmp_path / "a", 1.0), _model(tmp_path / "b", 2.0)
    hub.refuses = 403
    with pytest.raises(MergeidError, match=r"status 403.*still on this machine"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never", push="org/name")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("part", [0, 64], ids=["whole", "in parts"])
def test_large_files_go_the_way_of_large_files(part: int, hub: Hub, tmp_path: Path) -> None:
    """The server asks for it, the bytes are put where it says, checked by their hash, and named by it in the commit."""
    a, b = _model(tmp_path / "a", 1.0), _model(tmp_path / "b", 2.0)
    hub.large, hub.part = 90, part
    mergeid.merge(a, b, output=tmp_path / "out", match="never", push="org/name")
    for name in ("model.safetensors", "config.json", "mergeid.json"):
        assert hub.files[name] == (tmp_path / "out" / name).read_bytes(), name
    assert {hashlib.sha256(v).hexdigest() for v in hub.files.values() if len(v) >= 90} == hub.stored.keys()
    assert hub.files["model.safetensors"] in hub.stored.values() and hub.files["config.json"] not in hub.stored.values()
    puts = hub.puts
    mergeid.merge(a, b, output=tmp_path / "again", match="never", push="org/name")
    large = sum(-(-len(hub.files[n]) // (part or 1 << 40)) for n in ("model.safetensors",))
    assert puts > large and hub.puts - puts < puts  # what the hub has already is not put again


@pytest.mark.parametrize(
    ("fails", "status", "part", "said"),
    [
        ("batch", 500, 0, "status 500"),
        ("object", 200, 0, "does not take the files .*over the quota"),
        ("put", 500, 0, "status 500"),
        ("put", 403, 0, "status 403"),
        ("put", 0, 0, "could not be used"),
        ("put", 500, 64, "status 500"),
        ("complete", 400, 64, "status 400"),
        ("verify", 422, 0, "status 422"),
        ("commit", 500, 0, "status 500"),
        ("commit", 412, 64, "status 412"),
    ],
)
def test_an_upload_that_fails_adds_nothing(
    fails: str, status: int, part: int, said: str, hub: Hub, tmp_path: Path
) -> None:
    a, b = _model(tmp_path / "a", 1.0), _model(tmp_path / "b", 2.0)
    hub.large, hub.part, hub.fails, hub.status = 90, part, fails, status
    with pytest.raises(MergeidError, match=said) as error:
        mergeid.merge(a, b, output=tmp_path / "out", match="never", push="org/name")
    text = str(error.value)
    assert text.startswith("--push org/name: ") and "\n" not in text
    assert text.endswith("no file was added there, and the output is still on this machine")
    assert not hub.files and torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["w"], torch.full((2, 3), 1.5)
    )
    hub.fails = ""
    merged = mergeid.merge(a, b, output=tmp_path / "out", match="never", push="org/name", force=True)
    assert merged.notes[-1].endswith("/org/name") and "model.safetensors" in hub.files


def test_an_answer_that_is_lost_is_said_to_be(hub: Hub, tmp_path: Path) -> None:
    a, b = _model(tmp_path / "a", 1.0), _model(tmp_path / "b", 2.0)
    hub.large, hub.fails, hub.status = 90, "lost commit", 0
    with pytest.raises(MergeidError, match="the commit may have arrived, and the output is still on this machine"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never", push="org/name")


def test_who_may_write_is_asked_before_the_work(hub: Hub, tmp_path: Path) -> None:
    a, b = _model(tmp_path / "a", 1.0), _model(tmp_path / "b", 2.0)
    hub.known = False
    with pytest.raises(MergeidError, match="token"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never", push="org/name")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MergeidError, match="not a hub id"):
        check_push("nothing")
