"""A hub that lies: wrong lengths, loops, silence, garbage, errors, half of what it promises.

The server runs beside the campaign, in its process; how it answers is told by the model's own name, so that it needs no
memory of its own.
"""

from __future__ import annotations

import functools
import json
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .. import odd
from ..case import Case, campaign
from ..files import averaged, pair, safetensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WAYS = ("good", "good", "listing", "listing", "status", "status", "redirect", "loop", "silent", "short", "long",
"garbage", "close",
        "headers", "html", "empty", "names", "names", "slow", "size", "etag", "weights", "weights",
        "config")  # fmt: skip


@campaign(
    "hub",
    share=0.2,
    processes=5,
    env={"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "HF_TOKEN": "x"},
)
def hub(rng: random.Random, folder: Path) -> Case:
    """A merge of a model on the hub with a file; the cache is in the case's folder where the process is its own."""
    way = rng.choice(WAYS)
    name = f"org/{way}-{rng.randrange(2**40)}"
    a, b = _models()
    (folder / "b.safetensors").write_bytes(safetensors(b))
    revision = rng.choice(("", "", "", "@main", "@v9"))
    good = way == "good" and revision in ("", "@main")
    words = ["merge", name + revision, "b.safetensors", "-o", "o", "--match", "never"]
    env = {"HF_ENDPOINT": endpoint(), "HF_HUB_OFFLINE": "0"}
    codes = frozenset({0}) if good else frozenset({0, 1, 2})
    return Case(
        words,
        ("o",),
        codes,
        (lambda p: averaged(p / "o" / "model.safetensors", [a, b], [0.5, 0.5])) if good else None,
        env=env,
    )


@functools.cache
def _models() -> Any:
    return pair(random.Random(0), ["w", "b"], [[3, 2], [2]])


@functools.cache
def endpoint() -> str:
    """Address of the server, which is started once."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def content(name: str) -> bytes:
    """A file of the model."""
    return safetensors(_models()[0], {"format": "pt"}) if name.endswith(".safetensors") else b'{"model_type": "x"}'


class Liar(BaseHTTPRequestHandler):
    """One answer."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def do_POST(self) -> None:
        self.send(404, b"{}", True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.removeprefix("api/models/").split("/")
        way, _, number = (parts[1] if len(parts) > 1 else "x-0").partition("-")
        rng = random.Random(f"{number}:{path}:{self.command}")
        listing = path.startswith("api/")
        try:
            if listing and way not in ("short", "long", "etag", "size", "weights", "config", "slow", "garbage"):
                self.list(way, rng, body, "/tree/" in path)
            elif listing:
                self.list("good", rng, body, "/tree/" in path)
            else:
                self.file(way, rng, path.rpartition("/")[2], body)
        except OSError:
            self.close_connection = True

    def list(self, way: str, rng: random.Random, body: bool, tree: bool) -> None:
        names: list[Any] = ["config.json", "model.safetensors", "README.md"]
        about: Any = {"id": "org/x", "modelId": "org/x", "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
        if way == "names":
            names += [odd.text(rng) for _ in range(3)] + [
                "../../evil.safetensors",
                "/etc/passwd",
                "a/b/c.json",
                "model.safetensors/x",
            ]
        about["siblings"] = [{"rfilename": n} for n in names]
        if tree:
            about = [{"type": "file", "path": n, "size": len(content(n)), "oid": COMMIT} for n in names]
        raw = json.dumps(about).encode()
        if way == "listing":
            raw = odd.written(rng, odd.damaged(rng, about), 0.3)
        elif way == "html":
            raw = b"<html><body>Please log in</body></html>"
        elif way == "empty":
            raw = b""
        self.odd_ways(way, rng, raw, body)

    def file(self, way: str, rng: random.Random, name: str, body: bool) -> None:
        raw = content(name)
        more = {"ETag": f'"{name}-{len(raw)}"', "X-Repo-Commit": COMMIT}
        if way == "weights" and name.endswith(".safetensors"):
            raw = odd.damaged_bytes(rng, raw)
        elif way == "config" and name == "config.json":
            raw = odd.written(rng, odd.value(rng), 0.5)
        elif way == "etag":
            more = rng.choice(
                ({}, {"ETag": ""}, {"ETag": "../../x"}, {"ETag": "x" * 3000}, {**more, "X-Repo-Commit": "../x"})
            )
        elif way == "short":
            return self.send(200, raw[: len(raw) // 2], body, {**more, "Content-Length": str(len(raw))}, shut=True)
        elif way == "long":
            return self.send(200, raw + b"x" * 99, body, {**more, "Content-Length": str(len(raw))}, shut=True)
        elif way == "size":
            more["X-Linked-Size"] = rng.choice(("0", "-1", "x", str(2**63), "1"))
        elif way == "slow":
            time.sleep(0.3)
        elif way == "garbage":
            raw = rng.randbytes(500)
        self.odd_ways(way, rng, raw, body, more)

    def odd_ways(
        self, way: str, rng: random.Random, raw: bytes, body: bool, more: dict[str, str] | None = None
    ) -> None:
        if way == "status":
            return self.send(
                rng.choice((400, 401, 403, 404, 410, 418, 429, 500, 502, 503, 504, 204, 206, 299)), b"{}", body
            )
        if way == "redirect":
            target = rng.choice(
                ("http://127.0.0.1:9/x", "file:///etc/passwd", "//", "http://[", "ftp://x", "", "\u00fc")
            )
            return self.send(302, b"", body, {"Location": target})
        if way == "loop":
            return self.send(302, b"", body, {"Location": self.path})
        if way == "silent":
            time.sleep(60)
            return None
        if way == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        if way == "headers":
            self.wfile.write(
                rng.choice(
                    (
                        b"HTTP/9.9 abc\r\n\r\n",
                        b"\x00" * 99,
                        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 99_999 + b"\r\n\r\n",
                    )
                )
            )
            self.close_connection = True
            return None
        return self.send(200, raw, body, more)

    def send(self, status: int, raw: bytes, body: bool, more: dict[str, str] | None = None, shut: bool = False) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(raw)), "Content-Type": "application/json", **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(raw)
        if shut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
