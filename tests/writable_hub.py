"""A loopback stand-in for the model hub that can be written to, and that fails on purpose where a test says so."""

from __future__ import annotations

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
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import close_session, constants

TOKEN = "hf_good"


@dataclass
class Fault:
    """What happens instead, to the next requests that match: a status, a connection cut, or other bytes."""

    method: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    damage: bool = False
    times: int = 1

    def takes(self, method: str, path: str) -> bool:
        """Whether it happens now."""
        if self.times < 1 or self.method != method or not re.search(self.path, path):
            return False
        self.times -= 1
        return True


@dataclass
class Repository:
    """Commits, each all of its files, and the branches' heads."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        """A commit of these files on a branch."""
        seed = repr((len(self.commits), branch, sorted(files)))
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch or a hash means."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


Answer = tuple[int, dict[str, str], bytes]


@dataclass
class WritableHub:
    """Repositories by name; `requests` records what was asked, `faults` what goes wrong."""

    url: str = ""
    repos: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a visitor of a revision sees."""
        found = self.repos[repo].find(revision)
        return {} if found is None else self.repos[repo].commits[found]

    def asked(self, method: str, path: str) -> int:
        """How many requests match."""
        return sum(bool(re.search(f"^{method} .*{path}", request)) for request in self.requests)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Answer:
        """Status, headers and body."""
        if method in ("GET", "HEAD") and (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)):
            return self._resolve(*match.groups())
        if method == "PUT" and path.startswith("/lfs/"):
            return self._store(path.removeprefix("/lfs/"), body)
        if path.startswith("/lfs-verify/"):
            return reply({})
        if method == "POST" and path == "/api/validate-yaml":
            return reply({"errors": [], "warnings": []})
        if token != TOKEN:
            return reply({"error": "Invalid credentials in Authorization header"}, 401)
        if path == "/api/whoami-v2":
            return reply({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if method == "POST" and path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self._api(match[1], match[2] or "", body)
        return reply({"error": f"no such route: {method} {path}"}, 404)

    def _resolve(self, repo: str, revision: str, name: str) -> Answer:
        if repo not in self.repos:
            return reply({}, 404, {"X-Error-Code": "RepoNotFound"})
        commit = self.repos[repo].find(revision)
        if commit is None:
            return reply({}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = self.repos[repo].commits[commit]
        if name not in files:
            return reply({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        return 200, {"X-Repo-Commit": commit, "ETag": etag, "X-Linked-Size": str(len(files[name]))}, files[name]

    def _store(self, oid: str, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return reply({"error": "hash mismatch"}, 400)
        self.blobs[oid] = body
        return reply({})

    def _create(self, wanted: dict[str, Any]) -> Answer:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if not name.startswith("me/"):
            return reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
        if name in self.repos:
            return reply({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        self.repos[name] = Repository(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.repos[name].add("main", {".gitattributes": b""})
        return reply({"url": f"{self.url}/{name}", "name": name, "id": name})

    def _batch(self, wanted: dict[str, Any]) -> Answer:
        objects = []
        for entry in wanted["objects"]:
            oid = entry["oid"]
            actions = {"upload": {"href": f"{self.url}/lfs/{oid}"}, "verify": {"href": f"{self.url}/lfs-verify/{oid}"}}
            objects.append({"oid": oid, "size": entry["size"], **({} if oid in self.blobs else {"actions": actions})})
        media = {"Content-Type": "application/vnd.git-lfs+json"}
        return reply({"transfer": "basic", "objects": objects}, 200, media)

    def _api(self, repo: str, rest: str, body: bytes) -> Answer:
        if repo not in self.repos:
            return reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        found = self.repos[repo]
        verb, _, revision = rest.lstrip("/").partition("/")
        if verb in ("", "revision"):
            commit = found.find(unquote(revision) or "main")
            if commit is None:
                return reply({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in sorted(found.commits[commit])]
            return reply({"id": repo, "sha": commit, "private": found.private, "siblings": siblings, "tags": []})
        if verb == "branch":
            found.branches[unquote(revision)] = found.branches["main"]
            return reply({}, 201)
        if verb == "preupload":
            entries = [
                {"path": e["path"], "uploadMode": "lfs" if e["path"].endswith("safetensors") else "regular"}
                for e in json.loads(body)["files"]
            ]
            return reply({"files": [{**entry, "shouldIgnore": False, "oid": None} for entry in entries]})
        if verb == "commit":
            return self._commit(repo, unquote(revision), [json.loads(line) for line in body.splitlines()])
        return reply({"error": f"no such route: {rest}"}, 404)

    def _commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> Answer:
        found = self.repos[repo]
        files = dict(found.commits[found.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", found.branches[branch]) != found.branches[branch]:
                return reply({"error": "A commit has happened since."}, 412)
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        commit = found.add(branch, files)
        return reply({"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"})


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """An answer in JSON."""
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode()


@contextmanager
def serve_writable_hub() -> Iterator[WritableHub]:
    """Serve an empty hub on a free port of the loopback interface."""
    hub = WritableHub()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 5

        def answer(self) -> None:
            path = unquote(urlparse(self.path).path)
            body = self._body()
            with lock:
                hub.requests.append(f"{self.command} {path}")
                fault = next((fault for fault in hub.faults if fault.takes(self.command, path)), None)
                if fault is not None and fault.status:
                    status, headers, content = reply({"error": "on purpose"}, fault.status, fault.headers)
                elif fault is not None and fault.cut and self.command in ("PUT", "POST"):
                    self.close_connection = True
                    return
                else:
                    token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
                    status, headers, content = hub.answer(self.command, path, body, token)
            if fault is not None and fault.damage:
                content = content[:-1] + bytes([content[-1] ^ 1])
            part = self.headers.get("Range")
            if part and self.command == "GET" and status == 200:
                start = int(part.removeprefix("bytes=").split("-")[0])
                headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
                status, content = 206, content[start:]
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if fault is not None and fault.cut:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_client_at(hub: WritableHub, monkeypatch: pytest.MonkeyPatch, cache: str, token: str | None = TOKEN) -> None:
    """Have this process's client talk to the hub, with an empty cache and a token."""
    # Its open connections are to the hub of another test, whose port this one may have got.
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}-no-token")
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


def environment_of(hub: WritableHub, cache: str, token: str = TOKEN) -> dict[str, str]:
    """For another process: its client talks to the hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": cache,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
