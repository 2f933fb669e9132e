"""A hub on loopback: repositories in memory, uploads as git LFS, downloads by range after a redirect."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stub0123456789abcdef"
"""The token that the hub accepts."""


@dataclass
class Repo:
    """A repository: whether it is private, and its files by name."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The state of the hub.

    Attributes:
        refuses: by the path of a request, the status and the message with which it is refused.
    """

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: int = 0


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        hub.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            http.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch("GET", b"")

    def do_POST(self) -> None:
        self._dispatch("POST", self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self) -> None:
        self._dispatch("PUT", self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, status: int, document: object, **headers: str) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _dispatch(self, method: str, body: bytes) -> None:
        hub, path = self.state, self.path.partition("?")[0]
        hub.requests.append(f"{method} {path}")
        if path in hub.refuses:
            status, message = hub.refuses[path]
            return self._answer(
                status, {"error": message, "errors": [{"message": message}]}, X_Error_Message=ascii(message)
            )
        is_signed = path.startswith(("/objects/", "/cdn/"))
        if not is_signed and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        for pattern, handle in (
            ("POST /api/repos/create", self._create),
            ("POST /api/validate-yaml", self._validate),
            (r"GET /api/models/([\w.-]+/[\w.-]+)", self._info),
            (r"POST /api/models/([\w.-]+/[\w.-]+)/preupload/main", self._preupload),
            (r"POST /api/models/([\w.-]+/[\w.-]+)/commit/main", self._commit),
            (r"POST /([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self._batch),
            (r"PUT /objects/(\w+)", self._put),
            (r"GET /([\w.-]+/[\w.-]+)/resolve/main/([\w.-]+)", self._resolve),
            (r"GET /cdn/([\w.-]+/[\w.-]+)/([\w.-]+)", self._download),
        ):
            if found := re.fullmatch(pattern, f"{method} {path}"):
                return handle(body, *found.groups())
        return self._answer(404, {"error": f"the stub does not know {method} {path}"})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.state.repos else 200
        self.state.repos.setdefault(name, Repo(asked.get("visibility") == "private"))
        self._answer(status, {"url": f"{self.state.address}/{name}", "error": "You already created this"})

    def _validate(self, body: bytes) -> None:
        assert "content" in json.loads(body)
        self._answer(200, {"errors": [], "warnings": []})

    def _info(self, body: bytes, name: str) -> None:
        if name not in self.state.repos:
            return self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self._answer(200, {"id": name, "modelId": name, "private": self.state.repos[name].private})

    def _preupload(self, body: bytes, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.state.address}/objects/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        assert sha256(body).hexdigest() == oid
        self.state.objects[oid] = body
        self._answer(200, {})

    def _commit(self, body: bytes, name: str) -> None:
        repo = self.state.repos[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.state.objects[value["oid"]]
            else:
                repo.files[value["path"]] = base64.b64decode(value["content"])
        oid = sha256(body).hexdigest()[:40]
        url = f"{self.state.address}/{name}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def _resolve(self, body: bytes, name: str, file: str) -> None:
        if name not in self.state.repos or file not in self.state.repos[name].files:
            return self._answer(404, {"error": "Entry not found"})
        return self._answer(302, b"", Location=f"{self.state.address}/cdn/{name}/{file}")

    def _download(self, body: bytes, name: str, file: str) -> None:
        content = self.state.repos[name].files[file]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert asked is not None
        begin, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        part = content[begin : last + 1]
        self.state.sent += len(part)
        tag = f'"{sha256(content).hexdigest()}"'
        self._answer(206, part, Content_Range=f"bytes {begin}-{last}/{len(content)}", ETag=tag)
