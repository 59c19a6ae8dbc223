"""The examples that need something around them: here a hub, on this machine."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import upswap
from models import assert_same, patched, unet

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hugging Face hub as creating a repository, uploading a folder and downloading it take."""

    def __init__(self, store: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.store = store
        self.made: dict[str, Any] = {}
        self.refused: list[str] = []
        self.large: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    """What the hub says to one request."""

    server: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = self._body()
        path = urllib.parse.urlsplit(self.path).path
        if path == "/api/repos/create":
            self.server.made = json.loads(body)
            self._json({"url": f"{self.server.url}/me/net"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/models/me/net/preupload/main":
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
            self._json(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(files, modes, strict=True)
                    ]
                }
            )
        elif path == "/me/net.git/info/lfs/objects/batch":
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/large/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif path == "/api/models/me/net/commit/main":
            for line in body.splitlines():
                self._store(json.loads(line))
            self._json({"commitUrl": f"{self.server.url}/me/net/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._refuse()

    def do_PUT(self) -> None:
        body = self._body()
        if self.path != f"/large/{hashlib.sha256(body).hexdigest()}":
            self._refuse()
            return
        self.server.large[hashlib.sha256(body).hexdigest()] = body
        self._send(b"")

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        files = {file.name: file for file in self.server.store.iterdir()}
        if path in ("/api/models/me/net", "/api/models/me/net/revision/main"):
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": "me/net", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        elif path in ("/api/models/me/net/tree/main", f"/api/models/me/net/tree/{COMMIT}"):
            self._json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file.read_bytes())}
                    for name, file in files.items()
                ]
            )
        elif path.startswith(f"/me/net/resolve/{COMMIT}/") and path.rpartition("/")[2] in files:
            content = files[path.rpartition("/")[2]].read_bytes()
            self._send(content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self._refuse()

    do_HEAD = do_GET

    def _store(self, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            (self.server.store / value["path"]).write_bytes(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            (self.server.store / value["path"]).write_bytes(self.server.large[value["oid"]])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self) -> None:
        self.server.refused.append(f"{self.command} {self.path}")
        self._send(b"", status=404)

    def _json(self, data: Any) -> None:
        self._send(json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    store = tmp_path / "hub"
    store.mkdir()
    with Hub(store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_a_model_goes_to_the_hub_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    model = patched(unet())
    upswap.save(model, tmp_path / "unet.upswap.pt")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_none", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1",
    }  # fmt: skip

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    push = (str(ROOT / "examples" / "push_to_hub.py"), "unet.upswap.pt", "me/net")
    said = python(*push, "--private")
    assert (hub.made["organization"], hub.made["name"]) == ("me", "net")
    assert "private" in hub.made.values() or hub.made.get("private") is True  # newer and older versions
    assert {path.name for path in hub.store.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "upswap.json", "upswap.safetensors",
    }  # fmt: skip
    card = (hub.store / "README.md").read_text()
    assert "A Unet with " in card
    assert "decoder.blocks.0" in card

    # What it says is what works, and so is what the card says.
    load = said.partition("\n\n")[2].strip()
    assert load in card
    # Then again, with a card of one's own and other weights.
    (tmp_path / "net" / "README.md").write_text("mine")
    other = patched(unet(classes=3))
    upswap.save(other, tmp_path / "unet.upswap.pt", force=True)
    code = f"""
import runpy, sys
import huggingface_hub, upswap
{load}
upswap.save(model, "back.pt")
sys.argv = {list(push)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    python("-c", code)
    assert_same(upswap.load(tmp_path / "back.pt"), model)
    assert "private" not in hub.made.values()
    assert (hub.store / "README.md").read_text() == "mine"
    assert_same(upswap.load(hub.store), other)
    assert hub.refused == []
