"""A loopback stand-in for the model hub: the two requests (HEAD and GET of one file) that a download is made of."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class HubDouble:
    """Repositories by name, each a dict of file contents; `requests` records what was asked."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def publish(self, repo: str, folder: Path) -> None:
        """Put the files of a folder up as a repository."""
        self.repos[repo] = {file.name: file.read_bytes() for file in folder.iterdir()}

    def downloads(self, filename: str) -> int:
        """How often the whole of a file was sent."""
        return sum(request.startswith("GET") and request.endswith(f"/{filename}") for request in self.requests)

    def commit(self, repo: str) -> str:
        """The one commit of a repository, which "main" means."""
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path /ORG/NAME/resolve/REVISION/FILE."""
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not match or match[1] not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        repo, revision, filename = match.groups()
        commit = self.commit(repo)
        if revision not in ("main", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if filename not in self.repos[repo]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        body = self.repos[repo][filename]
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return 200, {"X-Repo-Commit": commit, "ETag": etag, "X-Linked-Size": str(len(body))}, body


@contextmanager
def serve_hub() -> Iterator[HubDouble]:
    """Serve an empty HubDouble on a free port of the loopback interface."""
    hub = HubDouble()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            part = self.headers.get("Range")
            hub.requests.append(f"{self.command} {self.path}" + (f" {part}" if part else ""))
            status, headers, body = hub.answer(self.path)
            if part and status == 200:
                first, last = part.removeprefix("bytes=").split("-")
                status, body = 206, body[int(first) : int(last) + 1 if last else None]
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
