"""A small Hub on loopback, enough for the real huggingface_hub client: repositories, commits, LFS, pull requests.

It keeps everything in memory, records every request, and can be told to fail: `fail("POST", "/api/repos/create", 409)`
answers a status, `fail(..., DROP)` hangs up. Revisions are commits (40 hex digits), `main`, and `refs/pr/N`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "secretsecretsecretsecretsecretsecr"
DROP = 0
LFS = (".safetensors", ".bin")


@dataclass
class Repository:
    """Files of every commit, and which commit each branch is at."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    pulls: int = 0

    def commit(self, files: dict[str, bytes], branch: str = "main", parent: str = "main") -> str:
        """A commit that adds files to those of `parent`; its id."""
        tree = {**self.commits.get(self.heads.get(parent, ""), {}), **files}
        text = json.dumps([sorted((name, sha(data)) for name, data in tree.items()), branch, len(self.commits)])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = tree
        self.heads[branch] = oid
        return oid

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a revision."""
        oid = self.heads.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class FakeHub:
    """The server and what it holds. Use as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.datasets: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.failures: list[tuple[str, str, int, dict[str, str]]] = []
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> str:
        """A repository with one commit (or one commit more); the commit's id."""
        repository = self.repositories.setdefault(name, Repository(**settings))
        return repository.commit(files)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        found = self.repositories[name].tree(revision)
        assert found is not None
        return found[1]

    def fail(self, method: str, path: str, status: int, **headers: str) -> None:
        """Answer every request whose path matches the pattern with `status`, or hang up on it (DROP)."""
        self.failures.append((method, path, status, headers))

    def writes(self) -> list[tuple[str, str]]:
        """Requests that would change something."""
        ask = ("/api/validate-yaml",)
        return [(method, path) for method, path in self.requests if method in ("POST", "PUT") and path not in ask]


class Handler(BaseHTTPRequestHandler):
    """One request: routed by its path."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def route(self, method: str) -> None:
        """Read the body, fail if told to, else hand over to the method that knows the path."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.hub.requests.append((method, path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token:
            self.hub.tokens.add(token)
        self.known = token == TOKEN
        for wanted, pattern, status, headers in self.hub.failures:
            if wanted == method and re.search(pattern, path):
                if status == DROP:
                    self.close_connection = True
                    self.connection.close()
                    return
                self.answer(status, {"error": f"told to fail with {token}"}, **headers)
                return
        for wanted, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if wanted == method and found:
                handle(self, *found.groups())
                return
        self.answer(404, {"error": "no such route"})

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        """A JSON answer."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(raw))} | names).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def whoami(self) -> None:
        if self.known:
            self.answer(200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        else:
            self.answer(401, {"error": "bad"}, X_Error_Message="Invalid credentials in Authorization header")

    def repository(self, name: str) -> Repository | None:
        """The repository if the caller may see it; answers otherwise."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.known):
            self.answer(404 if self.known else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def info(self, name: str, revision: str | None = None) -> None:
        found = self.repository(name)
        if found is None:
            return
        tree = found.tree(revision or "main")
        if tree is None and found.commits:
            self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        oid, files = tree or (None, {})
        card = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
        names = [{"rfilename": file} for file in files]
        body = {"id": name, "modelId": name, "sha": oid, "private": found.private, "siblings": names, "tags": []}
        self.answer(200, body | ({"cardData": yaml.safe_load(card[1])} if card else {}))

    def dataset(self, name: str) -> None:
        if name in self.hub.datasets:
            self.answer(200, {"id": name, "sha": "0" * 40, "private": False, "siblings": [], "tags": []})
        else:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def listing(self, name: str, revision: str) -> None:
        found = self.repository(name)
        if found is None:
            return
        tree = found.tree(revision)
        if tree is None:  # also a folder below a revision, of which there is none
            self.answer(404, {"error": "EntryNotFound"}, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, [entry(file, data) for file, data in tree[1].items()])

    def resolve(self, name: str, revision: str, file: str) -> None:
        found = self.repository(name)
        if found is None:
            return
        if found.gated:
            self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo")
            return
        tree = found.tree(revision)
        if tree is None or file not in tree[1]:
            code = "RevisionNotFound" if tree is None else "EntryNotFound"
            self.answer(404, {"error": code}, X_Error_Code=code)
            return
        data = tree[1][file]
        tag = f'"{sha(data) if file.endswith(LFS) else blob(data)}"'
        self.answer(200, data, ETag=tag, X_Repo_Commit=tree[0], Content_Type="application/octet-stream")

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if not self.known:
            self.answer(401, {"error": "bad"}, X_Error_Message="Invalid credentials in Authorization header")
        elif name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo"})
        elif not name.startswith("me/"):
            self.answer(403, {"error": "forbidden"}, X_Error_Message="You don't have the rights")
        else:
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=is_private(wanted))
            self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def settings(self, name: str) -> None:
        self.hub.repositories[name].private = is_private(json.loads(self.body))
        self.answer(200, {})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        header = yaml.safe_load(content.split("---\n")[1])
        if header.get("license", "mit") not in ("mit", "apache-2.0", "llama3.1", "other"):
            self.answer(400, {"errors": [{"message": '"license" must be one of [mit, apache-2.0]'}], "warnings": []})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self.repository(name) is not None:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(self.body)["files"]
            ]
            self.answer(200, {"files": files})

    def batch(self, name: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(item if item["oid"] in self.hub.objects else {**item, "actions": upload})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        assert sha(self.body) == oid
        self.hub.objects[oid] = self.body
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        found = self.repository(name)
        if found is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != found.heads.get("main"):
            self.answer(412, {"error": "A commit has happened since"})
            return
        files = {}
        for line in lines[1:]:
            value = line["value"]
            regular = line["key"] == "file"
            files[value["path"]] = base64.b64decode(value["content"]) if regular else self.hub.objects[value["oid"]]
        body: dict[str, Any] = {}
        branch = revision
        if "create_pr" in self.query:
            found.pulls += 1
            branch = f"refs/pr/{found.pulls}"
            body["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{found.pulls}"
        oid = found.commit(files, branch, revision)
        self.answer(200, body | {"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "success": True})


ID = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET", f"/api/models/{ID}", Handler.info),
    ("GET", f"/api/models/{ID}/revision/(.+)", Handler.info),
    ("GET", f"/api/models/{ID}/tree/([^?]+)", Handler.listing),
    ("GET", f"/api/datasets/{ID}", Handler.dataset),
    ("GET", f"/{ID}/resolve/((?:refs/pr/)?[^/]+)/(.+)", Handler.resolve),
    ("HEAD", f"/{ID}/resolve/((?:refs/pr/)?[^/]+)/(.+)", Handler.resolve),
    ("POST", "/api/repos/create", Handler.create),
    ("PUT", f"/api/models/{ID}/settings", Handler.settings),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{ID}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.put),
    ("POST", f"/api/models/{ID}/commit/(.+)", Handler.commit),
]


def is_private(settings: dict[str, Any]) -> bool:
    """What a request says about who may see a repository."""
    return bool(settings.get("private", settings.get("visibility") == "private"))


def sha(data: bytes) -> str:
    """sha256, as LFS names objects."""
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> str:
    """git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(name: str, data: bytes) -> dict[str, Any]:
    """A file as a listing shows it."""
    lfs = {"lfs": {"oid": sha(data), "size": len(data), "pointerSize": 134}} if name.endswith(LFS) else {}
    return {"type": "file", "path": name, "size": len(data), "oid": blob(data), **lfs}
