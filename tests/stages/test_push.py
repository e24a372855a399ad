"""--push, through the real huggingface_hub, against a small server on this machine that takes commits."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load, save_file
from serving import served

import mergeid
from mergeid import MergeidError
from mergeid.io.push import check_push


@dataclass
class Hub:
    """What was committed, and how the server behaves."""

    files: dict[str, bytes] = field(default_factory=dict)
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

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        origin = f"http://{self.headers['Host']}"
        if self.path.endswith("repos/create"):
            return self.answer(200, {"url": f"{origin}/org/name", "name": "org/name"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            return self.answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        if "/commit/" in self.path:
            if self.hub.refuses:
                return self.answer(self.hub.refuses, {"error": "no"})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{origin}/org/name/commit/{'b' * 40}", "commitOid": "b" * 40})
        self.answer(200, {"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    found = Hub()
    with served(Handler, found) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        monkeypatch.setattr("huggingface_hub.HfApi.__init__.__defaults__", (address, "token", None, None, None, None))
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


def test_who_may_write_is_asked_before_the_work(hub: Hub, tmp_path: Path) -> None:
    a, b = _model(tmp_path / "a", 1.0), _model(tmp_path / "b", 2.0)
    hub.known = False
    with pytest.raises(MergeidError, match="token"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never", push="org/name")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MergeidError, match="not a hub id"):
        check_push("nothing")
