"""Serves a stand-in for the model hub on the loopback interface, which fails on purpose where a test says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from doubles.hub import TOKEN, Answer, HubDouble, reply
from huggingface_hub import close_session, constants, get_session, repocard


@contextmanager
def serve_hub() -> Iterator[HubDouble]:
    """Serve an empty hub on a free port of the loopback interface."""
    hub = HubDouble()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 5

        def answer(self) -> None:
            path = unquote(urlparse(self.path).path)
            body = self._body()
            with lock:
                part = self.headers.get("Range")
                hub.requests.append(f"{self.command} {path}" + (f" {part}" if part else ""))
                fault = next((fault for fault in hub.faults if fault.takes(self.command, path)), None)
                if fault is not None and fault.done:
                    self.answered(path, body)
                if fault is not None and fault.status:
                    status, headers, content = reply({"error": "on purpose"}, fault.status, fault.headers)
                elif fault is not None and fault.cut and self.command in ("PUT", "POST"):
                    self.close_connection = True
                    return
                else:
                    status, headers, content = self.answered(path, body)
            if fault is not None and fault.damage:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if part and self.command == "GET" and status == 200:
                first, last = part.removeprefix("bytes=").split("-")
                end = min(int(last or len(content)), len(content) - 1)
                headers = {**headers, "Content-Range": f"bytes {first}-{end}/{len(content)}"}
                status, content = 206, content[int(first) : end + 1]
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

        def answered(self, path: str, body: bytes) -> Answer:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            return hub.answer(self.command, path, body, token)

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


def point_client_at(hub: HubDouble, monkeypatch: pytest.MonkeyPatch, cache: str, token: str | None = TOKEN) -> None:
    """Have this process's client talk to the hub, with an empty cache and a token."""
    # Its open connections are to the hub of another test, whose port this one may have got.
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    # Older clients have huggingface.co itself look at cards, whatever the endpoint.
    def post(url: str, **options: Any) -> Any:
        return get_session().post(url.replace("https://huggingface.co", hub.url), **options)

    monkeypatch.setattr(repocard, "get_session", lambda: SimpleNamespace(post=post))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}-no-token")
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


def environment_of(hub: HubDouble, cache: str, token: str = TOKEN) -> dict[str, str]:
    """For another process: its client talks to the hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": cache,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
