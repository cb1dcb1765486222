"""A small Hub on loopback: repositories, large files, commits, and whatever faults a test asks for. Standard library only.

It keeps what it receives (``repositories``, ``requests``), so that a test can say what may and may not have been sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34
_LFS = (".safetensors", ".gguf", ".png", ".bin")


@dataclass
class Repository:
    """Commits in order, each with all its files; ``refs`` are branches and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """A new commit on main with these files beside the old ones; its id."""
        tree = {**self.at("main"), **files}
        text = json.dumps([len(self.commits), *((name, hashlib.sha1(data).hexdigest()) for name, data in tree.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = tree
        self.refs["main"] = commit
        return commit

    def at(self, revision: str) -> dict[str, bytes]:
        return self.commits.get(self.refs.get(revision, revision), {})


@dataclass
class Fault:
    """An answer given ``times`` times instead of the right one. A ``status`` of 0 cuts the connection."""

    request: str
    status: int
    message: str = ""
    times: int = 1000


class Hub:
    """The server's state. ``url`` is its endpoint."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.agents: set[str] = set()
        self.faults: list[Fault] = []
        self.url = ""
        self.lock = threading.Lock()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[name].at(revision)

    def publish(self, name: str, folder: Path) -> str:
        """Put a folder's files into a repository, made if need be; the commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files)

    def count(self, pattern: str) -> int:
        """Requests whose line matches."""
        return sum(bool(re.search(pattern, line)) for line in self.requests)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers on 127.0.0.1 while the block lasts."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = _Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news: uploads are broken off on purpose."""


class _Answer(Exception):
    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        hub, path = self.state, unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        line = f"{self.command} {path}"
        with hub.lock:
            hub.requests.append(line)
            hub.agents.add(self.headers.get("User-Agent") or "")
            fault = next((f for f in hub.faults if f.times > 0 and re.search(f.request, line)), None)
            if fault is not None:
                fault.times -= 1
        try:
            if fault is not None and fault.status == 0:
                self.close_connection = True
                self.connection.close()
                return
            if fault is not None:
                raise _Answer(
                    fault.status, {"error": fault.message} if fault.message else b"<html>not for programs</html>"
                )
            for method, pattern, function in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    # reading takes no lock: a large file may take its time
                    with hub.lock if self.command in ("POST", "PUT") else nullcontext():
                        function(self, body, **match.groupdict())
            raise _Answer(404, {"error": f"no route {line}"})
        except _Answer as answer:
            self._answer(answer)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, answer: _Answer) -> None:
        raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in answer.headers:
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def writer(self) -> None:
        """Only the token's owner writes, and only to his own namespace."""
        if not self.known:
            raise _Answer(401, {"error": "Invalid username or password."})

    def repository(self, name: str, revision: str | None = None) -> Repository:
        found = self.state.repositories.get(name)
        if found is None or (found.private and not self.known):
            raise _Answer(404 if self.known else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if found.gated:
            raise _Answer(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        if revision is not None and found.refs.get(revision, revision) not in found.commits:
            raise _Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return found


def _create(handler: _Handler, body: bytes) -> None:
    handler.writer()
    asked = json.loads(body)
    name = f"{asked.get('organization') or 'user'}/{asked['name']}"
    if not name.startswith("user/"):
        raise _Answer(403, {"error": f"You don't have the rights to create a model under the namespace {name}"})
    if name in handler.state.repositories:
        raise _Answer(409, {"error": "You already created this model repo", "url": f"{handler.state.url}/{name}"})
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    made = Repository(private)
    made.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
    handler.state.repositories[name] = made
    raise _Answer(200, {"url": f"{handler.state.url}/{name}", "name": name})


def _validate(handler: _Handler, body: bytes) -> None:
    content = json.loads(body)["content"]
    good = content.startswith("---\n") and "\n---\n" in content[4:]
    raise _Answer(200 if good else 400, {"errors": [] if good else [{"message": "no metadata block"}], "warnings": []})


def _info(handler: _Handler, body: bytes, kind: str, name: str, revision: str | None = None) -> None:
    found = handler.repository(name, revision)
    commit = found.refs.get(revision or "main", revision)
    siblings = [{"rfilename": path} for path in found.at(revision or "main")]
    answer = {"_id": name, "id": name, "modelId": name, "sha": commit, "private": found.private, "siblings": siblings}
    raise _Answer(200, {**answer, "tags": [], "downloads": 0})


def _tree(handler: _Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    found = handler.repository(name, revision).at(revision)
    raise _Answer(
        200, [{"type": "file", "path": path, "size": len(data), **_oid(path, data)} for path, data in found.items()]
    )


@lru_cache(maxsize=256)
def _oid(path: str, data: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if not path.endswith(_LFS):
        return {"oid": git}
    return {"oid": git, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}


def _preupload(handler: _Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    handler.writer()
    handler.repository(name, revision)
    files = [
        {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(_LFS) else "regular", "shouldIgnore": False}
        for f in json.loads(body)["files"]
    ]
    raise _Answer(200, {"files": files})


def _batch(handler: _Handler, body: bytes, name: str) -> None:
    handler.writer()
    hub = handler.state
    objects = []
    for asked in json.loads(body)["objects"]:
        actions = {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}"}, "verify": {"href": f"{hub.url}/verify"}}
        objects.append({**asked, **({} if asked["oid"] in hub.blobs else {"actions": actions})})
    raise _Answer(200, {"transfer": "basic", "objects": objects})


def _put(handler: _Handler, body: bytes, oid: str) -> None:
    if hashlib.sha256(body).hexdigest() != oid:
        raise _Answer(400, {"error": "the content is not what its hash says"})
    handler.state.blobs[oid] = body
    raise _Answer(200)


def _verify(handler: _Handler, body: bytes) -> None:
    asked = json.loads(body)
    raise _Answer(200 if len(handler.state.blobs.get(asked["oid"], b"")) == asked["size"] else 404)


def _commit(handler: _Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    handler.writer()
    found = handler.repository(name, revision)
    files = {}
    for line in filter(None, body.split(b"\n")):
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = handler.state.blobs[value["oid"]]
    commit = found.commit(files)
    url = f"{handler.state.url}/{name}/commit/{commit}"
    raise _Answer(200, {"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})


def _resolve(handler: _Handler, body: bytes, name: str, revision: str, path: str) -> None:
    found = handler.repository(name, revision)
    commit = found.refs.get(revision, revision)
    data = found.at(revision).get(path)
    if data is None:
        raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
    oid = _oid(path, data)
    etag = oid["lfs"]["oid"] if "lfs" in oid else oid["oid"]
    raise _Answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=commit, Content_Length=str(len(data)))


_REPO = r"(?P<name>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_ROUTES = (
    ("POST", r"/api/repos/create", _create),
    ("POST", r"/api/validate-yaml", _validate),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", _info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)", _tree),
    ("GET", _API, _info),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", _preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", _commit),
    ("POST", rf"/(?:datasets/)?{_REPO}\.git/info/lfs/objects/batch", _batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _put),
    ("POST", r"/verify", _verify),
    ("GET HEAD", rf"/(?:datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
)
