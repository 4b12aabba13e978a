"""A Hub on loopback: repositories in memory, the calls that `huggingface_hub` makes, and faults on demand."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.utils.sha import git_hash

#: Token -> user whose repositories it may write, or None for one that reads only.
TOKENS = {"hf_" + "w" * 34: "me", "hf_" + "r" * 34: None}
WRITER, READER = TOKENS
_LFS = (".safetensors", ".png", ".gguf")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])


class FakeHub:
    """What the server knows; `log` holds method and path of every request, `faults` the statuses that are to come."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.cards: list[str] = []
        self.bodies: list[bytes] = []
        self.faults: list[tuple[str, str, int]] = []
        self.url = ""

    def fail(self, method: str, path: str, status: int = 500, times: int = 1) -> None:
        """The next so many such requests get that status; 0 closes the connection."""
        self.faults += [(method, path, status)] * times

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p in self.log)

    def fault(self, method: str, path: str) -> int | None:
        for fault in self.faults:
            if fault[0] == method and re.search(fault[1], path):
                self.faults.remove(fault)
                return fault[2]
        return None


@contextmanager
def serve() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(hub: FakeHub, home: str, token: str | None = WRITER) -> dict[str, str]:
    """What a process needs to talk to the fake Hub."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token or "",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


def check_card(text: str) -> str | None:
    """What is wrong with a card's metadata, by the Hub's rules for `model-index`; None if nothing is."""
    found = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    data = yaml.safe_load(found[1]) if found else {}
    for entry in data.get("model-index", ()):
        if not isinstance(entry.get("name"), str) or not isinstance(entry.get("results"), list):
            return '"model-index[0]" must have a name and results'
        for result in entry["results"]:
            for key, names in (("task", ("type",)), ("dataset", ("type", "name"))):
                if not all(isinstance(result.get(key, {}).get(name), str) for name in names):
                    return f'"model-index[0].results[0].{key}" is not valid'
            if not result.get("metrics") or not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                return '"model-index[0].results[0].metrics" is not valid'
    return None


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path))
        self.hub.bodies.append(body)
        status = self.hub.fault(self.command, path)
        if status == 0:
            self.close_connection = True
            return
        if status is not None:
            self.answer(status, {"error": "on demand"})
            return
        for method, pattern, call in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                call(self, body, *found.groups())
                return
        self.answer(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def may_write(self, owner: str) -> bool:
        if self.token() not in TOKENS:
            self.answer(401, {"error": "Invalid username or password."})
            return False
        if TOKENS[self.token()] != owner:
            self.answer(403, {"error": f"You don't have the rights to create a model under the namespace {owner!r}"})
            return False
        return True

    def visible(self, repo_id: str) -> Repository | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and TOKENS.get(self.token()) != repo_id.split("/")[0]):
            self.answer(404 if self.token() else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if not self.may_write(wanted["organization"]):
            return
        status = 409 if repo_id in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[repo_id] = Repository(wanted.get("visibility") == "private", {".gitattributes": b"*"})
        self.answer(status, {"url": f"{self.hub.url}/{repo_id}"})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        self.hub.cards.append(content)
        wrong = check_card(content)
        self.answer(400 if wrong else 200, {"errors": [{"message": wrong}] if wrong else [], "warnings": []})

    def info(self, body: bytes, repo_id: str, *revision: str) -> None:
        repository = self.visible(repo_id)
        if repository is not None:
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
                | ({"lfs": {"sha256": _sha256(data), "size": len(data), "pointerSize": 1}} if name.endswith(_LFS) else {})
                for name, data in repository.files.items()
            ]
            head = {"id": repo_id, "modelId": repo_id, "private": repository.private, "sha": repository.commits[-1]}
            self.answer(200, {**head, "siblings": siblings, "tags": [], "downloads": 0})

    def tree(self, body: bytes, repo_id: str, folder: str) -> None:
        repository = self.visible(repo_id)
        if repository is not None and folder:
            self.answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        elif repository is not None:
            files = repository.files.items()
            self.answer(200, [{"type": "file", "path": n, "oid": git_hash(data), "size": len(data)} for n, data in files])

    def preupload(self, body: bytes, repo_id: str) -> None:
        repository = self.visible(repo_id)
        if repository is None or not self.may_write(repo_id.split("/")[0]):
            return
        files = []
        for wanted in json.loads(body)["files"]:
            name, is_lfs = wanted["path"], wanted["path"].endswith(_LFS)
            data = repository.files.get(name)
            oid = None if data is None else _sha256(data) if is_lfs else git_hash(data)
            files.append({"path": name, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, body: bytes, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.hub.url}/lfs/{wanted['oid']}"
            actions = {} if wanted["oid"] in self.hub.objects else {"actions": {"upload": {"href": href, "header": {}}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if _sha256(body) != oid:
            self.answer(400, {"error": "other content"})
            return
        self.hub.objects[oid] = body
        self.answer(200, {})

    def commit(self, body: bytes, repo_id: str) -> None:
        repository = self.visible(repo_id)
        if repository is None or not self.may_write(repo_id.split("/")[0]):
            return
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append(f"{len(repository.commits):040d}")
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/1", "commitOid": repository.commits[-1]})

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        repository = self.visible(repo_id)
        if repository is None:
            return
        commit = {"X-Repo-Commit": repository.commits[-1]}
        if name not in repository.files:
            self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", **commit})
            return
        data = repository.files[name]
        self.answer(200, data, {"ETag": f'"{_sha256(data)}"', **commit})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_ID = r"([^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_ID}", _Handler.info),
    ("GET", f"/api/models/{_ID}/revision/(.+)", _Handler.info),
    ("GET", f"/api/models/{_ID}/tree/[^/]+/?(.*)", _Handler.tree),
    ("POST", f"/api/models/{_ID}/preupload/main", _Handler.preupload),
    ("POST", f"/{_ID}.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/([0-9a-f]+)", _Handler.put),
    ("POST", f"/api/models/{_ID}/commit/main", _Handler.commit),
    ("GET HEAD", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
