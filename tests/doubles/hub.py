"""A stand-in for the model hub: repositories, and the answers to what the hub's client asks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN = "hf_good"
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "other"}


@dataclass
class Fault:
    """What happens instead, to the next requests that match: a status, a connection cut, or other bytes.

    With `done`, the request is carried out all the same, and only the answer is lost.
    """

    method: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    damage: bool = False
    done: bool = False
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
        seed = repr((len(self.commits), branch, sorted(files.items())))
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch or a hash means."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


Answer = tuple[int, dict[str, str], bytes]


@dataclass
class HubDouble:
    """Repositories by name, Spaces as "spaces/ORG/NAME"; `requests`: what was asked, `faults`: what goes wrong."""

    url: str = ""
    repos: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    role: str = "write"

    def put(self, repo: str, files: dict[str, bytes]) -> None:
        """A commit of these files on a public repository's main branch."""
        self.repos.setdefault(repo, Repository(private=False)).add("main", files)

    def publish(self, repo: str, folder: Path) -> None:
        """Put the files of a folder up as a repository."""
        self.put(repo, {file.name: file.read_bytes() for file in folder.iterdir()})

    def commit(self, repo: str) -> str:
        """What "main" means."""
        return self.repos[repo].branches["main"]

    def downloads(self, filename: str) -> int:
        """How often the whole of a file was sent."""
        return sum(request.startswith("GET") and request.endswith(f"/{filename}") for request in self.requests)

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
            errors = _errors_of_card(json.loads(body)["content"])
            return reply({"errors": errors, "warnings": []}, 400 if errors else 200)
        if token != TOKEN:
            return reply({"error": "Invalid credentials in Authorization header"}, 401)
        if path == "/api/whoami-v2":
            orgs, access = [{"type": "org", "name": "lab"}], {"accessToken": {"role": self.role}}
            return reply({"type": "user", "name": "me", "orgs": orgs, "auth": access})
        if method == "POST" and path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/(models|spaces)/([^/]+/[^/]+)(/.*)?", path):
            return self._api(("spaces/" * (match[1] == "spaces")) + match[2], match[3] or "", body)
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
        if not name.startswith(("me/", "lab/")):
            return reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
        if wanted.get("type") == "space":
            name = f"spaces/{name}"
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
            siblings = [_sibling(name, content) for name, content in sorted(found.commits[commit].items())]
            return reply({"id": repo, "sha": commit, "private": found.private, "siblings": siblings, "tags": []})
        if verb == "tree":
            return reply([_entry(name, content) for name, content in sorted(found.commits[revision].items())])
        if verb == "branch":
            found.branches[unquote(revision)] = found.branches["main"]
            return reply({}, 201)
        if verb == "preupload":
            entries = [
                {"path": e["path"], "uploadMode": "lfs" if _is_large(e["path"]) else "regular"}
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


def _errors_of_card(content: str) -> list[dict[str, str]]:
    """What the hub has against a card's licence."""
    data = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
    errors = []
    if data.get("license", "other") not in LICENCES:
        errors.append({"message": '"license" must be one of [apache-2.0, mit, ...]'})
    if not re.fullmatch("[a-z0-9-.]+", data.get("license_name", "none")):
        errors.append({"message": '"license_name" must be in lower case'})
    return errors


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file as the list of a repository's files has it."""
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"rfilename": name, "size": len(content), "blobId": blob, **({"lfs": large} if _is_large(name) else {})}


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """The same in the list of a commit's files."""
    sibling = _sibling(name, content)
    large = {"lfs": {**sibling["lfs"], "oid": sibling["lfs"]["sha256"]}} if _is_large(name) else {}
    return {"type": "file", "path": name, "size": sibling["size"], "oid": sibling["blobId"], **large}


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """An answer in JSON."""
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode()
