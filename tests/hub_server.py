"""A small in-memory Hugging Face Hub on loopback: the HTTP calls made by a push, with injectable faults."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

SHA = "0" * 40  # of every commit that is read
TOKEN = "hf_" + "T0kenOfThisTest" * 2


@dataclass
class Repository:
    """Content by branch and path, and the commit messages of each branch."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)


@dataclass
class Fault:
    """For the next `times` matching requests: answer `status`, cut the connection during the upload, or stay silent."""

    method: str
    path: str
    times: int
    status: int | None = None  # None: cut the connection
    silent: bool = False


class Hub:
    """State of the server.

    Attributes:
        repositories: "models/owner/name" -> repository.
        large_files: sha256 -> uploaded content.
        sent: sha256 of every completed upload of a large file.
        requests: "METHOD path" of every request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.url = ""
        self.closing = threading.Event()

    def fault_for(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


def _branch_of(revision: str) -> str:
    """The branch that a revision names; the only commit is that of the main branch."""
    return "main" if revision == SHA else revision


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None) -> None:
        data = json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _handle(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault_for(self.command, path)
        if fault is not None and fault.silent:
            self.rfile.read(length)
            self.hub.closing.wait()
            self.close_connection = True
            return None
        if fault is not None and fault.status is None:
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        body = self.rfile.read(length)
        if fault is not None and fault.status is not None:
            return self._answer(fault.status, {"error": "a fault of the test"})
        if not path.startswith("/store/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                return function(self, body, *match.groups())
        return self._answer(404, {"error": f"no such call: {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815 (names that the base class calls)

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        url = {"url": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"}
        if f"{kind}s/{name}" in self.hub.repositories:
            return self._answer(409, {"error": "You already created this repo", **url})
        self.hub.repositories[f"{kind}s/{name}"] = Repository(wanted.get("visibility") == "private")
        return self._answer(200, url)

    def _branch(self, _: bytes, key: str, branch: str) -> None:
        repository = self.hub.repositories[key]
        if branch in repository.branches:
            return self._answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = dict(repository.branches["main"])
        return self._answer(200)

    def _tree(self, _: bytes, key: str, branch: str, below: str | None = None) -> None:
        files = self.hub.repositories[key].branches[_branch_of(branch)]
        self._answer(
            200,
            [{"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)} for path, data in files.items()],
        )

    def _preupload(self, body: bytes, key: str, branch: str) -> None:
        files = self.hub.repositories[key].branches[branch]
        answer = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".bin", ".parquet"))
            there = files.get(file["path"])
            oid = there and (hashlib.sha256(there).hexdigest() if large else _git_oid(there))
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": answer})

    def _batch(self, body: bytes, _: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            found: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/store/{wanted['oid']}"}}
            objects.append(found)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large_files[oid] = body
        self.hub.sent.append(oid)
        self._answer(200)

    def _commit(self, body: bytes, key: str, branch: str) -> None:
        repository = self.hub.repositories[key]
        files = dict(repository.branches[branch])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repository.commits.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repository.branches[branch] = files
        oid = f"{len(repository.commits):040x}"
        place = key.removeprefix("models/")
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{place}/commit/{oid}"})

    def _info(self, _: bytes, key: str, branch: str = "main") -> None:
        repository = self.hub.repositories.get(key)
        if repository is None:
            return self._answer(404, {"error": "Repository not found"})
        files = repository.branches[_branch_of(branch)]
        found = {"id": key.partition("/")[2], "sha": SHA, "private": repository.private, "tags": []}
        return self._answer(200, {**found, "siblings": [{"rfilename": path} for path in files]})

    def _paths_info(self, body: bytes, key: str, branch: str) -> None:
        files = self.hub.repositories[key].branches[_branch_of(branch)]
        wanted = [path for path in json.loads(body)["paths"] if path in files]
        self._answer(
            200, [{"type": "file", "path": p, "size": len(files[p]), "oid": _git_oid(files[p])} for p in wanted]
        )

    def _resolve(self, _: bytes, kind: str | None, name: str, branch: str, path: str) -> None:
        """Content of a file, or of the requested range of it."""
        repository = self.hub.repositories.get(f"{kind or 'models/'}{name}")
        data = repository.branches[_branch_of(branch)].get(path) if repository else None
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if repository else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first = int(part[1]) if part else 0
        content = data[first : int(part[2]) + 1 if part and part[2] else None]
        self.send_response(206 if part else 200)
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{_git_oid(data)}"')
        self.send_header("Content-Length", str(len(content)))
        if part:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{len(data)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _yaml(self, _: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})


_KEY = r"/api/((?:models|datasets)/[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._yaml),
    ("POST", _KEY + "/branch/(.+)", _Handler._branch),
    ("GET", _KEY + "/tree/([^/]+)(/.*)?", _Handler._tree),
    ("GET", _KEY, _Handler._info),
    ("GET", _KEY + "/revision/([^/]+)", _Handler._info),
    ("POST", _KEY + "/paths-info/([^/]+)", _Handler._paths_info),
    ("GET", "/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler._resolve),
    ("HEAD", "/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler._resolve),
    ("POST", _KEY + "/preupload/(.+)", _Handler._preupload),
    ("POST", _KEY + "/commit/(.+)", _Handler._commit),
    ("POST", r"/(.+)\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", "/store/([0-9a-f]{64})", _Handler._store),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a Hub on a free loopback port until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
